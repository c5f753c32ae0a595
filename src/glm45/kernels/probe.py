"""What runs on this machine, and why: the choices that `glm45 inspect --kernels` prints."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from glm45.kernels import native, products
from glm45.kernels.attention import varlen_attention
from glm45.kernels.experts import grouped_products

MIN_BF16_HIDDEN = 256
"""Below this hidden size bf16 products do not pay on CPU: casting costs what multiplying saves."""
MIN_BF16_GAIN = 1.25
"""How much faster than fp32 ones bf16 products must be to pay on CPU; otherwise fp32 costs nothing and is exact."""


@dataclass(frozen=True)
class Choice:
    """One operator on one kind of device."""

    operator: str
    device: str
    chosen: str
    reason: str


def choices() -> list[Choice]:
    """Return what every operator takes on CPU and, where there is one, on the GPU."""
    found = [
        *(Choice(operator, "cpu", *_native_choice()) for operator in NATIVE_OPERATORS),
        Choice("experts", "cpu", *_experts_choice()),
        Choice("bf16 products", "cpu", products.bf16_unit(), _rates()),
        Choice("training", "cpu", *_training_choice()),
    ]
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        attention = "varlen_attn" if varlen_attention() else "scaled_dot_product_attention with a mask"
        experts = "grouped_mm" if grouped_products() else "a loop over experts"
        found += [
            Choice("attention", name, attention, "for bf16 packed rows; sdpa for plain rows and other dtypes"),
            Choice("experts", name, experts, "for bf16; a loop over experts for other dtypes"),
            Choice("norms, SwiGLU, rotation", name, "reference", "torch's own operators"),
            Choice("cross-entropy", name, "reference in chunks", "logits of one chunk at a time"),
        ]
    return found


NATIVE_OPERATORS = ("attention", "norms", "SwiGLU", "rotation and QK-norm", "cross-entropy")


def preferred_compute_dtype(hidden_size: int, device: torch.device | str = "cpu") -> torch.dtype:
    """Return the dtype that trains a model of this size fastest here: bf16 on a GPU, on CPU if its products pay."""
    if torch.device(device).type != "cpu":
        return torch.bfloat16
    pays = hidden_size >= MIN_BF16_HIDDEN and _bf16_gain() > MIN_BF16_GAIN
    return torch.bfloat16 if pays else torch.float32


def report() -> str:
    """Return the choices as text, one line an operator."""
    rows = [(c.operator, c.device, c.chosen, c.reason) for c in choices()]
    widths = [max(len(row[i]) for row in rows) for i in range(3)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, [*widths, 0], strict=True)).rstrip() for row in rows
    ]
    present = ", ".join(f"{name} {'yes' if there else 'no'}" for name, there in features().items())
    return "\n".join([*lines, f"torch {torch.__version__}: {present}"])


def features() -> dict[str, bool]:
    """Return the optional features of torch that were looked for."""
    return {
        "grouped_mm": grouped_products() is not None,
        "varlen_attn": varlen_attention() is not None,
        "linear_cross_entropy": hasattr(F, "linear_cross_entropy"),
        "CUDA": torch.cuda.is_available(),
    }


def _native_choice() -> tuple[str, str]:
    status = native.status()
    return ("native" if status.library else "reference"), status.reason


def _experts_choice() -> tuple[str, str]:
    chosen, reason = _native_choice()
    if chosen == "reference" and grouped_products():
        return "grouped_mm", reason
    return chosen, reason


def _training_choice() -> tuple[str, str]:
    gain = _bf16_gain()
    chosen = f"bf16 from hidden size {MIN_BF16_HIDDEN} on" if gain > MIN_BF16_GAIN else "fp32"
    return chosen, f"bf16 products at {gain:.2f} times the speed of fp32 ones; {MIN_BF16_GAIN} pays"


def _bf16_gain() -> float:
    """Return how much faster bf16 products are than fp32 ones, 0 where there are no native ones."""
    if native.library() is None:
        return 0.0
    rates = products.rates()
    return rates[products.bf16_unit()] / rates["torch fp32"]


def _rates() -> str:
    if native.library() is None:
        return "no native products to compare with"
    return ", ".join(f"{unit} {rate / 1e9:.0f} GF/s" for unit, rate in products.rates().items())
