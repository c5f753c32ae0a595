"""A language model as judge and teacher, by the command, against a small endpoint on this machine."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from glm45.cli import main
from glm45.corpus.quality import Quality, labelled_seeds

REPLIES = {
    "calculus": "85/100",
    "gossip": "I would say 5.",
    "nonsense": "I cannot judge that.",
    "2+2": "Two and two make four. Answer: $4.0$",
    "3+3": "It is seven. Answer: 7",
}


@pytest.fixture
def endpoint():
    """Answers by the first known word in the prompt, to whoever brings the key."""

    class Answer(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.rfile.read(int(self.headers["Content-Length"])).decode()
            assert self.headers["Authorization"] == "Bearer secret"
            text = next(reply for word, reply in REPLIES.items() if word in body)
            choices = [{"message": {"content": text}}] * json.loads(body)["n"]
            answer = json.dumps({"choices": choices}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *arguments):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


@pytest.fixture
def command(tmp_path, endpoint, monkeypatch):
    """Runs `glm45 data ACTION` on lines and returns its status."""
    monkeypatch.setenv("GLM45_API_KEY", "secret")

    def run(action, rows, *options):
        (tmp_path / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files = [str(tmp_path / "in.jsonl"), str(tmp_path / "out.jsonl")]
        return main(["data", action, *files, "--url", endpoint, "--model", "m", *options])

    return run


def test_scores_become_seeds_and_what_cannot_be_read_is_told(command, tmp_path, capsys):
    texts = [{"text": "on calculus"}, {"text": "nonsense"}, {"text": "some gossip"}]
    assert command("score", texts, "--question", "How much mathematics?") == 0
    said = capsys.readouterr()
    assert json.loads(said.out) == {"scored": 2, "unreadable": 1}
    assert "line 2: the reply 'I cannot judge that.' is not one number" in said.err
    users = Quality(seeds=str(tmp_path / "out.jsonl"))
    assert [label for _, label in labelled_seeds("mathematics", users)][-2:] == [1, 0]
    assert command("score", texts, "--question", "How much mathematics?") == 1
    assert "out.jsonl exists" in capsys.readouterr().err


def test_a_line_without_text_is_an_error_and_leaves_no_output(command, tmp_path, capsys):
    assert command("score", [{"text": "on calculus"}, {"body": "x"}], "--question", "?") == 1
    assert "in.jsonl, line 2: KeyError('text'); each line needs text" in capsys.readouterr().err
    assert not (tmp_path / "out.jsonl").exists()


@pytest.mark.slow
def test_worked_answers_that_a_verifier_accepts_are_kept(command, tmp_path, capsys):
    tasks = [{"prompt": "What is 2+2?", "answer": "4"}, {"prompt": "What is 3+3?", "answer": "6"}]
    assert command("teach", tasks, "--samples", "2") == 0
    assert json.loads(capsys.readouterr().out) == {"accepted": 2, "wrong": 2}
    [record] = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert record["prompt"] == "What is 2+2?"
    assert record["kind"] == "reasoning"
    assert "Two and two make four." in record["text"]
