"""The verifier in docs/verifiers.md, as written there, loads, proves itself and judges in a reward process."""

import json
import os
import re
from pathlib import Path

from glm45.environments.protocol import assistant
from glm45.environments.tasks import read_tasks
from glm45.environments.verify import RewardConfig, RewardWorkers

DOCS = Path(__file__).parents[2] / "docs" / "verifiers.md"


def test_the_documented_verifier_works_in_about_ten_lines(tmp_path, monkeypatch):
    found = re.findall(r"```(python|json)\n(.*?)```", DOCS.read_text(), re.DOTALL)
    blocks = dict(reversed(found))  # the first of each
    assert len([line for line in blocks["python"].splitlines() if line.strip()]) <= 10
    (tmp_path / "palindromes.py").write_text(blocks["python"])
    (tmp_path / "tasks.jsonl").write_text(blocks["json"])
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    (task,) = read_tasks(tmp_path / "tasks.jsonl")
    assert json.loads(blocks["json"])["task_id"] == task.task_id
    with RewardWorkers(RewardConfig()) as rewards:
        assert [rewards.score(task, assistant(text)).value for text in ("noon", "level", "nope")] == [1.0, 0.0, 0.0]
