"""The report holds what the run's folders hold, and says what the numbers do not show."""

import json
import re

import pytest

from glm45.report.reinforcement import _interval
from glm45.report.run import LIMITS, write_report
from glm45.report.training import thin


@pytest.fixture
def run(tmp_path):
    """A run folder with one step of each kind, written by hand."""

    def step(name, needs=(), finished=0):
        folder = tmp_path / "steps" / name
        folder.mkdir(parents=True)
        record = {
            "identity": "i",
            "function": "m:f",
            "config": {},
            "tokens": {need: f"token-{need}" for need in needs},
            "token": f"token-{name}",
            "finished": finished,
            "wall_seconds": 12.5,
            "cpu_seconds": 20.0,
            "peak_memory_bytes": 5e8,
        }
        (folder / "step.json").write_text(json.dumps(record))
        return folder

    base, rl = step("base", ["data"], 1), step("tool-rl", ["base"], 2)
    rows = [
        {"step": n, "tokens": 100 * n, "stage": "general" if n < 3 else "code", "loss": 5 - n, "next_token_loss": 4 - n,
         "learning_rate": 0.1}
        for n in range(1, 5)
    ]  # fmt: skip
    events = [
        {"event": "evaluation", "step": 4, "docs": 2.5, "mean": 2.5},
        {"event": "alarm", "step": 4, "message": "MoE layer 1: 3 experts got no token"},
        {"event": "health", "step": 1, "max_violation": [0.5, -1.0], "attention_logits": [3.0, 2.0]},
        *({"event": "health", "step": n, "max_violation": [0.5, None], "attention_logits": [3.0, 2.0]} for n in (2, 4)),
    ]
    (base / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows + events))
    (rl / "policy").mkdir()
    (rl / "config.json").write_text('{"evaluation": {"num_tasks": 64}}')
    (rl / "held_out.jsonl").write_text("{}\n" * 50)
    mixture = {"weights": {"docs.*": 3, "code.*": 1}, "repeats": {"docs.high": 2.0}}
    stage = {"name": "general", "tokens": 200, "sequence_length": 8, "batch_tokens": 16, "rope_theta": 1e4}
    stages = [{**stage, "mtp_weight": 0.3, "packing": "concatenate", "mixture": mixture}]
    (base / "config.json").write_text(json.dumps({"stages": stages, "model": {"num_nextn_predict_layers": 1}}))
    data = step("data", finished=0)
    sizes = {"docs.high": 100, "docs.low": 100, "code.low": 50}
    manifest = {
        "datasets": {name: {"tokens": size} for name, size in sizes.items()},
        "recipe": {"sources": [{"name": "docs", "reader": "sdists", "license": "unknown"}]},
        "units": [{"source": "docs", "package": "click", "version": "8.2", "license": "BSD-3-Clause"}],
        "downloads": {"docs": {"click": []}},
    }
    (data / "manifest.json").write_text(json.dumps(manifest))
    (tmp_path / "run.json").write_text('{"seed": 7}')
    rewards = [{"step": n, "reward": 0.1 * n, "response_length": 20.0, "held_out_greedy": 0.2} for n in (1, 2)]
    (rl / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rewards))
    evaluation = step("evaluation", ["base", "tool-rl"], 3)
    for model, mean in (("base", 0.25), ("tool-rl", 0.75)):
        folder = evaluation / model / "tools"
        folder.mkdir(parents=True)
        score = {"mean": mean, "low": mean - 0.1, "high": mean + 0.1, "count": 8}
        (folder / "result.json").write_text(json.dumps({"metrics": {"score": score}}))
        answer = {"content": f"answer of {model}", "reasoning_content": "because"}
        row = {"task_id": "t", "prompt": [{"role": "user", "content": "a question?"}], "message": answer}
        (folder / "transcripts.jsonl").write_text(json.dumps({**row, "finish_reason": "stop"}) + "\n")
    return tmp_path


def test_the_page_holds_what_the_run_holds(run):
    page = write_report(run).read_text()
    for text in (
        *("Training: base", "Reinforcement learning: tool-rl", "25.0% [15.0%, 35.0%]", "75.0% [65.0%, 85.0%]"),
        *("answer of base", "answer of tool-rl", "a question?", "because", "3 experts got no token", "token-base"),
        *("docs.* 75%, code.* 25%", "&quot;seed&quot;: 7", "What was made from what"),
        *("docs.high × 2.0", "50.0%", "1.00", "click 8.2 (1 fetched)", "BSD-3-Clause", "MTP layer", "MoE layer 0"),
        *("Loss by stage", "Held-out accuracy", "Expert balance by layer over time", "12.5", "500"),
    ):
        assert text in page, text
    assert all(limit.split(":")[0] in page for limit in LIMITS)
    assert page.index("25.0%") < page.index("75.0%"), "models come in the order of the run"


def test_steps_of_another_configuration_are_named_and_not_shown(run):
    page = write_report(run, stale=["tool-rl", "evaluation"]).read_text()
    assert "Not shown, since made with another configuration or from other inputs: tool-rl, evaluation." in page
    assert "75.0% [65.0%, 85.0%]" not in page
    assert "Reinforcement learning: tool-rl" not in page
    with pytest.raises(FileNotFoundError, match="up to date"):
        write_report(run, stale=["base", "data", "tool-rl", "evaluation"])


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_reads_in_a_browser_in_both_themes(run, browser, scheme):
    """Nothing is loaded or fails, nothing is wider than the window, and text stands out from what is behind it."""
    path = write_report(run)
    page = browser.new_page(color_scheme=scheme, viewport={"width": 1000, "height": 800})
    errors, loaded = [], []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("request", lambda request: loaded.append(request.url))
    page.goto(path.as_uri())
    colours = page.evaluate("[getComputedStyle(document.body).color, getComputedStyle(document.body).backgroundColor]")
    width = page.evaluate("document.documentElement.scrollWidth")
    num_drawings = page.locator("figure svg").count()
    page.close()
    text, behind = (sum(map(float, re.findall(r"[\d.]+", colour)[:3])) / 765 for colour in colours)
    assert (text < 0.3 and behind > 0.9) if scheme == "light" else (text > 0.7 and behind < 0.2)
    assert (errors, loaded) == ([], [path.as_uri()])
    assert width <= 1000
    assert num_drawings >= 8


def test_a_folder_without_steps_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no finished step"):
        write_report(tmp_path)


def test_thinning_keeps_the_mean():
    xs, ys = thin(list(range(1000)), [float(i % 7) for i in range(1000)])
    assert len(xs) <= 400
    assert sum(y * n for y, n in zip(ys, [3] * 333 + [1], strict=True)) == pytest.approx(
        sum(i % 7 for i in range(1000))
    )


def test_held_out_intervals_are_wilsons():
    """6 of 10: 0.3127 to 0.8318, as in the literature's tables; none of 10: 0 to 0.2775."""
    low, high = _interval([0.6, 0.0], 10)
    assert low == pytest.approx([0.3127, 0.0], abs=1e-4)
    assert high == pytest.approx([0.8318, 0.2775], abs=1e-4)
