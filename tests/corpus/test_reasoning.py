import json

import httpx
import pytest

from glm45.corpus.reasoning import UnreadableScoreError, arithmetic_documents, ask_score, read_score, teach


def test_arithmetic_documents_are_right_and_never_repeat_a_prompt():
    documents = list(arithmetic_documents("arithmetic", seed=3, count=500))
    prompts = [document.metadata["prompt"] for document in documents]
    assert len(prompts) == len(set(prompts)) > 400
    for document in documents[:50]:
        expression = document.metadata["prompt"].removesuffix("=?")
        assert document.text.split()[-1] == str(eval(expression))  # an independent calculator


def client(replies):
    """A stand-in for an OpenAI-style endpoint that answers every request with `replies`."""

    def answer(request):
        count = json.loads(request.content)["n"]
        return httpx.Response(200, json={"choices": [{"message": {"content": text}} for text in replies[:count]]})

    return httpx.Client(transport=httpx.MockTransport(answer))


def test_only_a_teachers_verified_answers_are_kept():
    replies = [
        "Two and two. Answer: 5",
        "I do not know",
        "First 2, then 2 more, that makes 4. Answer: 4",
        "So. Answer: 4",
    ]
    tasks = [{"prompt": "2+2?", "answer": "4"}]
    records, counts = teach(tasks, lambda a, b: a == b, url="http://t", model="m", client=client(replies))
    assert counts == {"accepted": 2, "wrong": 1, "no answer": 1}
    assert records == [{"text": "2+2?\n\nSo.\n\nAnswer: 4\n", "prompt": "2+2?", "answer": "4", "kind": "reasoning"}]


def test_scores_are_read_from_an_endpoint():
    assert ask_score("a", "How much?", url="http://t", model="m", client=client(["75"])) == 0.75


@pytest.mark.parametrize("reply", ["80", " 80.0%\n", "80/100", "80 out of 100.", "I'd say 80. It is good.", "**80**"])
def test_the_only_number_of_a_reply_is_its_score(reply):
    assert read_score(reply) == 0.8


@pytest.mark.parametrize(
    "reply", ["plenty", "", "Between 10 and 20", "8/10", "800", "-8", "1,000", "I can't: rule 7, 8"]
)
def test_a_reply_that_is_not_one_number_is_a_readable_error(reply):
    with pytest.raises(UnreadableScoreError, match="not one number from 0 to 100"):
        read_score(reply)


def test_an_unreachable_teacher_is_a_clear_error():
    def refuse(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(OSError, match=r"http://t.*refused"):
        ask_score("a", "?", url="http://t", model="m", client=httpx.Client(transport=httpx.MockTransport(refuse)))


def test_an_endpoint_of_another_kind_is_a_clear_error():
    answer = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with pytest.raises(OSError, match="http://t did not answer as an OpenAI-style endpoint: '<html>'"):
        ask_score("a", "?", url="http://t", model="m", client=httpx.Client(transport=answer))
