"""Counting a model from its shape alone: parameters, operations, cache bytes."""

from dataclasses import asdict, dataclass
from typing import Any

from glm45.model.config import ModelConfig


@dataclass(frozen=True)
class Census:
    """Sizes of a model. The report counts parameters without embedding and head (Table 1)."""

    components: dict[str, int]
    """Parameters by component; routing biases, which are buffers, are not counted."""
    total: int
    """All parameters, the MTP layer, embedding and head included."""
    without_embeddings: int
    """All parameters but embedding and head, the MTP layer included: the report's way for GLM-4.5."""
    without_embeddings_and_mtp: int
    """The same without the MTP layer: the report's way for GLM-4.5-Air."""
    active: int
    """Parameters that a token passes through, without embedding, head and MTP layer: "activated" in the report."""
    active_with_mtp: int
    """The same with the MTP layer."""

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as a dictionary."""
        return asdict(self)


def census(config: ModelConfig) -> Census:
    """Count the parameters of a shape."""
    hidden, layers, dense = config.hidden_size, config.num_hidden_layers, config.first_k_dense_replace
    moe, mtp = layers - dense, config.num_nextn_predict_layers
    expert = 3 * hidden * config.moe_intermediate_size
    attention = _attention(config)
    dense_mlp = 3 * hidden * config.intermediate_size
    shared = config.n_shared_experts * expert
    router = config.n_routed_experts * hidden
    routed = config.n_routed_experts * expert
    mtp_extra = 2 * hidden * hidden + 3 * hidden  # eh_proj; enorm, hnorm and the norm before the head
    mtp_layer = attention + 2 * hidden + router + shared + routed + mtp_extra
    components = {
        "embedding": config.vocab_size * hidden,
        "head": config.vocab_size * hidden,
        "attention": layers * attention,
        "norms": layers * 2 * hidden + hidden,
        "dense feed-forward": dense * dense_mlp,
        "routers": moe * router,
        "shared experts": moe * shared,
        "routed experts": moe * routed,
        "multi-token prediction": mtp * mtp_layer,
    }
    total = sum(components.values())
    body = total - components["embedding"] - components["head"]
    main = body - components["multi-token prediction"]
    idle = (config.n_routed_experts - config.num_experts_per_tok) * expert
    active = main - moe * idle
    return Census(components, total, body, main, active, active + mtp * (mtp_layer - idle))


def _attention(config: ModelConfig) -> int:
    """Parameters of one attention block."""
    q_size = config.num_attention_heads * config.head_dim
    kv_size = 2 * config.num_key_value_heads * config.head_dim
    biases = (q_size + kv_size) * config.attention_bias
    return config.hidden_size * (2 * q_size + kv_size) + biases + 2 * config.head_dim * config.use_qk_norm


def _vectors(config: ModelConfig, *, mtp: bool) -> int:
    """Active parameters that are in no matrix product: norms and biases."""
    heads = config.num_attention_heads + 2 * config.num_key_value_heads
    layer = 2 * config.hidden_size + heads * config.head_dim * config.attention_bias
    layer += 2 * config.head_dim * config.use_qk_norm
    layers, norms = config.num_hidden_layers + mtp, 1 + 3 * mtp
    return layers * layer + norms * config.hidden_size


def forward_flops_per_token(config: ModelConfig, length: int, *, mtp: bool = False) -> float:
    """Return the floating-point operations of one token's forward pass, averaged over a sequence of `length`.

    A product of `[m, k]` with `[k, n]` counts 2mkn; norms, rotation, softmax and routing are left out. Causal
    attention reads `(length + 1) / 2` tokens on average. The head counts, the embedding, a look-up, does not. With
    `mtp` the MTP layer and its pass through the head are added.
    """
    counted = census(config)
    heads = 2 * config.hidden_size * config.vocab_size
    attended = 4 * config.num_attention_heads * config.head_dim * (length + 1) / 2
    active = counted.active_with_mtp if mtp else counted.active
    return 2 * (active - _vectors(config, mtp=mtp)) + (1 + mtp) * heads + attended * (config.num_hidden_layers + mtp)


def training_flops_per_token(config: ModelConfig, length: int, *, mtp: bool = True) -> float:
    """Return the operations of one token's training step: forward once, backward twice as much, no recomputation."""
    return 3 * forward_flops_per_token(config, length, mtp=mtp and bool(config.num_nextn_predict_layers))


def decoding_flops_per_token(config: ModelConfig, length: int) -> float:
    """Return the operations of decoding one token after `length` others."""
    attended = 4 * config.num_attention_heads * config.head_dim * (length + 1) * config.num_hidden_layers
    matrices = census(config).active - _vectors(config, mtp=False)
    return 2 * matrices + 2 * config.hidden_size * config.vocab_size + attended


def cache_bytes_per_token(config: ModelConfig, bytes_per_value: int = 2, *, mtp: bool = False) -> int:
    """Return the bytes of keys and values that one token occupies, by default in bf16."""
    layers = config.num_hidden_layers + (config.num_nextn_predict_layers if mtp else 0)
    return layers * 2 * config.num_key_value_heads * config.head_dim * bytes_per_value


def describe(config: ModelConfig, length: int) -> dict[str, Any]:
    """Return everything counted here as a JSON-ready dictionary, for sequences of `length` tokens."""
    return {
        "parameters": census(config).to_dict(),
        "sequence_length": length,
        "forward_flops_per_token": forward_flops_per_token(config, length),
        "training_flops_per_token": training_flops_per_token(config, length),
        "decoding_flops_per_token": decoding_flops_per_token(config, length),
        "cache_bytes_per_token_bf16": cache_bytes_per_token(config),
    }


def summary(name: str, config: ModelConfig, length: int) -> str:
    """Return the same for people to read."""
    counted = census(config)
    flops = f"at {length:,} tokens"
    rows = [
        *((component, _short(count)) for component, count in counted.components.items()),
        ("", ""),
        ("total", _short(counted.total)),
        ("without embedding and head", _short(counted.without_embeddings)),
        ("  and without the MTP layer", _short(counted.without_embeddings_and_mtp)),
        ("activated (report's count)", _short(counted.active)),
        ("  with the MTP layer", _short(counted.active_with_mtp)),
        ("", ""),
        (f"forward FLOP per token {flops}", _short(forward_flops_per_token(config, length))),
        (f"training FLOP per token {flops}", _short(training_flops_per_token(config, length))),
        (f"decoding FLOP per token {flops}", _short(decoding_flops_per_token(config, length))),
        ("cache bytes per token, bf16", _short(cache_bytes_per_token(config))),
    ]
    width = max(len(label) for label, _ in rows)
    return "\n".join([name, *(f"  {label:<{width}}  {value:>9}".rstrip() for label, value in rows)])


def _short(number: float) -> str:
    """Four significant digits with a unit: 355233991936 is 355.2 B."""
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "K")):
        if number >= size:
            return f"{number / size:#.4g} {unit}"
    return f"{number:.4g}  "
