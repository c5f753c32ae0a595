"""What is served: a checkpoint folder in the hub layout, or a run folder with its newest checkpoint."""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from glm45.config import from_dict
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

    `dtype` is that of parameters and products; None takes the checkpoint's, and float32 for a run.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder: name a checkpoint in the hub layout or a run folder")
    if not is_run(folder):
        return _load_hub(folder, dtype, device, folder.resolve().name)
    from glm45.training.command import export

    with tempfile.TemporaryDirectory(prefix="glm45-serve-") as scratch:
        out = Path(scratch) / "model"
        export(folder, out, "float32", None)
        if not (out / "tokenizer.json").is_file():
            raise ValueError(f"the data folder of {folder} is gone, and its tokenizer with it: export the run first")
        return _load_hub(out, dtype, device, folder.resolve().name)


def is_run(folder: Path) -> bool:
    """Whether a folder is a training run's and not a checkpoint."""
    config = folder / "config.json"
    return config.is_file() and "stages" in json.loads(config.read_text())


def _load_hub(folder: Path, dtype: torch.dtype | None, device: str, name: str) -> Source:
    tokenizer = Tokenizer.load(folder)
    model = hub.load(folder, dtype=dtype, compute_dtype=dtype, device=device)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise ValueError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens and the model {model.config.vocab_size} rows: "
            "they are not of one model"
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
