"""Chat completions, completions and models, as OpenAI's own client sees them; the engine is scripted."""

import dataclasses
import json

import openai
import pytest

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer"}},
            "required": ["city"],
        },
    },
}
CALL = (
    "<think>I need the weather.</think>\nLet me look.\n<tool_call>get_weather\n<arg_key>city</arg_key>\n"
    "<arg_value>Paris</arg_value>\n<arg_key>days</arg_key>\n<arg_value>3</arg_value>\n</tool_call><|observation|>"
)


def ask(oai, text="hi", **more):
    return oai.chat.completions.create(model="tiny", messages=[{"role": "user", "content": text}], **more)


def test_reasoning_and_answer_are_told_apart(oai):
    """The text before `</think>` is reasoning_content, the rest content; the end token is in neither."""
    answer = ask(oai)
    message = answer.choices[0].message
    assert message.content == "The answer is 42."
    assert message.reasoning_content == "Let me think."
    assert answer.choices[0].finish_reason == "stop"


def test_usage_counts_every_token(oai, engine, ids_of):
    """Completion tokens are all sampled ones; reasoning tokens those between the tags; cached ones the engine's."""
    usage = ask(oai).usage
    assert usage.prompt_tokens == len(engine.asked[0].prompt)
    assert usage.completion_tokens == len(ids_of(engine.text))
    assert usage.completion_tokens_details.reasoning_tokens == len(ids_of("Let me think."))
    assert usage.prompt_tokens_details.cached_tokens == 16
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_without_max_tokens_as_much_as_context_and_cache_hold(serve, engine):
    """A context longer than the cache refuses nothing, unless more is asked for."""
    engine.longest_sample = 100
    url = serve().url + "/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client:
        ask(client)
        assert engine.asked[-1].params.max_tokens == 100 - len(engine.asked[-1].prompt)
        ask(client, max_tokens=500)
        assert engine.asked[-1].params.max_tokens == 500  # for the engine to refuse


def test_stream_adds_up_to_the_whole_answer(oai, engine):
    """Deltas joined are the message of the unstreamed answer, with one finish reason and usage at the end."""
    engine.text = CALL
    whole = ask(oai, tools=[WEATHER])
    chunks = list(ask(oai, tools=[WEATHER], stream=True, stream_options={"include_usage": True}))
    choices = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert choices[0].delta.role == "assistant"
    reasoning = "".join(getattr(choice.delta, "reasoning_content", None) or "" for choice in choices)
    content = "".join(choice.delta.content or "" for choice in choices)
    calls = [call for choice in choices for call in choice.delta.tool_calls or []]
    message = whole.choices[0].message
    assert (reasoning, content) == (message.reasoning_content, message.content)
    assert calls[0].function.name == "get_weather"
    assert "".join(call.function.arguments for call in calls) == message.tool_calls[0].function.arguments
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["tool_calls"]
    assert chunks[-1].usage == whole.usage
    assert len(calls) > 4, "arguments come in fragments"


def test_tool_round_trip(oai, engine, tokenizer):
    """A call comes back as OpenAI's client types it; sent back with a result, it renders as GLM's template does."""
    engine.text = CALL
    question = {"role": "user", "content": "weather?"}
    answer = oai.chat.completions.create(model="tiny", messages=[question], tools=[WEATHER])
    choice = answer.choices[0]
    assert choice.finish_reason == "tool_calls"
    call = choice.message.tool_calls[0]
    assert json.loads(call.function.arguments) == {"city": "Paris", "days": 3}
    result = {"role": "tool", "tool_call_id": call.id, "content": "sunny"}
    engine.text = "<think></think>\nIt is sunny.<|user|>"
    said = choice.message.model_dump(exclude_none=True)
    final = oai.chat.completions.create(model="tiny", messages=[question, said, result], tools=[WEATHER])
    assert final.choices[0].message.content == "It is sunny."
    prompt = tokenizer.decode(engine.asked[-1].prompt)
    assert "<arg_value>Paris</arg_value>" in prompt
    assert "<|observation|>\n<tool_response>\nsunny\n</tool_response><|assistant|>" in prompt
    assert "<think>I need the weather.</think>" in prompt, "reasoning since the last user message is kept"


