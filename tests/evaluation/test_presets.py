"""The command line's options, the report's presets and the ways of running a suite."""

import pytest

from glm45.evaluation import command
from glm45.evaluation.runner import SuiteSettings
from glm45.evaluation.targets import Sampling


@pytest.mark.parametrize(
    ("preset", "samples", "last_characters"),
    [("aime", 32, None), ("gpqa", 8, 1024), ("math-500", 3, None), ("livecodebench", 2, None)],
)
def test_presets_are_the_report_s(preset, samples, last_characters):
    settings = command.read_options([], preset).resolved_settings
    assert (settings.num_samples, settings.last_characters) == (samples, last_characters)
    assert settings.sampling == Sampling(temperature=0.6, top_p=0.95, max_tokens=81_920)


def test_overrides_win_over_presets():
    given = ["max_tokens=64", "settings.num_samples=2", "settings.sampling.temperature=1.0"]
    settings = command.read_options(given, "aime").resolved_settings
    assert settings == SuiteSettings(num_samples=2, sampling=Sampling(temperature=1.0, top_p=0.95, max_tokens=64))
    assert command.read_options([], None).resolved_settings == SuiteSettings()
    with pytest.raises(ValueError, match="no preset 'olympics'; known: aime"):
        command.read_options([], "olympics")


def test_several_suites_can_be_asked_of_one_endpoint(endpoint, chat, tmp_path, capsys):
    endpoint.script = lambda path, body: (200, {}, chat("1"))
    target = command.open_target(endpoint.url, "m")
    options = command.read_options(["num_tasks=3"], None)
    results = command.evaluate(target, ["arithmetic-direct", "tools"], tmp_path, options)
    assert [(result.suite, result.num_answers) for result in results] == [("arithmetic-direct", 3), ("tools", 3)]
    assert "arithmetic-direct: 3 answers" in capsys.readouterr().out
    assert (tmp_path / "tools" / "result.json").exists()
