"""Endpoints are asked patiently, refuse plainly, and give what a model in this process gives."""

import asyncio
import shutil
import time

import pytest

from glm45.environments.protocol import Task, user
from glm45.evaluation.endpoint import HttpTarget, retry_after
from glm45.evaluation.runner import Suite, SuiteSettings, run_suite
from glm45.evaluation.targets import LocalTarget, Sampling, num_shared

TASK = Task(task_id="t", verifier="mathematics", messages=[user("2+2?")], answer="4", thinking=False)


def ask(target, task=TASK):
    return asyncio.run(target.answer(task, Sampling(), seed=1))


def test_a_busy_server_is_asked_again_after_the_pause_it_names(endpoint, chat):
    answers = [(429, {"retry-after": "0.2"}, "slow down"), (503, {}, "loading"), (200, {}, chat("4"))]
    endpoint.script = lambda path, body: answers[len(endpoint.asked) - 1]
    target = HttpTarget(endpoint.url, "m", first_wait_s=0.01)
    started = time.monotonic()
    assert ask(target).message["content"] == "4"
    assert time.monotonic() - started >= 0.2
    assert (len(endpoint.asked), target.num_retries) == (3, 2)


def test_pauses_double_and_end(endpoint):
    endpoint.script = lambda path, body: (503, {}, "loading the model")
    target = HttpTarget(endpoint.url, "m", first_wait_s=0.02, attempts=4)
    started = time.monotonic()
    with pytest.raises(OSError, match=r"answered 503: loading the model, after 4 attempts.*run it again"):
        ask(target)
    assert time.monotonic() - started >= 0.02 + 0.04 + 0.08
    assert len(endpoint.asked) == 4


def test_a_server_that_wants_an_hour_is_given_up_at_once(endpoint):
    endpoint.script = lambda path, body: (429, {"retry-after": "3600"}, "quota")
    with pytest.raises(OSError, match="asked for a pause of 3600 s, after 1 attempts"):
        ask(HttpTarget(endpoint.url, "m"))


def test_nobody_at_the_address_is_told_as_such():
    with pytest.raises(OSError, match="does not answer: ConnectError"):
        ask(HttpTarget("http://127.0.0.1:9", "m", attempts=2, first_wait_s=0.01))


@pytest.mark.parametrize(
    ("answer", "error", "words"),
    [
        ((401, {}, "no key"), OSError, "refused /chat/completions, 401: no key"),
        ((400, {}, "unknown argument chat_template_kwargs"), OSError, "--no-extensions"),
        ((200, {}, "<html>"), ValueError, "did not answer in OpenAI's form: <html>"),
        ((200, {}, {"choices": []}), ValueError, "did not answer in OpenAI's form"),
        ((200, {}, {"choices": [None]}), ValueError, "did not answer in OpenAI's form"),
    ],
)
def test_what_another_attempt_would_meet_too_is_not_repeated(endpoint, answer, error, words):
    endpoint.script = lambda path, body: answer
    with pytest.raises(error, match=words):
        ask(HttpTarget(endpoint.url, "m"))
    assert len(endpoint.asked) == 1


def test_extensions_can_be_left_out_and_the_first_listed_model_is_asked(endpoint, chat):
    endpoint.script = lambda path, body: (200, {}, {"data": [{"id": "first"}]} if body is None else chat("4"))
    ask(HttpTarget(endpoint.url + "/v1/", extensions=False))
    ask(HttpTarget(endpoint.url))
    plain, extended = (body for path, body in endpoint.asked if body is not None)
    assert plain["model"] == "first"
    assert "chat_template_kwargs" not in plain
    assert extended["chat_template_kwargs"] == {"enable_thinking": False}


def test_retry_after_may_be_a_date_and_nonsense_is_ignored():
    assert retry_after({"retry-after": "Fri, 31 Dec 1999 23:59:59 GMT"}) == 0
    assert retry_after({"retry-after": "Fri, 31 Dec 2099 23:59:59 GMT"}) > 0
    assert retry_after({"retry-after": "soon"}) is None
    assert retry_after({}) is None


