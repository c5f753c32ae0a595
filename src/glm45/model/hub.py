"""The hub layout: `config.json` and safetensors with one expert a key, as published checkpoints have it.

Reading and writing are streams: memory stays within the model plus one shard. Everything that can be checked from
the files' headers is checked before a tensor is read, and a save that is killed leaves the old checkpoint or none.
"""

import json
import os
import shutil
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from glm45.config import read_json
from glm45.model.config import ModelConfig
from glm45.model.transformer import Glm45

INDEX_FILE = "model.safetensors.index.json"
SINGLE_FILE = "model.safetensors"
_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


@dataclass(frozen=True)
class Entry:
    """One tensor of the hub layout and the part of one of our fused tensors that it is."""

    key: str
    """Name in the checkpoint."""
    name: str
    """Name in `Glm45`'s state."""
    index: tuple[Any, ...]
    """Index into our tensor; what it gives holds the same numbers in the same order."""
    shape: tuple[int, ...]
    """Shape in the checkpoint."""


def entries(config: ModelConfig) -> list[Entry]:
    """Return every tensor of a checkpoint of this shape, in the order in which it is written."""
    found = [*_plain("model.embed_tokens.weight", "embed_tokens.weight", config.vocab_size, config.hidden_size)]
    for layer in range(config.num_hidden_layers):
        found += _decoder_layer(config, f"model.layers.{layer}", f"layers.{layer}", layer)
    found += _plain("model.norm.weight", "norm.weight", config.hidden_size)
    found += _plain("lm_head.weight", "lm_head.weight", config.vocab_size, config.hidden_size)
    if config.num_nextn_predict_layers:
        hub = f"model.layers.{config.num_hidden_layers}"
        found += _decoder_layer(config, hub, "mtp.layer", config.num_hidden_layers)
        found += _plain(f"{hub}.enorm.weight", "mtp.enorm.weight", config.hidden_size)
        found += _plain(f"{hub}.hnorm.weight", "mtp.hnorm.weight", config.hidden_size)
        found += _plain(f"{hub}.eh_proj.weight", "mtp.eh_proj.weight", config.hidden_size, 2 * config.hidden_size)
        found += _plain(f"{hub}.shared_head.norm.weight", "mtp.norm.weight", config.hidden_size)
    return found


def duplicates(config: ModelConfig) -> list[Entry]:
    """Return the copies of embedding and head that GLM-4.5's MTP layer carries and GLM-4.6's does not."""
    hub, shape = f"model.layers.{config.num_hidden_layers}", (config.vocab_size, config.hidden_size)
    return [
        *_plain(f"{hub}.embed_tokens.weight", "embed_tokens.weight", *shape),
        *_plain(f"{hub}.shared_head.head.weight", "lm_head.weight", *shape),
    ]


def _plain(key: str, name: str, *shape: int) -> list[Entry]:
    return [Entry(key, name, (), shape)]


def _mlp(hub: str, ours: str, width: int, hidden: int) -> list[Entry]:
    return [
        Entry(f"{hub}.gate_proj.weight", f"{ours}.gate_up_proj.weight", (0,), (width, hidden)),
        Entry(f"{hub}.up_proj.weight", f"{ours}.gate_up_proj.weight", (1,), (width, hidden)),
        Entry(f"{hub}.down_proj.weight", f"{ours}.down_proj.weight", (), (hidden, width)),
    ]


