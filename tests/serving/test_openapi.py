"""The server keeps to its own OpenAPI description, whatever is sent."""

import hypothesis
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase
from schemathesis.specs.openapi import checks

from glm45.serving.app import build_app
from glm45.serving.service import Service

CHECKS = [
    schemathesis.checks.not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
    checks.negative_data_rejection,
]
SETTINGS = hypothesis.settings(
    max_examples=8,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    derandomize=True,
    suppress_health_check=list(HealthCheck),
)


@pytest.mark.slow
@pytest.mark.parametrize("mode", list(schemathesis.GenerationMode))
def test_no_input_makes_a_server_error(mode, shared_engine, tokenizer):
    """Schemathesis sends what the description allows and what it forbids: no 5xx, no undescribed answer."""
    shared_engine.reset()
    app = build_app(Service(shared_engine, tokenizer, "tiny", is_admin=True))
    operations = [result.ok() for result in schemathesis.openapi.from_asgi("/openapi.json", app).get_all_operations()]
    assert len(operations) >= 15
    for operation in operations:
        if mode.is_negative and not operation.body:
            continue  # there is nothing to get wrong

        @SETTINGS
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case):
            case.call_and_validate(checks=CHECKS)

        check()
