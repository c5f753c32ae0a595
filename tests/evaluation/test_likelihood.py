"""Multiple choice by likelihood: the families are right, the metrics are the field's, nothing is scored twice."""

import pytest

from glm45.data.splits import is_held_out
from glm45.evaluation.families import FAMILIES, NUM_SHOTS, family_tasks
from glm45.evaluation.likelihood import choice_task, run_choices, task_metrics
from glm45.evaluation.runner import TRANSCRIPTS, Suite, SuiteSettings
from glm45.evaluation.suites import SuiteOptions, build_suite


class Scorer:
    """A target that likes what a function says."""

    def __init__(self, likes):
        self.name, self.likes, self.num_asked = "scorer", likes, 0

    async def loglikelihoods(self, context, continuations):
        self.num_asked += 1
        return [self.likes(context, each) for each in continuations]


def solve(question):
    """The answer, by another way than the generator's."""
    head = question.split()[0]
    if question.endswith(" is"):
        return str(eval(question.removesuffix(" is")))
    if question.startswith("Close all brackets: "):
        text, closed = question.partition(": ")[2], ""
        while (rest := text.replace(" ", "")) and any(pair in rest for pair in ("()", "[]", "{}")):
            text = rest.replace("()", "").replace("[]", "").replace("{}", "")
        for bracket in reversed(text.replace(" ", "")):
            closed += {"(": ")", "[": "]", "{": "}"}[bracket] + " "
        return closed.strip()
    if question.startswith("Do these instructions"):
        position, direction = 0j, 1j
        for sentence in question.partition("? ")[2].split("."):
            words = sentence.split()
            if words[:1] == ["Turn"]:
                direction = -direction
            elif words:
                position += int(words[1]) * direction
        return "Yes" if position == 0 else "No"
    if head == "I":
        from glm45.evaluation.families import FRUITS, NUMBERS

        wanted_fruit = "fruits" in question.rpartition("How many")[2]
        listed = question.partition("have ")[2].partition(".")[0].split(", ")
        counts = [(NUMBERS.index(each.split()[0]), each.split()[1]) for each in listed]
        is_fruit = lambda name: name in FRUITS or name[:-1] in FRUITS  # noqa: E731
        return str(sum(number for number, name in counts if is_fruit(name) == wanted_fruit))
    if "Which ball" in question:
        start, *swaps, asked = question.split(". ")
        holds = {part.split()[0]: part.split()[3] for part in start.split(", ")}
        for swap in swaps:
            a, _, b, _ = swap.split()
            holds[a], holds[b] = holds[b], holds[a]
        return holds[asked.rstrip("?").split()[-1]]
    if "older" in question:
        *facts, asked = question.split(". ")
        pairs = [(fact.split()[0], fact.split()[-1]) for fact in facts]
        rank = {
            name: sum(name == young for _, young in pairs) - sum(name == old for old, _ in pairs)
            for pair in pairs
            for name in pair
        }
        wanted = {"oldest": -1, "middle": 0, "youngest": 1}[asked.rstrip("?").split()[-1]]
        return next(name for name, value in rank.items() if value == wanted)
    if question.startswith("Today"):
        from datetime import datetime, timedelta

        today = datetime.strptime(question.split()[2].rstrip("."), "%m/%d/%Y")
        days = {"tomorrow": 1, "today": 7, "ago": -10, "yesterday": -1}[question.rstrip("?").split()[-1]]
        return (today + timedelta(days=days)).strftime("%m/%d/%Y")
    lies = question.count(" lies.")
    return "Yes" if lies % 2 == 0 else "No"


@pytest.mark.parametrize("family", FAMILIES)
def test_right_choices_are_right_by_another_way_of_solving(family):
    for task in family_tasks(family, 0, 40):
        *shots, question = task.messages[0]["content"].split("\n\n")
        assert len(shots) == NUM_SHOTS
        for shot in shots:
            asked, _, answer = shot.removeprefix("Q: ").partition("\nA: ")
            assert solve(asked) == answer
            assert not is_held_out(asked)
        asked = question.removeprefix("Q: ").removesuffix("\nA:")
        assert is_held_out(asked)
        assert task.metadata["choices"][task.answer] == f" {solve(asked)}"