def _decoder_layer(config: ModelConfig, hub: str, ours: str, layer: int) -> Iterator[Entry]:
    hidden = config.hidden_size
    yield from _plain(f"{hub}.input_layernorm.weight", f"{ours}.input_layernorm.weight", hidden)
    yield from _attention(config, f"{hub}.self_attn", f"{ours}.self_attn")
    yield from _plain(f"{hub}.post_attention_layernorm.weight", f"{ours}.post_attention_layernorm.weight", hidden)
    if layer < config.first_k_dense_replace:
        yield from _mlp(f"{hub}.mlp", f"{ours}.mlp", config.intermediate_size, hidden)
        return
    experts, width = config.n_routed_experts, config.moe_intermediate_size
    bias = "e_score_correction_bias"
    yield from _plain(f"{hub}.mlp.gate.weight", f"{ours}.mlp.gate.weight", experts, hidden)
    yield from _plain(f"{hub}.mlp.gate.{bias}", f"{ours}.mlp.gate.{bias}", experts)
    for e in range(experts):
        expert = f"{hub}.mlp.experts.{e}"
        fused, down = f"{ours}.mlp.experts.gate_up_proj", f"{ours}.mlp.experts.down_proj"
        yield Entry(f"{expert}.gate_proj.weight", fused, (e, 0), (width, hidden))
        yield Entry(f"{expert}.up_proj.weight", fused, (e, 1), (width, hidden))
        yield Entry(f"{expert}.down_proj.weight", down, (e,), (hidden, width))
    if config.n_shared_experts:
        shared = "mlp.shared_experts"
        yield from _mlp(f"{hub}.{shared}", f"{ours}.{shared}", width * config.n_shared_experts, hidden)


def _attention(config: ModelConfig, hub: str, ours: str) -> Iterator[Entry]:
    group = config.num_attention_heads // config.num_key_value_heads
    rows = {"q": slice(0, group), "k": group, "v": group + 1}  # of the P rows of a key/value group
    for letter, row in rows.items():
        heads = config.num_attention_heads if letter == "q" else config.num_key_value_heads
        size, fused, index = heads * config.head_dim, f"{ours}.qkv_proj", (slice(None), row)
        yield Entry(f"{hub}.{letter}_proj.weight", f"{fused}.weight", index, (size, config.hidden_size))
        if config.attention_bias:
            yield Entry(f"{hub}.{letter}_proj.bias", f"{fused}.bias", index, (size,))
    if config.use_qk_norm:
        for letter in ("q", "k"):
            yield from _plain(f"{hub}.{letter}_norm.weight", f"{ours}.{letter}_norm.weight", config.head_dim)
    width = config.num_attention_heads * config.head_dim
    yield from _plain(f"{hub}.o_proj.weight", f"{ours}.o_proj.weight", config.hidden_size, width)


# --- reading ---------------------------------------------------------------------------------------------------------


def load_config(path: str | Path) -> ModelConfig:
    """Read the shape of a checkpoint folder. Raises FileNotFoundError or ValueError, naming the file."""
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{path} holds no checkpoint: there is no config.json in it")
    values = read_json(file)
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds no configuration: it is {str(values)[:40]!r}, not an object with names")
    try:
        return ModelConfig.from_hub(values)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def load(
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    compute_dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> Glm45:
    """Load a checkpoint folder in the hub layout.

    `dtype` is that of the parameters (default: as in the file; the router's correction bias is fp32 always),
    `compute_dtype` that of the products (default: as the parameters). A checkpoint without any tensor of its MTP layer,
    as transformers writes it, gives a model without one, and a warning. Raises ValueError, with names, for missing,
    unexpected or mis-shaped tensors, unreadable files and values that are not finite; then nothing is loaded.
    """
    folder = Path(path)
    config = load_config(folder)
    headers = {file: _read_header(file) for file in _files(folder)}
    config = _without_absent_mtp(config, headers)
    _check_headers(config, headers, folder)
    model = Glm45(config, device="meta")
    _materialise(model, dtype or _dominant_dtype(headers), torch.device(device))
    state = dict(model.state_dict(keep_vars=True))
    wanted = {entry.key: entry for entry in entries(config)}
    copies = {entry.key: entry for entry in duplicates(config)}
    for file, header in headers.items():
        with _open(file) as tensors:
            for key in header:
                if key in wanted:
                    _copy_in(tensors.get_tensor(key), wanted[key], state, file)
    _check_duplicates(headers, copies, state)
    model.set_compute_dtype(compute_dtype or model.embed_tokens.weight.dtype)
    return model


def best_device() -> torch.device:
    """Return the device that a model is answered with: a GPU where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _files(folder: Path) -> list[Path]:
    index = folder / INDEX_FILE
    if not index.is_file():
        single = folder / SINGLE_FILE
        if not single.is_file():
            raise FileNotFoundError(f"{folder} holds no weights: neither {SINGLE_FILE} nor {INDEX_FILE}")
        return [single]
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError, UnicodeDecodeError) as error:
        raise ValueError(f"{index} is not an index of shards: {error!r}") from None
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ValueError(f"{index} names a shard outside of its folder: {name!r}")
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: shard {name} is missing; copy or export the checkpoint again")
    return [folder / name for name in names]


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is damaged or cut short ({error}); copy or export it again") from None


def _read_header(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Return shape and dtype of every tensor of a file."""
    with _open(file) as tensors:
        slices = {key: tensors.get_slice(key) for key in tensors.keys()}  # noqa: SIM118 - not a dictionary
        return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}


