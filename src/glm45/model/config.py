"""The shape of a model, in Hugging Face's field names, and the presets."""

import dataclasses
import difflib
from typing import Any

from glm45.config import configuration, from_dict

MODEL_TYPE = "glm4_moe"


@configuration
class ModelConfig:
    """Shape of a GLM-4.5-class model (report Table 1; field names of `Glm4MoeConfig`).

    Raises ValueError where fields contradict each other, saying what to change.
    """

    vocab_size: int
    """Rows of the embedding and of the output head, padding included."""
    hidden_size: int
    """Width of the residual stream."""
    intermediate_size: int
    """Width of the feed-forward part of the dense first layers."""
    moe_intermediate_size: int
    """Width of one expert; the shared expert is `n_shared_experts` times as wide."""
    num_hidden_layers: int
    """Decoder layers, the multi-token prediction layer not counted."""
    first_k_dense_replace: int
    """How many of the first layers have a dense feed-forward part instead of experts."""
    num_attention_heads: int
    """Query heads. In the report 2.4 times `hidden_size / head_dim`."""
    num_key_value_heads: int
    """Key/value heads; each serves `num_attention_heads / num_key_value_heads` query heads."""
    head_dim: int
    """Width of one head. Never derived: 5120 / 96 is not an integer."""
    n_routed_experts: int
    """Routed experts a layer."""
    num_experts_per_tok: int
    """Routed experts that a token goes to."""
    n_shared_experts: int = 1
    """Experts that every token goes to, held as one wider expert."""
    n_group: int = 1
    """Groups that the experts are divided into for group-limited selection; 1 turns it off."""
    topk_group: int = 1
    """Groups from which a token's experts may come."""
    norm_topk_prob: bool = True
    """Whether the chosen experts' weights are normalised to sum to one, before scaling."""
    routed_scaling_factor: float = 1.0
    """Factor on the routed experts' sum; the shared expert is not scaled."""
    use_qk_norm: bool = False
    """Per-head RMSNorm of queries and keys, after the bias and before RoPE (report section 2.1)."""
    attention_bias: bool = True
    """Bias of the query, key and value projections; the output projection never has one."""
    partial_rotary_factor: float = 0.5
    """Share of `head_dim` that RoPE rotates; the rest passes through."""
    rope_theta: float = 1_000_000.0
    """RoPE base: 10,000 in pre-training, 1,000,000 from 32K on (report section 2.4)."""
    max_position_embeddings: int = 131_072
    """Longest sequence in tokens that the model is meant for."""
    rms_norm_eps: float = 1e-5
    """Epsilon of every RMSNorm."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights. Not in the report; from the published configuration."""
    num_nextn_predict_layers: int = 1
    """Multi-token prediction layers: 0 or 1."""
    eos_token_id: tuple[int, ...] = ()
    """Token ids that end a generation: `<|endoftext|>`, `<|user|>` and `<|observation|>`."""
    pad_token_id: int | None = None
    """Token id of padding; its embedding is trained like any other."""

    def __post_init__(self) -> None:
        problems = [message for holds, message in self._checks() if not holds]
        if problems:
            raise ValueError("; ".join(problems))

    def _checks(self) -> list[tuple[bool, str]]:
        """Pairs of a condition that must hold and what to change if it does not."""
        counts = (
            *("vocab_size", "hidden_size", "intermediate_size", "moe_intermediate_size", "num_hidden_layers"),
            *("num_attention_heads", "num_key_value_heads", "head_dim", "n_routed_experts", "num_experts_per_tok"),
            *("n_group", "topk_group", "max_position_embeddings"),
        )
        checks = [
            (getattr(self, name) >= 1, f"{name} is {getattr(self, name)}: set it to 1 or more") for name in counts
        ]
        if not all(holds for holds, _ in checks):
            return checks  # the ratios below would divide by zero
        heads, kv_heads, groups = self.num_attention_heads, self.num_key_value_heads, self.n_group
        experts_in_reach = self.n_routed_experts // groups * self.topk_group
        return [
            *checks,
            (
                heads % kv_heads == 0,
                f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}: change one of them",
            ),
            (
                self.rotary_dim > 0 and self.rotary_dim % 2 == 0 and 0 < self.partial_rotary_factor <= 1,
                f"partial_rotary_factor {self.partial_rotary_factor} of head_dim {self.head_dim} rotates "
                f"{self.rotary_dim} dimensions: choose them so that this is even, above 0 and at most head_dim",
            ),
            (
                0 <= self.first_k_dense_replace <= self.num_hidden_layers,
                f"first_k_dense_replace {self.first_k_dense_replace} must lie between 0 and num_hidden_layers "
                f"{self.num_hidden_layers}",
            ),
            (
                self.n_routed_experts % groups == 0,
                f"n_routed_experts {self.n_routed_experts} is not a multiple of n_group {groups}: change one of them",
            ),
            (
                groups == 1 or self.n_routed_experts // groups >= 2,
                f"n_group {groups} leaves fewer than 2 of {self.n_routed_experts} experts a group, and a group's "
                "score is the sum of its best two: use fewer groups",
            ),
            (self.topk_group <= groups, f"topk_group {self.topk_group} exceeds n_group {groups}: lower it"),
            (
                self.num_experts_per_tok <= experts_in_reach,
                f"num_experts_per_tok {self.num_experts_per_tok} exceeds the {experts_in_reach} experts within reach "
                "of a token: lower it, or raise n_routed_experts or topk_group",
            ),
            (self.n_shared_experts >= 0, f"n_shared_experts is {self.n_shared_experts}: set it to 0 or more"),
            (
                self.num_nextn_predict_layers in (0, 1),
                f"num_nextn_predict_layers is {self.num_nextn_predict_layers}: the report has one MTP layer, so 0 or 1",
            ),
            (self.rope_theta > 1, f"rope_theta is {self.rope_theta}: set it above 1, for example 10000"),
            (self.rms_norm_eps > 0, f"rms_norm_eps is {self.rms_norm_eps}: set it above 0, for example 1e-5"),
            (self.initializer_range > 0, f"initializer_range is {self.initializer_range}: set it above 0"),
        ]

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that RoPE rotates."""
        return int(self.head_dim * self.partial_rotary_factor)

    @property
    def num_moe_layers(self) -> int:
        """Layers with experts, the multi-token prediction layer included."""
        return self.num_hidden_layers - self.first_k_dense_replace + self.num_nextn_predict_layers

    @classmethod
    def from_hub(cls, values: dict[str, Any]) -> "ModelConfig":
        """Read a hub `config.json`, of GLM-4.5 or as transformers 5 writes it.

        Keys that say nothing about the shape are ignored. Raises ValueError for another `model_type`, for a missing
        key that has no safe default (`head_dim`, `rope_theta`) and for features this model does not have.
        """
        if values.get("model_type", MODEL_TYPE) != MODEL_TYPE:
            raise ValueError(f"config.json: model_type is {values['model_type']!r}, expected {MODEL_TYPE!r}")
        _refuse_foreign_features(values)
        rope = values.get("rope_parameters") or {}
        known = {field.name for field in dataclasses.fields(cls)}
        shape = {key: value for key, value in values.items() if key in known and value is not None}
        for key in ("rope_theta", "partial_rotary_factor"):
            if key in rope:
                shape[key] = rope[key]
        if isinstance(shape.get("eos_token_id"), int):
            shape["eos_token_id"] = [shape["eos_token_id"]]
        # Readers of this format disagree about these defaults, so a file that leaves them out is not trusted.
        for key in ("head_dim", "rope_theta"):
            if key not in shape:
                raise ValueError(f"config.json has no {key}: write it, since the usual default is wrong for GLM-4.5")
        shape.setdefault("attention_bias", False)
        shape.setdefault("num_nextn_predict_layers", 0)
        return from_dict(cls, shape)

    def to_hub(self) -> dict[str, Any]:
        """Return the `config.json` of this shape; `from_hub` reads it back to an equal value."""
        values = dataclasses.asdict(self)
        values["eos_token_id"] = list(self.eos_token_id) or None
        rope = {"rope_type": "default", "rope_theta": self.rope_theta}
        return {
            "architectures": ["Glm4MoeForCausalLM"],
            "model_type": MODEL_TYPE,
            **values,
            "rope_parameters": {**rope, "partial_rotary_factor": self.partial_rotary_factor},
            "rope_scaling": None,
            "hidden_act": "silu",
            "attention_dropout": 0.0,
            "tie_word_embeddings": False,
            "use_cache": True,
        }


def _refuse_foreign_features(values: dict[str, Any]) -> None:
    wanted = {"hidden_act": "silu", "tie_word_embeddings": False, "attention_dropout": 0.0, "rope_scaling": None}
    wanted |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
    for key, value in wanted.items():
        if values.get(key, value) != value:
            raise ValueError(f"config.json: {key} is {values[key]!r}; this model supports only {value!r}")
    rope_type = (values.get("rope_parameters") or {}).get("rope_type", "default")
    if rope_type != "default":
        raise ValueError(f"config.json: rope_type is {rope_type!r}; this model supports only 'default'")


_GLM_EOS = (151329, 151336, 151338)  # <|endoftext|>, <|user|>, <|observation|>

_SMALL = {
    "use_qk_norm": True,
    "routed_scaling_factor": 2.5,
    "rope_theta": 10_000.0,  # the report's base before the switch to long sequences
    "first_k_dense_replace": 1,
}

PRESETS: dict[str, dict[str, Any]] = {
    "glm-4.5": {
        "vocab_size": 151_552,
        "hidden_size": 5120,
        "intermediate_size": 12_288,
        "moe_intermediate_size": 1536,
        "num_hidden_layers": 92,
        "first_k_dense_replace": 3,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 160,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 2.5,
        "use_qk_norm": True,
        "eos_token_id": _GLM_EOS,
        "pad_token_id": 151329,
    },
    "glm-4.5-air": {
        "vocab_size": 151_552,
        "hidden_size": 4096,
        "intermediate_size": 10_944,
        "moe_intermediate_size": 1408,
        "num_hidden_layers": 46,
        "first_k_dense_replace": 1,
        "num_attention_heads": 96,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "n_routed_experts": 128,
        "num_experts_per_tok": 8,
        "routed_scaling_factor": 1.0,
        "use_qk_norm": False,
        "eos_token_id": _GLM_EOS,
        "pad_token_id": 151329,
    },
    "mini": {
        **_SMALL,
        "vocab_size": 32_768,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "moe_intermediate_size": 384,
        "num_hidden_layers": 12,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "n_routed_experts": 64,
        "num_experts_per_tok": 4,
        "max_position_embeddings": 32_768,
    },
    "nano": {
        **_SMALL,
        "vocab_size": 8192,
        "hidden_size": 320,
        "intermediate_size": 960,
        "moe_intermediate_size": 160,
        "num_hidden_layers": 8,
        "num_attention_heads": 10,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "n_routed_experts": 16,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 8192,
    },
    "demo": {
        **_SMALL,
        "vocab_size": 2048,
        "hidden_size": 128,
        "intermediate_size": 256,
        "moe_intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 4096,
    },
    "pico": {
        **_SMALL,
        "vocab_size": 320,
        "hidden_size": 32,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 512,
    },
}
"""The published shapes, exact, and small ones after GLM-4.5: QK-norm, biases, scaling 2.5, wide attention."""


def preset(name: str) -> ModelConfig:
    """Return a preset by name. Raises ValueError with the known names."""
    if name not in PRESETS:
        near = difflib.get_close_matches(name, PRESETS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"no preset {name!r}; {hint}known: {', '.join(PRESETS)}")
    return from_dict(ModelConfig, PRESETS[name])
