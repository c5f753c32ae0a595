"""Under a grammar, whatever a random model says is what was asked for, and the parser reads it back."""

import asyncio
import contextlib
import json

import jsonschema_rs
import pytest
import torch

from glm45.engine.constraints import Grammars
from glm45.engine.request import Constraint, SamplingParams
from glm45.model.config import preset
from glm45.model.transformer import Glm45
from glm45.text.parsing import parse
from glm45.text.tokenizer import Tokenizer

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "pattern": "^[a-z ]{1,8}$"},
        "kind": {"enum": ["cat", "dog"]},
        "sizes": {"type": "array", "items": {"type": "integer", "minimum": 0, "maximum": 99}, "maxItems": 3},
    },
    "required": ["name", "kind", "sizes"],
    "additionalProperties": False,
}
TOOLS = (
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "enum": ["Beijing", 'the "old" town']},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                    "units": {"$ref": "#/$defs/units"},
                },
                "required": ["city", "days"],
                "$defs": {"units": {"type": "array", "items": {"type": "boolean"}, "maxItems": 2}},
            },
        },
    },
    {"type": "function", "function": {"name": "stop_it"}},
)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(["the cat sat on the mat, {} [] 123 true false"] * 3, 300)


@pytest.fixture
def engine(build, tokenizer):
    values = {**preset("pico").to_hub(), "vocab_size": tokenizer.padded_vocab_size, "rope_parameters": None}
    model = Glm45(type(preset("pico")).from_hub(values), seed=2)
    with torch.no_grad():
        # A random model reasons for ever: let it close what it opens.
        for token in ("</think>", "</tool_call>", "</arg_value>", "<|user|>"):
            model.lm_head.weight[tokenizer.special_id(token)] *= 2
    return build(tokenizer=tokenizer, of=model)


def answers(engine, constraint, count=12, **params):
    bias = {engine.tokenizer.special_id("<|user|>"): 3.0, engine.tokenizer.special_id("</think>"): 4.0}
    params = SamplingParams(
        n=count, max_tokens=300, seed=1, detokenize=True, constraint=constraint, logit_bias=bias, **params
    )
    [completions] = engine.generate(["x"], params)
    return completions


@pytest.mark.slow
@pytest.mark.parametrize("reasoning", [False, True])
def test_json_follows_its_schema(engine, reasoning):
    completions = answers(engine, Constraint(json_schema=SCHEMA, reasoning=reasoning))
    finished = [completion for completion in completions if completion.finish_reason == "stop"]
    assert len(finished) >= 6
    for completion in finished:
        message = parse(completion.text).message
        assert jsonschema_rs.is_valid(SCHEMA, json.loads(message["content"]))
    assert any("<think>" in completion.text for completion in finished) == reasoning


@pytest.mark.slow
def test_tool_calls_are_read_back_with_arguments_of_their_schema(engine):
    completions = answers(engine, Constraint(tools=TOOLS))
    finished = [completion for completion in completions if completion.finish_reason == "stop"]
    assert len(finished) >= 6
    names = set()
    for completion in finished:
        parsed = parse(completion.text, TOOLS)
        assert parsed.message["tool_calls"]
        assert not parsed.message.get("content")
        for call in parsed.message["tool_calls"]:
            names.add(call["function"]["name"])
            if call["function"]["name"] == "get_weather":
                schema = TOOLS[0]["function"]["parameters"]
                assert jsonschema_rs.is_valid(schema, json.loads(call["function"]["arguments"]))
    assert names == {"get_weather", "stop_it"}


def test_under_a_grammar_a_request_alone_and_in_a_batch_give_the_same(engine):
    params = SamplingParams(n=3, max_tokens=40, seed=4, constraint=Constraint(json_object=True, reasoning=False))
    crowd = [SamplingParams(n=3, max_tokens=40, seed=i, top_p=0.9) for i in range(4)]
    [alone] = engine.generate(["x"], params)
    together = engine.generate(["x"] * 5, [*crowd, params])[-1]
    assert [completion.token_ids for completion in together] == [completion.token_ids for completion in alone]


def test_grammars_of_one_engine_do_not_mix(engine):
    """Calls of a tool without arguments, after a tool with some was compiled."""
    engine.compile(Constraint(tools=TOOLS[:1], reasoning=False))
    for completion in answers(engine, Constraint(tools=TOOLS[1:], reasoning=False), count=4):
        assert completion.text.startswith("<tool_call>stop_it\n</tool_call>")


def test_logprobs_under_a_grammar_are_the_models_own(engine, forward_logprobs):
    for completion in answers(engine, Constraint(json_object=True, reasoning=False), count=1):
        expected = forward_logprobs(engine.model, engine.tokenizer.encode("x"), completion.token_ids)
        torch.testing.assert_close(torch.tensor(completion.logprobs), expected, atol=1e-5, rtol=0)


def test_a_grammar_of_ones_own(engine):
    completions = answers(engine, Constraint(grammar='root ::= "yes" | "no"'), count=6)
    assert {completion.text.removesuffix("<|user|>") for completion in completions} == {"yes", "no"}


def test_a_sample_that_cannot_go_on_fails_its_own_request_alone(engine):
    """Of the samples of one request some are banned every token in the very step in which others finish."""
    constraint = Constraint(grammar='root ::= "a" | "bb"')
    doomed = SamplingParams(n=16, min_tokens=2, max_tokens=2, seed=1, constraint=constraint)

    async def run():
        calls = [engine.generate_async("x", params) for params in (doomed, SamplingParams(max_tokens=9, seed=1))]
        return await asyncio.gather(*calls, return_exceptions=True)

    failed, [finished] = asyncio.run(run())
    assert "ban every token" in str(failed)
    assert finished.finish_reason == "length"


def test_a_schema_without_conditions_is_any_json(tokenizer):
    grammars = Grammars(tokenizer, tokenizer.padded_vocab_size)
    for text in ("[1]", '"a"', "true"):
        matcher = grammars.matcher(Constraint(json_schema={}, reasoning=False))
        for token in tokenizer.encode(text):
            matcher.accept(token)


@pytest.mark.parametrize(
    "parameters",
    [
        {"properties": [1]},
        {"properties": {"a": {}}, "required": 5},
        {"properties": {"a": {"type": "nonsense"}}},
        {"properties": {"a": {"type": {"b": 1}, "anyOf": 5, "enum": 5}}, "$defs": 5, "required": [[1]]},
        {"properties": {"a": {"type": "string", "enum": 5}}},
        {"properties": {"a": {"type": ["integer", ["x"]]}}},
    ],
)
def test_a_malformed_tool_is_a_value_error_or_served(tokenizer, parameters):
    tools = ({"type": "function", "function": {"name": "f", "parameters": parameters}},)
    with contextlib.suppress(ValueError):
        Grammars(tokenizer, tokenizer.padded_vocab_size).matcher(Constraint(tools=tools))


@pytest.mark.parametrize("constraint", [Constraint(json_schema={"type": "nonsense"}), Constraint(grammar="root ::= (")])
def test_what_cannot_be_compiled_is_refused_at_once(engine, constraint):
    with pytest.raises(ValueError, match="the constraint cannot be enforced"):
        answers(engine, constraint)


def test_exactly_one_constraint_is_given():
    with pytest.raises(ValueError, match="exactly one"):
        Constraint(json_object=True, grammar="root ::= x")
