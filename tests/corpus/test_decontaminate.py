import json

import pytest

from glm45.corpus.decontaminate import Decontaminate, Decontamination, evaluation_files, evaluation_items

QUESTION = "A farmer has seventeen sheep and all but nine of them run away over the hill, how many are left"


@pytest.fixture
def step(tmp_path):
    items = [{"question": QUESTION, "choices": ["nine", {"text": "What is the capital city of the state of France"}]}]
    path = tmp_path / "exam.jsonl"
    path.write_text("".join(json.dumps(item) + "\n" for item in items))
    return Decontaminate(Decontamination(files=(str(path),)), tmp_path / "drops")


def test_a_document_with_an_items_ngram_goes_whatever_its_case_and_punctuation(step, make_document):
    text = "Riddles. A FARMER has seventeen sheep; and all but nine of them run away -- over there."
    assert step.filter(make_document(text)) == (False, "contaminated: exam.jsonl")


def test_twelve_words_in_common_are_not_thirteen(step, make_document):
    shared = " ".join(QUESTION.split()[:12])
    assert step.filter(make_document(f"{shared} quickly")) is True


def test_short_items_match_whole_and_very_short_ones_never(step, make_document):
    assert step.filter(make_document("I asked: what is the capital city of the state of France?"))[0] is False
    assert step.filter(make_document("nine")) is True


def test_the_drop_log_shows_what_was_removed(step, tmp_path, make_document):
    kept = list(step.run([make_document(QUESTION), make_document("something else entirely")]))
    assert len(kept) == 1
    assert "farmer" in (tmp_path / "drops" / "00000.json").read_text()


def test_a_missing_evaluation_file_is_an_error():
    with pytest.raises(ValueError, match="nowhere"):
        evaluation_files(("/nowhere/*.jsonl",))


def test_a_line_of_an_evaluation_file_that_is_no_json_is_named(tmp_path):
    path = tmp_path / "exam.jsonl"
    path.write_text('{"question": "one line\u2028and no more"}\n\n{"question": ')
    with pytest.raises(ValueError, match=r"exam\.jsonl, line 3: not JSON"):
        list(evaluation_items(path))


@pytest.mark.parametrize("where", ["content", "arguments"])
def test_a_conversation_is_compared_by_its_words_and_not_by_its_json(step, make_document, where):
    question = QUESTION.replace(" ", "\n")
    call = {"function": {"name": "ask", "arguments": json.dumps({"text": question})}}
    message = {"content": question} if where == "content" else {"content": None, "tool_calls": [call]}
    messages = [{"role": "assistant"} | message]
    text = json.dumps(messages)
    assert step.filter(make_document(text, kind="chat", messages=messages)) == (False, "contaminated: exam.jsonl")
