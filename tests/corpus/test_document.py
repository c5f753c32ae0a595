import json

from datatrove.pipeline.writers import JsonlWriter  # noqa: F401 - imported first: datatrove's import is slow

from glm45.corpus.document import (
    DropLog,
    Tally,
    TaskReader,
    Words,
    merge_drops,
    merge_tallies,
    split_special,
    writer,
)


def test_words_are_split_at_spaces_and_han_text_into_characters():
    assert Words().word_tokenize("two words, here") == ["two", "words,", "here"]
    assert Words().word_tokenize("我有 two 猫") == ["我", "有", "two", "猫"]


def test_only_named_special_tokens_are_cut_out_of_a_text():
    pieces = split_special("<|user|>a<|code_middle|>b", ["<|code_middle|>"])
    assert pieces == [("<|user|>a", False), ("<|code_middle|>", True), ("b", False)]
    assert split_special("<|user|>", []) == [("<|user|>", False)]


def test_a_task_without_documents_does_not_shift_the_others(tmp_path, make_document):
    """datatrove's own reader would give task 2's file to task 1."""
    for rank, text in ((0, "first"), (2, "third")):
        list(writer(tmp_path).run([make_document(text)], rank=rank))
    assert [[d.text for d in TaskReader(tmp_path).run(rank=rank)] for rank in range(3)] == [["first"], [], ["third"]]


def test_drops_of_all_tasks_add_up_with_five_examples_of_a_reason(tmp_path, make_document):
    for rank in range(3):
        with DropLog(tmp_path, "too short") as log:
            for index in range(4):
                log.write(make_document("x" * 10, path=f"{rank}-{index}"), rank)
    merged = merge_drops(tmp_path)
    assert merged["too short"]["documents"] == 12
    assert merged["too short"]["characters"] == 120
    assert len(merged["too short"]["examples"]) == 5


def test_a_tally_counts_what_passes(tmp_path, make_document):
    documents = [make_document("abc"), make_document("de"), make_document("f", language="de")]
    assert len(list(Tally(tmp_path).run(documents))) == 3
    rows = merge_tallies(tmp_path)
    assert [(row["language"], row["documents"], row["characters"]) for row in rows] == [("de", 1, 1), ("en", 2, 5)]
    assert json.loads((tmp_path / "00000.json").read_text())
