import json

import numpy as np
import pytest

from glm45.corpus.document import writer
from glm45.corpus.quality import (
    SCORERS,
    AssignBuckets,
    Labels,
    Quality,
    Score,
    TrainScorers,
    bucket_thresholds,
    input_line,
    labelled_seeds,
    measure,
    scorer_of,
    train,
)

GOOD = (
    "You should close a file when you have read it, because the system allows only so many open files. For example, a "
    "loop that opens a thousand files and closes none will fail in the middle."
)
BAD = "Fix #1\nFix #2\nBump deps 1.2.3\nRelease 0.9.1\nFix #77\nRevert 1a2b3c\nBump deps 1.2.4\nRelease 0.9.2"

LABELLED = [("good", input_line("prose", GOOD), 1), ("bad", input_line("prose", BAD), 0)]


def test_every_kind_of_text_has_a_scorer_and_every_scorer_seeds_of_both_classes():
    assert [scorer_of(*pair) for pair in (("prose", "en"), ("web", "de"), ("code", "python"), ("code", "c"))] == [
        "prose",
        "multilingual",
        "code-python",
        "code",
    ]
    for scorer in SCORERS:
        assert {label for _, label in labelled_seeds(scorer, Quality())} == {0, 1}


def test_labels_used_for_evaluation_are_never_trained_on():
    labels = Labels()
    for scorer, rules in labels.rules.items():
        for path in rules["evaluation"]:
            assert labels.training_label(scorer, path) is None, (scorer, path)


def test_a_changelog_in_a_tutorial_folder_is_still_a_changelog():
    assert Labels().training_label("prose", "django/docs/topics/db.txt") == 1
    assert Labels().training_label("prose", "django/docs/topics/changelog.txt") == 0


def test_training_twice_gives_the_same_scores_and_the_scorer_tells_good_from_bad(tmp_path):
    seeds = list(labelled_seeds("prose", Quality()))
    scores = []
    for name in ("a", "b"):
        model = train(seeds, tmp_path / f"{name}.bin", Quality(), seed=3)
        scores.append([row["score"] for row in measure(model, LABELLED)["judged"]])
    assert scores[0] == scores[1]
    assert measure(model, LABELLED)["auc"] == 1.0


def test_a_scorer_without_seeds_of_a_class_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="2 good and 0 bad"):
        train([("a b", 1), ("c d", 1)], tmp_path / "x.bin", Quality(), seed=0)


def test_a_users_seed_without_score_is_an_error(tmp_path):
    path = tmp_path / "seeds.jsonl"
    path.write_text('{"scorer": "prose", "text": "x"}\n')
    with pytest.raises(ValueError, match="scorer, text and score"):
        list(labelled_seeds("prose", Quality(seeds=str(path))))


def test_thresholds_part_characters_not_documents():
    """Hand-computed: scores 1..4 with 10, 10, 10 and 70 characters; half of the characters lie below the last."""
    rows = np.array([[1.0, 0, 10], [2.0, 0, 10], [3.0, 0, 10], [4.0, 0, 70]])
    assert bucket_thresholds(rows, ["prose/en"], Quality(quantiles=(0.2, 0.5))) == {"prose": [2.0, 4.0]}


def test_a_large_language_has_thresholds_of_its_own_and_a_small_one_shares():
    rows = np.array([[i / 100, 0, 1] for i in range(100)] + [[0.9, 1, 1]] * 3)
    thresholds = bucket_thresholds(rows, ["code/c", "code/go"], Quality())
    assert set(thresholds) == {"code", "code/c"}


def test_buckets_follow_the_thresholds_and_mathematics_rises_to_the_top(tmp_path, make_document):
    (tmp_path / "t.json").write_text(json.dumps({"prose": [0.2, 0.7]}))
    documents = [
        make_document("low", quality=0.1, path="1"),
        make_document("edge", quality=0.2, path="2"),
        make_document("high", quality=0.8, path="3"),
        make_document("theorem", quality=0.3, mathematics=0.95, path="4"),
        make_document("bad theorem", quality=0.1, mathematics=0.95, path="5"),
        make_document("made", kind="reasoning", path="6"),
    ]
    kept = list(AssignBuckets(tmp_path / "t.json", Quality(), tmp_path / "drops").run(documents))
    assert [(d.text, d.metadata["bucket"]) for d in kept] == [
        ("edge", "medium"),
        ("high", "high"),
        ("theorem", "high"),
        ("made", "medium"),
    ]
    assert "lowest bucket of prose" in (tmp_path / "drops" / "00000.json").read_text()


def test_scorers_are_trained_from_a_corpus_and_applied(tmp_path, make_document):
    documents = [make_document(GOOD, path=str(i), package="p") for i in range(3)]
    documents += [make_document("```\ncode\n```\n" + GOOD, kind="web", path="c", has_code=True)]
    list(writer(tmp_path / "documents").run(documents))
    TrainScorers(tmp_path / "documents", 1, Quality(examples_shown=300), tmp_path / "fit", seed=0).run()
    assert {path.stem for path in (tmp_path / "fit").glob("*.json")} == set(SCORERS)
    scored = list(Score(tmp_path / "fit", 0.5).run(documents))
    assert all(0 <= d.metadata["quality"] <= 1 for d in scored)
    assert scored[-1].metadata["code_related"] is True


def test_quantiles_must_fit_the_buckets():
    with pytest.raises(ValueError, match="need 2 rising numbers"):
        Quality(quantiles=(0.5,))


@pytest.mark.parametrize("name", ["tier-2", "2", "a.b", "heldout", ""])
def test_bucket_names_that_cannot_be_told_from_the_numbers_of_files_are_refused(name):
    with pytest.raises(ValueError, match="buckets"):
        Quality(buckets=("low", name, "high"))