def test_an_evaluation_that_an_endpoint_broke_off_goes_on_with_what_is_missing(endpoint, chat, tmp_path):
    tasks = [Task(task_id=str(i), verifier="mathematics", messages=[user(f"{i}?")], answer=str(i)) for i in range(6)]
    suite = Suite("sums", tasks, SuiteSettings())
    down = (403, {}, "your credit has run out")
    echo = lambda body: chat(body["messages"][0]["content"].rstrip("?"))  # noqa: E731
    endpoint.script = lambda path, body: (200, {}, echo(body)) if len(endpoint.asked) <= 4 else down
    target = HttpTarget(endpoint.url, "m", concurrency=1)
    with pytest.raises(OSError, match="your credit has run out"):
        run_suite(target, suite, tmp_path)
    endpoint.script = lambda path, body: (200, {}, echo(body))
    endpoint.asked.clear()
    result = run_suite(target, suite, tmp_path)
    assert len(endpoint.asked) == 2
    assert result.metrics["score"].mean == 1


def test_likelihoods_are_the_echoed_prompt_s_and_refused_where_there_are_none(endpoint):
    def completion(path, body):
        tokens = ["Q: a", "\nA:", " y", "es", "!"] if "yes" in body["prompt"] else ["Q: a\nA:", " no", "."]
        offsets = [sum(map(len, tokens[:i])) for i in range(len(tokens))]
        values = [None, -1.0, -2.0, -4.0, -99.0] if "yes" in body["prompt"] else [None, -3.0, -99.0]
        scored = {"tokens": tokens, "text_offset": offsets, "token_logprobs": values}
        return 200, {}, {"choices": [{"text": body["prompt"], "logprobs": scored}]}

    endpoint.script = completion
    target = HttpTarget(endpoint.url, "m")
    assert asyncio.run(target.loglikelihoods("Q: a\nA:", [" yes", " no"])) == [-6.0, -3.0]
    for answer in ({"choices": [{"text": " no", "logprobs": None}]}, {"choices": [{"text": " no"}]}):
        endpoint.script = lambda path, body, answer=answer: (200, {}, answer)
        with pytest.raises(ValueError, match="does not give the log-probabilities of a prompt"):
            asyncio.run(target.loglikelihoods("Q: a\nA:", [" yes"]))
    with pytest.raises(ValueError, match="the context is empty"):
        asyncio.run(target.loglikelihoods("", ["a"]))


def test_a_context_counts_to_where_its_tokens_end():
    assert num_shared([1, 2, 3], [1, 2, 3, 4]) == 3
    assert num_shared([1, 2, 3], [1, 2, 9]) == 2
    assert num_shared([5], [6, 7]) == 1
    with pytest.raises(ValueError, match="the context is empty"):
        num_shared([], [1])


@pytest.mark.slow
def test_the_project_s_server_gives_what_the_model_in_this_process_gives(checkpoint, served):
    import torch

    from glm45.model import hub
    from glm45.text.tokenizer import Tokenizer

    local, remote = LocalTarget.load(checkpoint), HttpTarget(served)
    context, choices = "Q: Alice has the red ball. Which ball has Alice?\nA:", [" red", " green", " lazy fox"]
    try:
        ours = asyncio.run(local.loglikelihoods(context, choices))
        theirs = asyncio.run(remote.loglikelihoods(context, choices))
        same = [asyncio.run(each.answer(TASK, Sampling(max_tokens=8), seed=1)) for each in (local, remote)]
    finally:
        local.close()
    assert theirs == pytest.approx(ours, abs=1e-4)
    assert same[0].message["content"] == same[1].message["content"]
    tokenizer, model = Tokenizer.load(checkpoint), hub.load(checkpoint).eval()
    start = len(tokenizer.encode(context))
    for choice, value in zip(choices, ours, strict=True):
        ids = torch.tensor([tokenizer.encode(context + choice)])
        with torch.no_grad():
            logprobs = model(ids).logits_BTV[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0]
        assert value == pytest.approx(logprobs[start - 1 :].sum().item(), abs=1e-3)