Headers = Mapping[Path, Mapping[str, tuple[tuple[int, ...], str]]]


def _without_absent_mtp(config: ModelConfig, headers: Headers) -> ModelConfig:
    prefix = f"model.layers.{config.num_hidden_layers}."
    if not config.num_nextn_predict_layers or any(key.startswith(prefix) for h in headers.values() for key in h):
        return config
    warnings.warn("the checkpoint has no tensor of its MTP layer: loading without one", stacklevel=3)
    return ModelConfig.from_hub({**config.to_hub(), "num_nextn_predict_layers": 0})


def _check_headers(config: ModelConfig, headers: Headers, folder: Path) -> None:
    present: dict[str, tuple[tuple[int, ...], str]] = {}
    for file, header in headers.items():
        for key, what in header.items():
            if key in present:
                raise ValueError(f"{file.name} holds {key}, and so does another shard")
            present[key] = what
    expected = {entry.key: entry.shape for entry in entries(config)}
    optional = {entry.key: entry.shape for entry in duplicates(config)} if config.num_nextn_predict_layers else {}
    problems = []
    for title, keys in (
        ("missing", [key for key in expected if key not in present]),
        ("unexpected", [key for key in present if key not in expected and key not in optional]),
    ):
        if keys:
            problems.append(f"{len(keys)} {title}: {_some(keys)}")
    for key, (shape, dtype) in present.items():
        wanted = expected.get(key, optional.get(key, shape))
        if shape != wanted:
            problems.append(f"{key} has shape {list(shape)}, the configuration says {list(wanted)}")
        if dtype not in _DTYPES:
            problems.append(f"{key} is of dtype {dtype}, supported are {', '.join(_DTYPES)}")
    if problems:
        raise ValueError(f"{folder} does not fit its config.json: {_some(problems, '; ')}")


def _some(items: Sequence[str], separator: str = ", ") -> str:
    return separator.join(items[:5]) + (f" and {len(items) - 5} more" if len(items) > 5 else "")


def _dominant_dtype(headers: Headers) -> torch.dtype:
    """The dtype of the embedding, so that a lone fp32 tensor in a bf16 checkpoint decides nothing."""
    return next(
        _DTYPES[h["model.embed_tokens.weight"][1]] for h in headers.values() if "model.embed_tokens.weight" in h
    )


def _materialise(model: Glm45, dtype: torch.dtype, device: torch.device) -> None:
    """Give a model on the meta device uninitialised memory, buffers in fp32."""
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            empty = torch.empty(parameter.shape, dtype=dtype, device=device)
            setattr(module, name, torch.nn.Parameter(empty))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty(buffer.shape, dtype=torch.float32, device=device))


@torch.no_grad()
def _copy_in(tensor: torch.Tensor, entry: Entry, state: Mapping[str, torch.Tensor], file: Path) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"{file}: {entry.key} holds values that are not finite")
    target = state[entry.name][entry.index]
    target.copy_(tensor.view(target.shape))


def _check_duplicates(headers: Headers, copies: Mapping[str, Entry], state: Mapping[str, torch.Tensor]) -> None:
    for file, header in headers.items():
        with _open(file) as tensors:
            for key in copies.keys() & header.keys():
                ours = state[copies[key].name]
                if not torch.equal(tensors.get_tensor(key).to(ours.device, ours.dtype), ours):
                    raise ValueError(
                        f"{file}: {key} differs from {copies[key].name}; this model shares both, so it cannot hold it"
                    )


