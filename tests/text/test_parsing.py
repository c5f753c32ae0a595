"""The parser gives the OpenAI message that a model's text spells, and says exactly what is wrong with it."""

import json

import pytest

from glm45.text.parsing import StreamParser, join_deltas, parse, parse_ids

CALL = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bonn</arg_value>\n</tool_call>"


def calls_of(parsed):
    calls = parsed.message.get("tool_calls", [])
    return [(call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls]


# Text, reasoning open, reasoning, content, names of calls, kinds of problems: each written by hand.
CASES = {
    "plain": ("a < b\n", False, None, "a < b\n", [], []),
    "nothing": ("", False, None, None, [], []),
    "thinking": ("\n<think>R 1</think>\nC", False, "R 1", "C", [], []),
    "no thinking": ("\n<think></think>\n\nC", False, None, "C", [], []),
    "newlines beside tags": ("\n<think>\nR\n</think>\n\nC\n\n" + CALL, False, "R", "C", ["get_weather"], []),
    "spaces are content": ("<think>R</think>  C ", False, "R", "  C ", [], []),
    "open reasoning": ("R</think>C", True, "R", "C", [], []),
    "opened twice": ("<think>R</think>C", True, "R", "C", [], ["stray_tag"]),
    "closed unopened": ("</think>C", False, None, "C", [], ["stray_tag"]),
    "unclosed reasoning": ("<think>R", False, "R", None, [], ["unclosed_reasoning"]),
    "call in reasoning": ("<think>R\n" + CALL, False, "R", None, ["get_weather"], ["unclosed_reasoning"]),
    "late think": ("C<think>R</think>", False, None, "C<think>R</think>", [], ["stray_tag", "stray_tag"]),
    "tag in reasoning": ("<think>a<arg_key>b</think>", False, "a<arg_key>b", None, [], ["stray_tag"]),
    "hallucinated result": (
        CALL + "\n<tool_response>\nsun",
        False,
        None,
        "<tool_response>\nsun",
        ["get_weather"],
        ["stray_tag"],
    ),
    "content around calls": (f"A.\n{CALL}\nB.\n{CALL}", False, None, "A.\nB.", ["get_weather"] * 2, []),
    "white space between calls": (f"{CALL}\n    {CALL}\n", False, None, None, ["get_weather"] * 2, []),
    "spaces before a call": (f"A. {CALL}", False, None, "A. ", ["get_weather"], []),
    "no arguments": ("<tool_call>now\n</tool_call>", False, None, None, ["now"], []),
    "no arguments, 4.7": ("<tool_call>now</tool_call>", False, None, None, ["now"], []),
    "ended": ("C<|user|>", False, None, "C", [], []),
    "text after the end": ("C<|user|>\nhi", False, None, "C<|user|>\nhi", [], ["text_after_end"]),
    "half a tag": ("a <tool_ca", False, None, "a <tool_ca", [], []),
    "no name": ("<tool_call></tool_call>", False, None, "<tool_call></tool_call>", [], ["bad_name"]),
    "a sentence for a name": (
        "<tool_call>call it now\n</tool_call>b",
        False,
        None,
        "<tool_call>call it now\n</tool_call>b",
        [],
        ["bad_name"],
    ),
    "JSON for a name": (
        '<tool_call>{"name": "now"}</tool_call>',
        False,
        None,
        '<tool_call>{"name": "now"}</tool_call>',
        [],
        ["bad_name"],
    ),
    "cut in the name": ("<tool_call>get_wea", False, None, "<tool_call>get_wea", [], ["truncated_call"]),
    "blank call": ("<tool_call>   ", False, None, "<tool_call>   ", [], ["truncated_call"]),
    "call after call": ("<tool_call>no" + CALL, False, None, "<tool_call>no", ["get_weather"], ["unclosed_call"]),
    "unknown tool": ("<tool_call>fly\n</tool_call>", False, None, None, ["fly"], ["unknown_tool"]),
    "text in a call": (
        "<tool_call>now\n oops </tool_call>",
        False,
        None,
        "oops ",
        ["now"],
        ["stray_text", "layout"],
    ),
    "value without key": (
        "<tool_call>now\n<arg_value>1</arg_value>\n</tool_call>",
        False,
        None,
        "<arg_value>1</arg_value>\n",
        ["now"],
        ["stray_tag", "stray_tag"],
    ),
    "key without value": (
        "<tool_call>now\n<arg_key>k</arg_key>\n</tool_call>",
        False,
        None,
        "<arg_key>k</arg_key>\n",
        ["now"],
        ["missing_value", "layout"],
    ),
    "unclosed key": (
        "<tool_call>now\n<arg_key>k\n<arg_value>v</arg_value>\n</tool_call>",
        False,
        None,
        "<arg_key>k\n<arg_value>v</arg_value>\n",
        ["now"],
        ["unclosed_key", "stray_tag", "stray_tag"],
    ),
    "layout": (
        "<tool_call>get_weather\n  <arg_key>city</arg_key>\n  <arg_value>x</arg_value></tool_call>",
        False,
        None,
        None,
        ["get_weather"],
        ["layout"],
    ),
    "literal newline": ("<tool_call>now\\n</tool_call>", False, None, None, ["now"], ["layout"]),
}


@pytest.mark.parametrize("name", CASES)
def test_case(name, tools):
    text, reasoning_open, reasoning, content, names, kinds = CASES[name]
    message, status = parse(text, tools, reasoning_open)
    assert message.get("reasoning_content") == reasoning
    assert message["content"] == content
    assert [call["function"]["name"] for call in message.get("tool_calls", [])] == names
    assert [problem.kind for problem in status.problems] == kinds
    assert status.exact == (not kinds)
    assert status.well_formed == (set(kinds) <= {"layout"})


def test_the_status_says_where():
    text = "<think>R" + CALL + CALL.replace("</arg_value>\n", "")
    status = parse(text).status
    second = text.rindex("<tool_call>")
    assert [(problem.kind, problem.position, problem.call) for problem in status.problems] == [
        ("unclosed_reasoning", len("<think>R"), None),
        ("truncated_call", second, 1),
    ]
    assert status.complete_calls == (0,)
    assert str(status.problems[0]) == "unclosed_reasoning at 8: <tool_call> before </think>"


def test_a_spoilt_call_is_not_complete(tools):
    text = CALL + "<tool_call>fly\n</tool_call>" + CALL
    assert parse(text, tools).status.complete_calls == (0, 2)


def test_the_token_that_ended_the_turn_is_reported():
    assert parse(CALL + "<|observation|>").status.end == "<|observation|>"
    assert parse(CALL).status.end is None


@pytest.mark.parametrize("newline", ["\n", ""])
def test_string_values_are_raw(newline, tools):
    """Quotes, backslashes, newlines, spaces and tags come through; only </arg_value> ends a value."""
    value = '  "a" \\n\n<tool_call>x</tool_call></arg_key> <|user|> </think>\t '
    text = f"<tool_call>get_weather{newline}<arg_key>city</arg_key>{newline}<arg_value>{value}</arg_value>{newline}"
    text += "</tool_call>"
    parsed = parse(text, tools)
    assert calls_of(parsed) == [("get_weather", {"city": value})]
    assert parsed.status.exact


# Schema of the parameter, value as written, value as read, problems.
TYPED = [
    ({"type": "string"}, "42", "42", []),
    ({"type": "string"}, "null", "null", []),
    ({"type": "string"}, "", "", []),
    ({"type": "integer"}, "42", 42, []),
    ({"type": "integer"}, " 42\n", 42, []),
    ({"type": "number"}, "1e10", 1e10, []),
    ({"type": "boolean"}, "true", True, []),
    ({"type": "boolean"}, "True", True, ["not_json"]),
    ({"type": "integer"}, '"42"', "42", []),
    ({"type": "integer"}, "many", "many", ["not_json"]),
    ({"type": "number"}, "NaN", "NaN", ["not_json"]),
    ({"type": "integer"}, "", "", ["not_json"]),
    ({"type": "object"}, "{'a': (1, None)}", {"a": [1, None]}, ["not_json"]),
    ({"type": "object"}, '{"a":1}', {"a": 1}, []),
    ({"type": "array"}, "[" * 5000, "[" * 5000, ["not_json"]),
    ({"type": ["string", "null"]}, "text", "text", []),
    ({"type": ["string", "null"]}, "null", None, []),
    ({"type": ["string", "null"]}, "nul", "nul", []),
    ({"type": ["string", "null"]}, "nullify", "nullify", []),
    ({"type": ["integer", "null"]}, "null", None, []),
    ({"anyOf": [{"type": "string"}, {"type": "object"}]}, "{}", "{}", []),
    ({"anyOf": [{"type": "integer"}, {"type": "boolean"}]}, "7", 7, []),
    ({"oneOf": [{"type": "string"}]}, "7", "7", []),
    ({"allOf": [{"type": "string"}, {"minLength": 1}]}, "7", "7", []),
    ({"enum": ["1", "2"]}, "1", "1", []),
    ({"enum": [1, 2]}, "1", 1, []),
    ({"enum": [1, "auto"]}, "1", 1, []),
    ({"enum": [1, "auto"]}, "auto", "auto", []),
    ({"const": "1"}, "1", "1", []),
    ({"$ref": "#/$defs/Unit"}, "3", "3", []),
    ({"$ref": "#/$defs/Loop"}, "3", 3, []),
    ({"$ref": "#/$defs/Nowhere"}, "3", 3, []),
    ({}, "3", 3, []),
    ({}, "03", "03", []),
    ({}, "True", "True", []),
    ({}, '"q"', "q", []),
    (None, "3", 3, []),
]


@pytest.mark.parametrize(("schema", "written", "read", "kinds"), TYPED)
def test_values_are_typed_by_the_schema(schema, written, read, kinds):
    parameters = {
        "properties": {"k": schema} if schema is not None else {},
        "$defs": {"Unit": {"enum": ["3", "4"]}, "Loop": {"$ref": "#/$defs/Loop"}},
    }
    text = f"<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>{written}</arg_value>\n</tool_call>"
    parsed = parse(text, [{"name": "f", "parameters": parameters}])
    assert calls_of(parsed) == [("f", {"k": read})]
    assert [problem.kind for problem in parsed.status.problems] == kinds


def test_json_is_passed_on_as_written():
    """Only white space around it is dropped: not the spelling of numbers, nor digits that no float holds."""
    number = "1" * 6000
    text = f'<tool_call>f\n<arg_key>k</arg_key>\n<arg_value> {{"a":{number},  "b":1.50}}\n</arg_value>\n</tool_call>'
    (call,) = parse(text).message["tool_calls"]
    assert call["function"]["arguments"] == f'{{"k": {{"a":{number},  "b":1.50}}}}'


def test_a_repeated_key_is_a_problem():
    text = "<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>1</arg_value>\n"
    text += "<arg_key>k</arg_key>\n<arg_value>2</arg_value>\n</tool_call>"
    parsed = parse(text)
    assert [problem.kind for problem in parsed.status.problems] == ["duplicate_argument"]
    assert parsed.message["tool_calls"][0]["function"]["arguments"] == '{"k": 1, "k": 2}'


@pytest.mark.parametrize(
    ("cut", "arguments"),
    [
        ("<tool_call>get_weather\n", "{"),
        ("<tool_call>get_weather\n<arg_key>ci", '{"ci'),
        ("<tool_call>get_weather\n<arg_key>city</arg_key>\n", '{"city"'),
        ('<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>"Bo', '{"city": "\\"Bo'),
        ("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bo</arg_val", '{"city": "Bo</arg_val'),
        ("<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Bo</arg_value>\n", '{"city": "Bo"'),
        ("<tool_call>get_weather\n<arg_key>days</arg_key>\n<arg_value>1}", '{"days": "1}'),
        ("<tool_call>get_weather\n<arg_key>note</arg_key>\n<arg_value>nu", '{"note": "nu'),
    ],
)
def test_a_call_that_was_cut_short_keeps_what_was_written_and_never_closes(cut, arguments, tools):
    message, status = parse(cut, tools)
    assert message["tool_calls"][0]["function"]["arguments"] == arguments
    with pytest.raises(json.JSONDecodeError):
        json.loads(arguments)
    assert [problem.kind for problem in status.problems] == ["truncated_call"]
    assert status.complete_calls == ()


def test_the_name_comes_once_and_whole_and_long_strings_in_fragments(tools):
    text = "<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>" + "word " * 200 + "</arg_value>\n</tool_call>"
    parser = StreamParser(tools)
    deltas = [delta for start in range(0, len(text), 7) for delta in parser.feed(text[start : start + 7])]
    deltas += parser.finish()
    named = [call["function"]["name"] for delta in deltas for call in delta["tool_calls"] if "name" in call["function"]]
    assert named == ["get_weather"]
    assert deltas[0]["tool_calls"][0]["id"] == "call_0"
    assert len(deltas) > 100
    assert max(len(delta["tool_calls"][0]["function"]["arguments"]) for delta in deltas) < 20


def test_text_that_may_start_a_tag_waits_only_as_long_as_it_may():
    parser = StreamParser()
    assert parser.feed("a <thi") == [{"content": "a"}]
    assert parser.feed("s") == [{"content": " <this"}]
    assert parser.feed("") == []
    assert parser.feed(" <") == []
    assert parser.finish() == [{"content": " <"}]


def test_ids_are_tags_only_where_they_are_special(tokenizer, tools):
    special = tokenizer.special_id
    ids = [special("<think>"), *tokenizer.encode("say </think> or <tool_call> 上"), special("</think>")]
    ids += [
        *tokenizer.encode("\nC\n"),
        special("<tool_call>"),
        *tokenizer.encode("get_weather\n"),
        special("<arg_key>"),
    ]
    ids += [*tokenizer.encode("city"), special("</arg_key>"), *tokenizer.encode("\n"), special("<arg_value>")]
    ids += [*tokenizer.encode("x</arg_value>y"), special("</think>"), special("</arg_value>"), *tokenizer.encode("\n")]
    ids += [special("</tool_call>"), special("<|observation|>")]
    parsed = parse_ids(ids, tokenizer, tools)
    assert parsed.message["reasoning_content"] == "say </think> or <tool_call> 上"
    assert parsed.message["content"] == "C"
    assert calls_of(parsed) == [("get_weather", {"city": "x</arg_value>y</think>"})]
    assert parsed.status.exact
    assert parsed.status.end == "<|observation|>"
    parser = StreamParser(tools, tokenizer=tokenizer)
    deltas = [delta for index in ids for delta in parser.feed_ids([index])] + parser.finish()
    assert join_deltas(deltas) == parsed.message
    assert parser.status == parsed.status


def test_a_character_cut_by_the_end_of_ids_is_shown_as_such(tokenizer):
    ids = tokenizer.encode("a🎉")
    assert parse_ids(ids[:-1], tokenizer).message["content"].startswith("a\ufffd")
