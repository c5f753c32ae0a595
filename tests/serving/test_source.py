"""What a path names: a checkpoint, or what a run wrote; and what is said where it names neither."""

import dataclasses
import json

import pytest

from glm45.model import hub
from glm45.model.transformer import Glm45
from glm45.serving.source import load_source


@pytest.fixture(scope="module")
def checkpoint(tiny_model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("source") / "tiny"
    hub.save(tiny_model, folder)
    tokenizer.save(folder)
    return folder


def test_a_checkpoint_and_the_folders_of_runs(checkpoint, tmp_path, tokenizer):
    """The checkpoint itself, or the one that a run keeps as `model` or `policy`; named after the folder given."""
    assert load_source(checkpoint).name == "tiny"
    assert load_source(checkpoint).tokenizer.fingerprint == tokenizer.fingerprint
    for kind in ("model", "policy"):
        run = tmp_path / f"run-{kind}"
        run.mkdir()
        (run / "config.json").write_text('{"name": "x"}')
        (run / kind).symlink_to(checkpoint)
        assert load_source(run).name == f"run-{kind}"


def test_recommended_sampling_is_the_default(checkpoint):
    """What `generation_config.json` recommends holds where a request says nothing."""
    file = checkpoint / "generation_config.json"
    before = file.read_text()
    file.write_text(json.dumps({"temperature": 0.6, "top_p": 0.95, "top_k": 40}))
    defaults = load_source(checkpoint).defaults
    file.write_text(before)
    assert (defaults.temperature, defaults.top_p, defaults.top_k) == (0.6, 0.95, 40)


def test_what_is_no_model_is_said(tmp_path, checkpoint, tiny_model, tokenizer):
    """Nothing there, nothing in it, no JSON, or a tokenizer of another model."""
    with pytest.raises(FileNotFoundError, match="is no folder"):
        load_source(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no model"):
        load_source(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        load_source(tmp_path)
    other = Glm45(dataclasses.replace(tiny_model.config, vocab_size=tokenizer.padded_vocab_size + 256), seed=0)
    hub.save(other, tmp_path / "other")
    tokenizer.save(tmp_path / "other")
    with pytest.raises(ValueError, match="not of one model"):
        load_source(tmp_path / "other")