def test_choices_of_n_samples(oai, engine):
    """n samples are n choices, streamed or not, each with its own end."""
    engine.text = lambda prompt, index: f"<think></think>\nsample {index}<|user|>"
    answer = ask(oai, n=3)
    assert [choice.message.content for choice in answer.choices] == ["sample 0", "sample 1", "sample 2"]
    chunks = [chunk.choices[0] for chunk in ask(oai, n=3, stream=True)]
    texts = ["".join(c.delta.content or "" for c in chunks if c.index == i) for i in range(3)]
    assert texts == ["sample 0", "sample 1", "sample 2"]
    assert sorted(c.index for c in chunks if c.finish_reason) == [0, 1, 2]
    assert engine.asked[0].params.n == 3


def test_logprobs_cover_every_sampled_token(oai, engine, ids_of):
    """One entry a token, whose bytes join to what was sampled; minus infinity is -9999, as OpenAI writes it."""
    answer = ask(oai, logprobs=True, top_logprobs=2)
    entries = answer.choices[0].logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode() == engine.text
    assert {entry.logprob for entry in entries} == {-0.5}
    assert entries[0].top_logprobs[1].logprob == -9999.0
    chunks = ask(oai, logprobs=True, stream=True)
    streamed = [entry for chunk in chunks if chunk.choices[0].logprobs for entry in chunk.choices[0].logprobs.content]
    assert [entry.token for entry in streamed] == [entry.token for entry in entries]


def test_parameters_reach_the_engine(oai, engine):
    """What a client sets is what the engine is asked."""
    extra = {"n": None, "logprobs": None, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.1, "min_tokens": 2}
    ask(oai, temperature=0.3, top_p=0.9, seed=5, stop=["x", "y"], max_tokens=9, logit_bias={"3": 4}, extra_body=extra)
    params = engine.asked[0].params
    assert (params.temperature, params.top_p, params.seed, params.stop) == (0.3, 0.9, 5, ("x", "y"))
    assert (params.max_tokens, params.logit_bias, params.min_tokens) == (9, {3: 4.0}, 2)
    assert (params.top_k, params.min_p, params.repetition_penalty) == (7, 0.1, 1.1)


def test_stop_string_is_cut_and_split_tokens_do_not_matter(oai, engine):
    """Content ends before the stop string, even where it ends inside a token."""
    assert ask(oai, stop="er is").choices[0].message.content == "The answ"
    chunks = ask(oai, stop="er is", stream=True)
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == "The answ"


def test_truncated_answer_says_length(oai, engine):
    """A call cut short by max_tokens has finish reason length, and keeps what was written of its arguments."""
    engine.text = CALL
    answer = ask(oai, tools=[WEATHER], max_tokens=30)
    assert answer.choices[0].finish_reason == "length"


def test_tool_choice(oai, engine, tokenizer):
    """none hides the tools and bans calls; required and a name become grammars; one call at most ends at its tag."""
    ask(oai, tools=[WEATHER], tool_choice="none")
    assert engine.asked[-1].params.logit_bias == {tokenizer.special_id("<tool_call>"): float("-inf")}
    assert "get_weather" not in tokenizer.decode(engine.asked[-1].prompt)
    ask(oai, tools=[WEATHER], tool_choice="required")
    assert engine.asked[-1].params.constraint.tools == (WEATHER,)
    other = {"type": "function", "function": {"name": "other"}}
    ask(oai, tools=[WEATHER, other], tool_choice={"type": "function", "function": {"name": "other"}})
    assert engine.asked[-1].params.constraint.tools == (other,)
    ask(oai, tools=[WEATHER], parallel_tool_calls=False)
    assert tokenizer.special_id("</tool_call>") in engine.asked[-1].params.stop_token_ids
    with pytest.raises(openai.BadRequestError, match="not among the tools"):
        ask(oai, tools=[WEATHER], tool_choice={"type": "function", "function": {"name": "no"}})


