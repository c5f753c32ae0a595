"""A small model whose distributions are neither flat nor sharp, and what the engine's answers are checked against."""

import pytest
import torch

from glm45.engine.engine import Engine, EngineConfig
from glm45.model.config import preset
from glm45.model.transformer import Glm45


@pytest.fixture(scope="session")
def model():
    torch.manual_seed(0)
    model = Glm45(preset("pico"), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 4.0)
        for layer in model.decoder_layers():
            layer.self_attn.qkv_proj.bias.normal_(0, 0.3)
            layer.input_layernorm.weight.uniform_(0.5, 1.5)
        for moe in model.moe_layers():
            moe.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    return model


@pytest.fixture(scope="session")
def prompts():
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 320, (n,), generator=generator).tolist() for n in (3, 20, 33, 50, 7, 1)]


@pytest.fixture
def build(model):
    """Build engines of the session's model and close them at the end; none may keep a block."""
    engines = []

    def build(tokenizer=None, backend="model", of=None, **config):
        engines.append(Engine(of or model, tokenizer, EngineConfig(backend=backend, **config)))
        return engines[-1]

    yield build
    for engine in engines:
        engine.close()
        assert engine.stats()["blocks_in_use"] == 0
        assert engine.stats()["running"] == engine.stats()["waiting"] == 0


@pytest.fixture(scope="session")
def forward_logprobs():
    """The training forward's log-probabilities of a completion, without any cache."""

    def forward_logprobs(model, prompt_ids, token_ids, temperature=1.0):
        tokens = torch.tensor([prompt_ids + token_ids])
        with torch.no_grad():
            logits = model(tokens).logits_BTV[0].float() / (temperature or 1.0)
        rows = range(len(prompt_ids) - 1, len(prompt_ids) - 1 + len(token_ids))
        return torch.log_softmax(logits, -1)[rows, token_ids]

    return forward_logprobs