def test_a_prompt_beyond_the_context_is_a_wrong_answer_and_the_rest_is_asked(endpoint, chat, tmp_path):
    def script(path, body):
        if "much" in str(body):
            return 400, {}, {"error": {"message": "too long", "code": "context_length_exceeded"}}
        return 200, {}, chat("4")

    endpoint.script = script
    long = Task(task_id="l", verifier="mathematics", messages=[user("so much")], answer="4", thinking=False)
    suite = Suite("two", [TASK, long], SuiteSettings())
    result = run_suite(HttpTarget(endpoint.url, "m"), suite, tmp_path)
    assert (result.metrics["score"].mean, result.metrics["unanswered"].mean) == (0.5, 0.5)
    assert "context_length_exceeded" in (tmp_path / "transcripts.jsonl").read_text()
    num_asked = len(endpoint.asked)
    run_suite(HttpTarget(endpoint.url, "m"), suite, tmp_path)
    assert len(endpoint.asked) == num_asked + 1, "what was not answered is asked again"


def test_a_model_in_this_process_counts_prompts_beyond_its_context(checkpoint, tmp_path):
    target = LocalTarget.load(checkpoint)
    long = Task(task_id="l", verifier="mathematics", messages=[user("fox " * 9000)], answer="4", thinking=False)
    settings = SuiteSettings(sampling=Sampling(max_tokens=2))
    result = run_suite(target, Suite("two", [TASK, long], settings), tmp_path / "asked")
    target.close()
    assert result.metrics["unanswered"].mean == 0.5
    assert "the context 2048" in (tmp_path / "asked/transcripts.jsonl").read_text()


def test_answers_are_kept_under_the_weights_they_came_from(checkpoint, tmp_path):
    from glm45.evaluation.command import checkpoint_folder
    from glm45.files import fingerprint

    folder = tmp_path / "model"
    shutil.copytree(checkpoint_folder(str(checkpoint)), folder)
    assert fingerprint(folder) == fingerprint(checkpoint)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    assert fingerprint(folder) != fingerprint(checkpoint)


def test_an_endpoint_is_named_by_the_model_it_lists(endpoint):
    from glm45.evaluation.command import open_target

    endpoint.script = lambda path, body: (200, {}, {"data": [{"id": "first"}]})
    assert open_target(endpoint.url).name == f"{endpoint.url} first"


def test_models_have_folders_of_their_own():
    from glm45.evaluation.command import default_folder

    names = ["runs/demo", "runs/demo2", "http://127.0.0.1:8000/v1", None]
    assert [str(default_folder(name)) for name in names] == [
        "evaluation/runs-demo",
        "evaluation/runs-demo2",
        "evaluation/http-127.0.0.1-8000-v1",
        "evaluation",
    ]


def test_needles_fill_the_context_that_a_model_was_trained_for(checkpoint):
    from glm45.environments.tokens import prompt_ids
    from glm45.evaluation.suites import SuiteOptions, build_suite, fitted
    from glm45.text.tokenizer import Tokenizer

    target = LocalTarget.load(checkpoint)
    options = SuiteOptions(num_tasks=3, max_tokens=32)
    tasks = build_suite("long", fitted(options, target, 1024)).tasks
    target.close()
    lengths = [len(prompt_ids(task, Tokenizer.load(checkpoint))) for task in tasks]
    assert [round(length / 1024, 1) for length in lengths] == pytest.approx([0.25, 0.5, 1.0], abs=0.15)
    assert max(lengths) + 32 <= 1024
