"""A tiny policy, a tokenizer and judged samples for the tests of this room."""

import random

import pytest
import torch

from glm45.environments.arithmetic import arithmetic_tasks
from glm45.environments.protocol import Reward, assistant
from glm45.model.config import ModelConfig
from glm45.model.transformer import Glm45
from glm45.rl.sample import Sample
from glm45.text.tokenizer import Tokenizer
from glm45.training.layout import Layout
from glm45.training.parallel import World

SHAPE = {
    "vocab_size": 384,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "num_hidden_layers": 2,
    "first_k_dense_replace": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "use_qk_norm": True,
    "max_position_embeddings": 512,
    "initializer_range": 0.1,
}


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.train(["47+85=? 7+5=12 4+8+1=13"] * 4, vocab_size=293)


@pytest.fixture
def make_model(tokenizer):
    def make(seed: int = 0, **changes) -> Glm45:
        shape = {**SHAPE, "eos_token_id": tuple(tokenizer.eos_token_ids), **changes}
        return Glm45(ModelConfig(**shape), seed=seed).eval()

    return make


@pytest.fixture
def world():
    return World.start(Layout())


@pytest.fixture
def groups():
    """Four groups of uneven sizes with random tokens, rewards, and rollout log-probabilities."""
    source = random.Random(3)
    made = []
    for group_id, task in enumerate(arithmetic_tasks(1, 4)):
        group = []
        for index in range(3 + group_id % 2):
            sample = Sample(task=task, group_id=group_id, index=index)
            sample.append_context([source.randrange(300) for _ in range(5)], task.messages)
            length = source.randint(2, 9)
            tokens = [source.randrange(300) for _ in range(length)]
            logprobs = [-source.random() for _ in range(length)]
            sample.append_generated(tokens, logprobs, assistant("?"), 0, truncated=index == 0)
            sample.metadata["temperature"] = 0.8 if group_id == 1 else 1.0
            sample.judge(Reward(float(source.random() > 0.5) + index * 0.1))
            group.append(sample)
        made.append(group)
    return made


@pytest.fixture
def gradients():
    def of(model: Glm45) -> dict[str, torch.Tensor]:
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    return of
