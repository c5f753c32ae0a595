"""The whole loop on toy data, in one process."""

from glm45.training.loop import train
from glm45.training.metrics import read_record
from glm45.training.run import Run


def test_a_run_learns_and_writes_its_folder(toy_recipe, tmp_path):
    train(Run.open(tmp_path, toy_recipe()))
    record = read_record(tmp_path)
    steps = [line for line in record if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, len(steps) + 1))
    assert steps[-1]["next_token_loss"] < steps[0]["next_token_loss"] - 0.5
