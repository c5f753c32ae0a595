"""`glm45 chat render` and `glm45 chat parse` print what the library says, as JSON, and fail in one line."""

import io
import json

import pytest

from glm45.cli import main

MESSAGES = [{"role": "user", "content": "hi"}]


@pytest.fixture
def messages_file(tmp_path):
    file = tmp_path / "messages.json"
    file.write_text(json.dumps(MESSAGES))
    return str(file)


def output_of(capsys, *arguments):
    assert main(["chat", *arguments]) == 0
    return json.loads(capsys.readouterr().out)


def test_render_prints_the_prompt(capsys, messages_file, tmp_path, tools):
    assert output_of(capsys, "render", "--messages", messages_file) == {"text": "[gMASK]<sop><|user|>\nhi<|assistant|>"}
    direct = output_of(capsys, "render", "--messages", messages_file, "--no-think")["text"]
    assert direct.endswith("hi/nothink<|assistant|>\n<think></think>")
    tools_file = tmp_path / "tools.json"
    tools_file.write_text(json.dumps(tools))
    with_tools = output_of(capsys, "render", "--messages", messages_file, "--tools", str(tools_file))["text"]
    assert '"name": "get_weather"' in with_tools


def test_render_prints_ids_and_mask(capsys, tmp_path, tokenizer):
    tokenizer.save(tmp_path / "tokenizer")
    file = tmp_path / "chat.json"
    file.write_text(json.dumps({"messages": [*MESSAGES, {"role": "assistant", "content": "yo"}]}))
    result = output_of(capsys, "render", "--messages", str(file), "--ids", "--tokenizer", str(tmp_path / "tokenizer"))
    assert (
        tokenizer.decode(result["ids"])
        == result["text"]
        == "[gMASK]<sop><|user|>\nhi<|assistant|>\n<think></think>\nyo"
    )
    produced = [index for index, mask in zip(result["ids"], result["loss_mask"], strict=True) if mask]
    assert tokenizer.decode(produced) == "\n<think></think>\nyo"


def test_parse_prints_message_and_status(capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("<think>R</think>\n<tool_call>f\n<arg_key>k"))
    result = output_of(capsys, "parse")
    assert result["message"]["reasoning_content"] == "R"
    assert result["status"]["well_formed"] is False
    assert result["status"]["problems"][0]["kind"] == "truncated_call"


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["render"], "needs --messages"),
        (["render", "--messages", "FILE", "--ids"], "with --ids also --tokenizer"),
        (["render", "--messages", "NOWHERE"], "NOWHERE"),
        (["render", "--messages", "BROKEN"], "is not JSON"),
        (["render", "--messages", "FILE", "--tools", "NUMBERS"], "tool 0 is no function with a name"),
        (["render", "--messages", "FILE", "--tools", "FILE"], "tool 0 is no function with a name"),
        (["parse", "--tools", "NUMBERS"], "tool 0 is no function with a name"),
    ],
)
def test_failures_are_one_line(capsys, monkeypatch, tmp_path, messages_file, arguments, error):
    monkeypatch.setattr("sys.stdin", io.StringIO(""))
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "numbers.json").write_text("[1, 2]")
    files = {"FILE": messages_file, "BROKEN": str(tmp_path / "broken.json"), "NUMBERS": str(tmp_path / "numbers.json")}
    assert main(["chat", *(files.get(argument, argument) for argument in arguments)]) == 1
    captured = capsys.readouterr()
    assert error in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""