# --- writing ---------------------------------------------------------------------------------------------------------


def save(
    model: Glm45,
    path: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = 5 << 30,
    duplicate_mtp_head: bool = False,
    companions: Sequence[Path] = (),
) -> None:
    """Write a checkpoint folder in the hub layout, atomically: a killed save leaves the old folder or none.

    `dtype` converts the parameters (the correction bias stays fp32). `duplicate_mtp_head` writes GLM-4.5's copies of
    embedding and head into the MTP layer; GLM-4.6 and readers of today do without. `companions` are files to copy
    beside the weights, such as a tokenizer's. Raises OSError when the disk is full; the old folder then stays.
    """
    state = model.state_dict()

    def read(entry: Entry) -> torch.Tensor:
        tensor = state[entry.name]
        wide = entry.name.endswith("e_score_correction_bias")
        kept = tensor[entry.index].to("cpu", torch.float32 if wide else dtype or tensor.dtype)
        return kept.reshape(entry.shape).contiguous().clone()

    write(model.config, path, read, max_shard_bytes, duplicate_mtp_head, companions)


def write(
    config: ModelConfig,
    path: str | Path,
    read: Callable[[Entry], torch.Tensor],
    max_shard_bytes: int = 5 << 30,
    duplicate_mtp_head: bool = False,
    companions: Sequence[Path] = (),
) -> None:
    """Write a checkpoint whose tensors `read` gives one at a time (see `save`); memory stays within one shard."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    draft, replaced = (target.with_name(f".{target.name}.{kind}") for kind in ("saving", "replaced"))
    for leftover in (draft, replaced):  # of a save that was killed
        shutil.rmtree(leftover, ignore_errors=True)
    draft.mkdir()
    try:
        extra = duplicates(config) if duplicate_mtp_head and config.num_nextn_predict_layers else []
        dtype = _write_shards([*entries(config), *extra], draft, read, max_shard_bytes)
        _write_json(draft / "config.json", {**config.to_hub(), "dtype": str(dtype).removeprefix("torch.")})
        stops = {"eos_token_id": list(config.eos_token_id) or None, "pad_token_id": config.pad_token_id}
        _write_json(draft / "generation_config.json", {key: value for key, value in stops.items() if value is not None})
        for companion in companions:
            shutil.copy(companion, draft / companion.name)
        for file in draft.iterdir():
            _sync(file)
        if target.exists():
            target.rename(replaced)
        draft.rename(target)
        _sync(target.parent)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        if replaced.exists() and not target.exists():
            replaced.rename(target)
        raise
    shutil.rmtree(replaced, ignore_errors=True)


def _write_shards(
    order: Sequence[Entry], folder: Path, read: Callable[[Entry], torch.Tensor], max_shard_bytes: int
) -> torch.dtype:
    """Write the shards and their index; return the dtype of the embedding."""
    shards: list[list[str]] = []
    shard: dict[str, torch.Tensor] = {}
    total = held = 0
    dtype = None

    def flush() -> None:
        save_file(shard, folder / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(shard))
        shard.clear()

    for entry in order:
        tensor = read(entry)
        dtype = dtype or tensor.dtype
        size = tensor.numel() * tensor.element_size()
        if shard and held + size > max_shard_bytes:
            flush()
            held = 0
        shard[entry.key] = tensor
        held, total = held + size, total + size
    flush()
    if len(shards) == 1:
        (folder / "shard-0").rename(folder / SINGLE_FILE)
    else:
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(shards):
            name = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (folder / f"shard-{number}").rename(folder / name)
            weight_map |= dict.fromkeys(keys, name)
        _write_json(folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": weight_map})
    assert dtype is not None
    return dtype


def _write_json(file: Path, values: Any) -> None:
    file.write_text(json.dumps(values, indent=2) + "\n")


def _sync(path: Path) -> None:
    """Make sure that a file, or a folder's list of names, is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