def test_allowed_tools(oai, engine, tokenizer):
    """The model sees the allowed ones alone; with mode required it must call one of them."""
    other = {"type": "function", "function": {"name": "other"}}

    def choose(mode, name):
        allowed = {"mode": mode, "tools": [{"type": "function", "function": {"name": name}}]}
        ask(oai, tools=[WEATHER, other], tool_choice={"type": "allowed_tools", "allowed_tools": allowed})
        return engine.asked[-1]

    asked = choose("auto", "other")
    assert asked.params.constraint is None
    assert "get_weather" not in tokenizer.decode(asked.prompt)
    assert choose("required", "other").params.constraint.tools == (other,)
    with pytest.raises(openai.BadRequestError, match="names 'no', which is not among the tools"):
        choose("auto", "no")


def test_response_format(oai, engine):
    """json_object and json_schema become grammars."""
    ask(oai, response_format={"type": "json_object"})
    assert engine.asked[-1].params.constraint.json_object
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    ask(oai, response_format={"type": "json_schema", "json_schema": {"name": "x", "schema": schema}})
    assert engine.asked[-1].params.constraint.json_schema == schema


@pytest.mark.parametrize(
    "body, match",
    [
        ({"max_tokens": 5000}, "lower max_tokens"),
        ({"extra_body": {"no_such_field": 1}}, "no_such_field"),
        ({"presence_penalty": 1.0}, "presence_penalty is not offered"),
        ({"top_logprobs": 3}, "needs logprobs"),
        ({"logit_bias": {"x": 1}}, "token ids"),
        ({"logit_bias": {"99999": 1}}, "outside the vocabulary"),
        ({"tool_choice": "required"}, "no tools"),
        ({"temperature": -1}, "temperature"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_wrong_requests_are_errors_that_name_the_field(oai, body, match, stream):
    """A wrong value is a 400 with OpenAI's error object, before any stream begins."""
    with pytest.raises(openai.BadRequestError, match=match) as caught:
        ask(oai, stream=stream, **body)
    assert caught.value.body["type"] == "invalid_request_error"


def test_unknown_model_is_not_found(oai):
    """Another model's name is a 404 with OpenAI's code; models lists the right one."""
    with pytest.raises(openai.NotFoundError) as caught:
        oai.chat.completions.create(model="gpt", messages=[{"role": "user", "content": "hi"}])
    assert caught.value.code == "model_not_found"
    assert [model.id for model in oai.models.list()] == ["tiny"]
    assert oai.models.retrieve("tiny").id == "tiny"


def test_messages_that_cannot_be_rendered_name_their_index(oai):
    """What GLM-4.5 cannot read is refused with the message at fault."""
    image = [{"type": "image_url", "image_url": {"url": "data:"}}]
    with pytest.raises(openai.BadRequestError, match="message 1"):
        oai.chat.completions.create(
            model="tiny", messages=[{"role": "user", "content": "a"}, {"role": "user", "content": image}]
        )


def test_failure_inside_a_stream_is_an_error_event(oai, engine):
    """The engine fails after the stream began: the client raises instead of taking the rest for the answer."""
    engine.fail_after, engine.delay = 3, 0.01
    with pytest.raises(openai.APIError, match="failed"):
        list(ask(oai, stream=True))
    with pytest.raises(openai.InternalServerError):
        ask(oai)


def test_completions_echo_logprobs_and_several_prompts(oai, engine, tokenizer):
    """Prompts as text or ids; echo with logprobs gives the prompt's, the first of them unknown."""
    engine.text = " a dog"
    answer = oai.completions.create(model="tiny", prompt=["The quick", "Hello"], max_tokens=20)
    assert [choice.text for choice in answer.choices] == [" a dog", " a dog"]
    ids = tokenizer.encode("The quick")
    scored = oai.completions.create(model="tiny", prompt=ids, max_tokens=0, echo=True, logprobs=1)
    assert scored.choices[0].text == "The quick"
    assert scored.choices[0].logprobs.token_logprobs == [None] + [-1.0] * (len(ids) - 1)
    chunks = list(oai.completions.create(model="tiny", prompt=["a", "b"], max_tokens=20, stream=True))
    for index in range(2):
        assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices[0].index == index) == " a dog"


def test_thinking_budget_closes_reasoning_and_answers(oai, engine, ids_of, tokenizer):
    """After the budget `</think>` is put in, the answer begins, and only sampled tokens are counted."""

    def say(prompt, index):
        in_thoughts = prompt[-1] == tokenizer.special_id("<think>")
        return "I could think for a very long time about this" if in_thoughts else "\nForty-two.<|user|>"

    engine.text = say
    for stream in (False, True):
        answer = ask(oai, extra_body={"thinking_budget": 5}, max_tokens=50, **({"stream": True} if stream else {}))
        if stream:
            deltas = [chunk.choices[0].delta for chunk in answer]
            text = "".join(delta.content or "" for delta in deltas)
            thoughts = "".join(getattr(delta, "reasoning_content", None) or "" for delta in deltas)
        else:
            message = answer.choices[0].message
            text, thoughts = message.content, message.reasoning_content
            assert answer.usage.completion_tokens == 5 + len(ids_of("\nForty-two.<|user|>"))
            assert answer.usage.completion_tokens_details.reasoning_tokens == 5
        assert text == "Forty-two."
        assert thoughts == tokenizer.decode(ids_of("I could think for a very long time about this")[:5])
    thought, answered = engine.asked[-2:]
    assert thought.params.max_tokens == 5
    assert tokenizer.decode(thought.prompt).endswith("<|assistant|>\n<think>")
    assert answered.prompt[-1] == tokenizer.special_id("</think>")
    assert answered.params.max_tokens == 45


@pytest.mark.parametrize("stop", [None, "never said"])
def test_reasoning_that_ends_the_turn_keeps_its_words(oai, engine, tokenizer, monkeypatch, stop):
    """Whether they come one by one or, with drafts, in one piece together with the token that ends the turn."""
    engine.text = lambda prompt, index: (
        "Hm, well.<|user|>" if prompt[-1] == tokenizer.special_id("<think>") else "\nForty-two.<|user|>"
    )
    one_by_one = engine.stream

    async def in_one_piece(*arguments, **options):
        deltas = [delta async for delta in one_by_one(*arguments, **options)]
        names = ("token_ids", "logprobs", "weight_versions")
        joined = {name: [each for delta in deltas for each in getattr(delta, name)] for name in names}
        text = "".join(delta.text for delta in deltas) if stop else None
        yield dataclasses.replace(deltas[-1], **joined, text=text)

    for stream in (one_by_one, in_one_piece):
        monkeypatch.setattr(engine, "stream", stream)
        message = ask(oai, extra_body={"thinking_budget": 50}, stop=stop).choices[0].message
        assert (message.reasoning_content, message.content) == ("Hm, well.", "Forty-two.")


def test_grammar_holds_for_the_answer_and_not_for_the_reasoning(oai, engine, tokenizer):
    """Where thinking is not off, reasoning may come before the grammar; a budget makes it a request of its own."""

    def say(prompt, index):
        in_thoughts = prompt[-1] == tokenizer.special_id("<think>")
        return "Some JSON.</think>" if in_thoughts else '{"a": 1}<|user|>'

    engine.text = say
    form = {"type": "json_object"}
    answer = ask(oai, n=2, response_format=form, extra_body={"thinking_budget": 20})
    for choice in answer.choices:
        assert choice.message.content == '{"a": 1}'
        assert choice.message.reasoning_content == "Some JSON."
        assert choice.finish_reason == "stop"
    constraints = [asked.params.constraint for asked in engine.asked]
    assert sorted(constraint is not None for constraint in constraints) == [False, False, True, True]
    assert not any(constraint.reasoning for constraint in constraints if constraint)
    for enabled in (True, False):
        ask(oai, response_format=form, extra_body={"enable_thinking": enabled})
        assert engine.asked[-1].params.constraint.reasoning is enabled


def test_reasoning_that_uses_up_max_tokens_is_cut(oai, engine, tokenizer):
    """No answer is asked for where no token is left for it."""
    engine.text = "thinking and thinking and thinking"
    answer = ask(oai, extra_body={"thinking_budget": 50}, max_tokens=3)
    assert answer.choices[0].finish_reason == "length"
    assert len(engine.asked) == 1
