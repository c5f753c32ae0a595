"""What is served: a checkpoint folder in the hub layout, or a run folder with its newest checkpoint."""

import json
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch

from glm45.config import from_dict, read_json
from glm45.model import hub
from glm45.model.transformer import Glm45
from glm45.serving.plan import SamplingDefaults
from glm45.text.tokenizer import Tokenizer


class Source(NamedTuple):
    """A model ready to be served."""

    model: Glm45
    tokenizer: Tokenizer
    defaults: SamplingDefaults
    name: str


def load_source(path: str | Path, dtype: torch.dtype | None = None, device: str = "cpu") -> Source:
    """Load what `path` names. Raises FileNotFoundError or ValueError, saying what is missing.

    A checkpoint folder; a run folder of `glm45 run` or of reinforcement learning, for the checkpoint that it wrote; or
    a training run, for its newest intact state. `dtype` is that of parameters and products; None takes the
    checkpoint's, and float32 for a training run.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name a checkpoint in the hub layout or a run folder")
    name = folder.resolve().name
    for written in (folder, folder / "model", folder / "policy"):
        if "model_type" in _config(written):
            return _load_hub(written, dtype, device, name)
    if "stages" not in _config(folder):
        raise ValueError(f"{folder} holds no model: neither a checkpoint (config.json with model_type) nor a run's")
    from glm45.training.command import export

    with tempfile.TemporaryDirectory(prefix="glm45-serve-") as scratch:
        out = Path(scratch) / "model"
        export(folder, out, "float32", None)
        if not (out / "tokenizer.json").is_file():
            raise ValueError(f"the data folder of {folder} is gone, and its tokenizer with it: export the run first")
        return _load_hub(out, dtype, device, name)


def _config(folder: Path) -> dict[str, Any]:
    """Return a folder's `config.json`, or nothing. Raises ValueError where it is not a JSON object."""
    file = folder / "config.json"
    if not file.is_file():
        return {}
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} is not a JSON object")
    return values


def _load_hub(folder: Path, dtype: torch.dtype | None, device: str, name: str) -> Source:
    tokenizer = Tokenizer.load(folder)
    model = hub.load(folder, dtype=dtype, compute_dtype=dtype, device=device)
    if not tokenizer.vocab_size <= model.config.vocab_size <= tokenizer.padded_vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, {tokenizer.padded_vocab_size} with padding, "
            f"and the model {model.config.vocab_size} rows: they are not of one model"
        )
    return Source(model, tokenizer, _read_defaults(folder), name)


def _read_defaults(folder: Path) -> SamplingDefaults:
    """Return the sampling defaults that a checkpoint recommends."""
    file = folder / "generation_config.json"
    values = json.loads(file.read_text()) if file.is_file() else {}
    names = ("temperature", "top_p", "top_k", "repetition_penalty")
    given = {name: values[name] for name in names if values.get(name) is not None}
    if values.get("do_sample") is False:
        given["temperature"] = 0.0
    return from_dict(SamplingDefaults, given)
