"""lm-eval, through our adapter or its own client, gives on our server what we give on the model itself."""

import json

import pytest

from glm45.evaluation.likelihood import run_choices
from glm45.evaluation.suites import SuiteOptions, build_suite
from glm45.evaluation.targets import LocalTarget

lm_eval = pytest.importorskip("lm_eval", reason="needs glm45[eval]")
pytestmark = pytest.mark.slow

STORY = "The quick brown fox jumps over the"


@pytest.fixture
def task_of(tmp_path, monkeypatch):
    """Return a function that makes an lm-eval task of ours from rows."""
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf"))
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")

    def make(rows, **config):
        path = tmp_path / "rows.json"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = {"data_files": {"test": str(path)}, "cache_dir": str(tmp_path / "cache")}
        shape = {"task": "ours", "dataset_path": "json", "dataset_kwargs": files, "test_split": "test"}
        return ConfigurableTask(config={**shape, **config})

    return make


def measure(model, task):
    return lm_eval.simple_evaluate(model=model, tasks=[task], bootstrap_iters=0)["results"]["ours"]


def test_multiple_choice_has_the_same_accuracy(checkpoint, served, task_of, tmp_path):
    from glm45.evaluation.lm_eval_adapter import Glm45Server

    suite = build_suite("base", SuiteOptions(num_tasks=8))
    target = LocalTarget.load(checkpoint)
    try:
        ours = run_choices(target, suite, tmp_path / "ours").metrics["score"].mean
    finally:
        target.close()
    rows = [
        {"context": task.messages[0]["content"], "choices": task.metadata["choices"], "right": task.answer}
        for task in suite.tasks
    ]
    task = task_of(
        rows,
        output_type="multiple_choice",
        doc_to_text="{{context}}",
        doc_to_choice="choices",
        doc_to_target="right",
        target_delimiter="",
        metric_list=[{"metric": "acc"}],
    )
    assert measure(Glm45Server(served), task)["acc,none"] == pytest.approx(ours)
    assert 0 < ours < 1


def test_greedy_continuations_are_known_as_such(served):
    from lm_eval.api.instance import Instance

    from glm45.evaluation.lm_eval_adapter import Glm45Server

    server = Glm45Server(served)
    until = Instance("generate_until", {}, (STORY, {"until": ["\n\n"], "max_gen_toks": 3}), 0)
    (text,) = server.generate_until([until])
    pairs = [Instance("loglikelihood", {}, (STORY, each), i) for i, each in enumerate((text, " zebra"))]
    (_, is_greedy), (value, other) = server.loglikelihood(pairs)
    assert is_greedy
    assert not other
    assert value < 0
    with pytest.raises(NotImplementedError, match="glm45 eval MODEL --data"):
        server.loglikelihood_rolling([until])


def test_lm_eval_s_own_client_generates_from_our_server(served):
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    from glm45.evaluation.lm_eval_adapter import Glm45Server

    client = LocalCompletionsAPI(
        base_url=f"{served}/v1/completions", model="tiny", tokenizer_backend=None, tokenized_requests=False
    )
    until = Instance("generate_until", {}, (STORY, {"until": ["\n\n"], "max_gen_toks": 4}), 0)
    theirs, ours = (model.generate_until([until], disable_tqdm=True) for model in (client, Glm45Server(served)))
    assert theirs == ours
    assert theirs[0]
