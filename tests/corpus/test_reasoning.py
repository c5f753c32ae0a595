import json

import httpx
import pytest

from glm45.corpus.reasoning import arithmetic_documents, ask_scores, teach


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
    assert records == [{"text": "2+2?\n\nSo.\n\nAnswer: 4\n", "prompt": "2+2?", "answer": "4"}]


def test_scores_are_read_from_an_endpoint_and_nonsense_is_an_error():
    assert ask_scores(["a", "b"], "How much?", url="http://t", model="m", client=client(["75"])) == [0.75, 0.75]
    with pytest.raises(ValueError, match="a number"):
        ask_scores(["a"], "How much?", url="http://t", model="m", client=client(["plenty"]))


def test_an_unreachable_teacher_is_a_clear_error():
    def refuse(request):
        raise httpx.ConnectError("refused")

    with pytest.raises(OSError, match=r"http://t.*refused"):
        ask_scores(["a"], "?", url="http://t", model="m", client=httpx.Client(transport=httpx.MockTransport(refuse)))
