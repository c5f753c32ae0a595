"""Small shapes, and the independent implementation that they are compared with."""

import pytest
import torch

from glm45.config import from_dict
from glm45.model import hub
from glm45.model.config import ModelConfig
from glm45.model.transformer import Glm45

TINY = {
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 64,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 2.5,
    "use_qk_norm": True,
    "attention_bias": True,
    "rope_theta": 10_000.0,
    "max_position_embeddings": 128,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="session")
def tiny():
    """Return a function that makes a small configuration, with changes."""
    return lambda **changes: from_dict(ModelConfig, {**TINY, **changes})


@pytest.fixture(scope="session")
def make_model(tiny):
    """Return a function that makes a small model in which nothing is zero or one by default."""

    def make(seed=0, **changes):
        model = Glm45(tiny(**changes), seed=seed)
        generator = torch.Generator().manual_seed(seed + 1)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name.endswith(("bias", "norm.weight")) or parameter.dim() == 1:
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            for layer in model.moe_layers():
                layer.gate.e_score_correction_bias += 0.2 * torch.randn(layer.gate.weight.shape[0], generator=generator)
        return model

    return make


@pytest.fixture
def peer_of(tmp_path):
    """Return a function that gives the transformers model of the same weights, by way of a saved checkpoint."""
    from transformers import Glm4MoeForCausalLM

    def load(model, name="peer"):
        hub.save(model, tmp_path / name)
        peer = Glm4MoeForCausalLM.from_pretrained(tmp_path / name, dtype=torch.float32, attn_implementation="eager")
        peer.set_experts_implementation("eager")
        return peer

    return load


@pytest.fixture(scope="session")
def peer_tensors():
    """Return a function that fuses the peer's tensors (or their gradients) to our names and shapes."""

    def fuse(peer, model, of=lambda tensor: tensor.detach()):
        theirs = {name.removeprefix("model."): of(tensor) for name, tensor in peer.named_parameters()}
        fused = {}
        for name, ours in model.named_parameters():
            if name.startswith("mtp."):
                continue
            if "qkv_proj" in name:
                groups = ours.shape[0]
                q, k, v = (theirs[name.replace("qkv_proj", f"{letter}_proj")] for letter in "qkv")
                rest = ours.shape[2:]
                parts = [q.view(groups, -1, *rest), k.view(groups, 1, *rest), v.view(groups, 1, *rest)]
                fused[name] = torch.cat(parts, dim=1)
            elif "gate_up_proj" in name and name not in theirs:
                gate, up = (theirs[name.replace("gate_up_proj", f"{part}_proj")] for part in ("gate", "up"))
                fused[name] = torch.stack([gate, up])
            else:
                fused[name] = theirs[name].view(ours.shape)
        return fused

    return fuse