def test_a_scorer_that_knows_scores_one_one_that_errs_zero_and_one_that_does_not_care_zero(tmp_path):
    suite = build_suite("base", SuiteOptions(num_tasks=24))
    right = {task.messages[0]["content"]: task.metadata["choices"][task.answer] for task in suite.tasks}
    knows = run_choices(Scorer(lambda c, choice: -1.0 if choice == right[c] else -9.0), suite, tmp_path / "a")
    errs = run_choices(Scorer(lambda c, choice: -9.0 if choice == right[c] else -1.0), suite, tmp_path / "b")
    flat = run_choices(Scorer(lambda c, choice: -2.0), suite, tmp_path / "c")
    assert (knows.metrics["score"].mean, errs.metrics["score"].mean, flat.metrics["score"].mean) == (1, 0, 0)
    assert knows.metrics["part:navigate"].mean == 1
    assert 0.25 < knows.metrics["chance"].mean < 0.5


def test_long_choices_are_compared_per_character_too():
    task = choice_task("t", "Q", [" no", " certainly"], 1, "f")
    metrics = task_metrics(task, [-3.0, -5.0])
    assert (metrics["score"], metrics["score_per_character"], metrics["chance"]) == (0.0, 1.0, 0.5)
    with pytest.raises(ValueError, match="two or more different"):
        choice_task("t", "Q", [" a", " a"], 0, "f")


def test_an_interrupted_suite_scores_only_what_is_missing(tmp_path):
    tasks = [choice_task(str(i), f"Q{i}", [" a", " b"], 0, "f") for i in range(5)]
    suite = Suite("choices", tasks, SuiteSettings())
    run_choices(Scorer(lambda *_: -1.0), suite, tmp_path)
    file = tmp_path / TRANSCRIPTS
    file.write_text("".join(line + "\n" for line in file.read_text().splitlines()[:3]))
    again = Scorer(lambda _, choice: -1.0 if choice == " a" else -2.0)
    result = run_choices(again, suite, tmp_path)
    assert again.num_asked == 2
    assert result.metrics["score"].mean == pytest.approx(2 / 5), "what was there is kept, ties are not right"


def test_held_out_perplexity_by_source_and_position(checkpoint, tmp_path):
    """A model whose logits are all equal needs the logarithm of the vocabulary's size for every token."""
    import json
    import math

    import torch

    from glm45.corpus.tokenize import tokenize_folder
    from glm45.data.folder import update_manifest
    from glm45.evaluation.command import HeldOut, evaluate
    from glm45.evaluation.suites import SuiteOptions
    from glm45.evaluation.targets import LocalTarget
    from glm45.model import hub
    from glm45.text.tokenizer import Tokenizer

    documents, data, flat = (tmp_path / name for name in ("documents", "data", "flat"))
    documents.mkdir()
    for name, length in (("short.heldout", 20), ("long.heldout", 400), ("long.high", 20)):
        lines = [json.dumps({"text": "fox dog " * length, "id": str(n), "metadata": {}}) + "\n" for n in range(4)]
        (documents / f"{name}.jsonl").write_text("".join(lines))
    update_manifest(data, tokenize_folder(documents, data, vocab_size=300, workers=1, tokenizer=checkpoint))
    model = hub.load(checkpoint)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    hub.save(model, flat)
    Tokenizer.load(checkpoint).save(flat)
    target = LocalTarget.load(flat)
    (result,) = evaluate(
        target, ["perplexity"], tmp_path / "out", SuiteOptions(), held_out=HeldOut(data=data, length=256)
    )
    target.close()
    assert all(nats.mean == pytest.approx(math.log(model.config.vocab_size), abs=1e-4) for nats in result.nats.values())
    positions = [f"position {first} to {first + 64}" for first in (0, 64, 128, 192)]
    assert set(result.nats) == {"short", "long", *positions}
    assert result.nats[positions[0]].count > result.nats[positions[3]].count, "short documents have no late positions"
    stored = json.loads((tmp_path / "out/perplexity/result.json").read_text())
    assert stored["nats"]["short"]["mean"] == result.nats["short"].mean
