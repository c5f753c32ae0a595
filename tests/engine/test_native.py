"""The native backend computes what the model computes, bit for bit the same whatever the batch."""

import dataclasses

import numpy as np
import pytest
import torch

from glm45.engine.backend import ModelBackend
from glm45.engine.batch import Batch
from glm45.engine.engine import Engine, EngineConfig
from glm45.engine.native import NativeBackend, why_not
from glm45.engine.request import Request, SamplingParams, Sequence
from glm45.engine.sampling import Draws, probabilities
from glm45.kernels import decode
from glm45.model.config import preset
from glm45.model.transformer import Glm45

pytestmark = pytest.mark.skipif(not decode.is_available(False), reason="no native kernels here")

SHAPES = {
    "pico": {},
    "air": {"use_qk_norm": False, "routed_scaling_factor": 1.0, "norm_topk_prob": False, "attention_bias": False},
    "wide": {"head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 1, "hidden_size": 80, "vocab_size": 333},
    "odd": {"moe_intermediate_size": 40, "intermediate_size": 72, "n_shared_experts": 2, "partial_rotary_factor": 1.0},
    "bare": {"n_shared_experts": 0, "first_k_dense_replace": 0, "n_routed_experts": 7, "num_experts_per_tok": 3},
}


def model_of(name, compute_dtype=torch.float32):
    values = {**preset("pico").to_hub(), "rope_parameters": None, **SHAPES[name]}
    model = Glm45(type(preset("pico")).from_hub(values), compute_dtype=compute_dtype, seed=3)
    with torch.no_grad():
        for i, parameter in enumerate(model.parameters()):
            noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
            parameter.mul_(1 if parameter.dim() == 1 else 4).add_(0.1 * noise if parameter.dim() != 3 else 0)
        for moe in model.moe_layers():
            moe.gate.e_score_correction_bias.uniform_(-0.1, 0.1)
    return model


def sequences(lengths):
    """Sequences with blocks dealt out in a scrambled order."""
    order, made = list(range(63, -1, -1)), []
    for length in lengths:
        made.append(sequence := Sequence.of(Request("r", [0] * length, SamplingParams()), 0, 0))
        for _ in range(length // 16 + 1):
            sequence.table.blocks.append(order.pop(len(order) // 2))
    return made


def chunks(made, starts, counts, **layout):
    """A batch of `counts[i]` tokens of each sequence from `starts[i]` on; tokens follow from the place alone."""
    tokens = [
        [(7 * i + 3 * t) % 320 for t in range(s, s + c)] for i, (s, c) in enumerate(zip(starts, counts, strict=True))
    ]
    kept = [i for i, count in enumerate(counts) if count]
    return Batch.of([made[i] for i in kept], [tokens[i] for i in kept], [starts[i] for i in kept], **layout)


@pytest.mark.parametrize("shape", SHAPES)
def test_hidden_states_logits_and_drafts_are_the_models(shape):
    model = model_of(shape)
    made = sequences([37, 5, 18])
    plain, native = ModelBackend(model, 64, 16), NativeBackend(model, 64, 16, 2, 512)
    # A first chunk of every prompt, then decoding and the rest of a prompt side by side.
    for starts, counts in [((0, 0, 0), (30, 5, 1)), ((30, 0, 1), (7, 0, 16)), ((36, 4, 17), (1, 1, 1))]:
        batch = chunks(made, starts, counts)
        expected, hidden = plain.forward(batch), native.forward(batch)
        torch.testing.assert_close(hidden, expected, atol=2e-5, rtol=2e-5)
        torch.testing.assert_close(
            torch.log_softmax(native.logits(hidden), -1),
            torch.log_softmax(plain.logits(expected), -1),
            atol=1e-5,
            rtol=0,
        )
        # The MTP layer: its row for position i is stored at slot i + 1, where the tables have room for it.
        shifted = chunks(made, [s + 1 for s in starts], counts, position_shift=-1, first_slot=1)
        draws = Draws(np.array([0, 0.7], np.float32), *np.array([[1, 2], [3, 4]], np.uint64), [[], []], [None, None])
        chosen = [0, len(shifted.starts_S1) - 2]  # the first sequence and the last
        tokens, probs_SKV = native.draft(shifted, hidden, chosen, draws, 3)
        expected_tokens, expected_SKV = plain.draft(shifted, expected, chosen, draws, 3)
        assert tokens == expected_tokens
        torch.testing.assert_close(probs_SKV, expected_SKV, atol=5e-5, rtol=0)
        assert native.draft(shifted, hidden, [], Draws.of([]), 3)[0] == []


@pytest.mark.parametrize("num_threads", [1, 2, 3])
def test_results_are_bitwise_equal_for_any_batch_chunk_and_number_of_threads(num_threads):
    model = model_of("pico")
    alone, together = NativeBackend(model, 64, 16, 1, 512), NativeBackend(model, 64, 16, num_threads, 512)
    made = sequences([70, 61, 33])
    whole = together.forward(chunks(made, (0, 0, 0), (70, 61, 33))).clone()
    logits = together.logits(whole)
    row = 0
    for i, length in enumerate([70, 61, 33]):
        for start in range(0, length, 7):
            counts = [0, 0, 0]
            counts[i] = min(7, length - start)
            hidden = alone.forward(chunks(made, [start] * 3, counts))
            assert torch.equal(hidden, whole[row : row + counts[i]])
            assert torch.equal(alone.logits(hidden), logits[row : row + counts[i]])
            row += counts[i]


def test_sampling_and_verifying_agree_with_the_reference_and_end_at_the_vocabulary():
    model = model_of("wide")  # 333 tokens: not a multiple of anything
    plain, native = ModelBackend(model, 1, 16), NativeBackend(model, 1, 16, 2, 512)
    generator = torch.Generator().manual_seed(0)
    counts = [i // 4 % 4 for i in range(400)]
    logits = native.logits(torch.randn(400 + sum(counts), 80, generator=generator))
    temperatures = np.tile(np.array([0, 1, 0.3, 2.5], np.float32), 100)
    seeds, positions = np.arange(400, dtype=np.uint64) * 977, np.arange(400, dtype=np.uint64)
    drafts, draft_probs, start = [], [], 0
    for count, temperature in zip(counts, temperatures, strict=True):
        probs_KV = torch.zeros(count, 384)[:, :333]  # rows are padded, as the kernel's own
        noise_KV = 0.1 * torch.randn(count, 333, generator=generator)
        probs_KV += probabilities(logits[start : start + count] + noise_KV, np.full(count, temperature))
        drafts.append(probs_KV.multinomial(1, generator=generator)[:, 0].tolist() if count else [])
        draft_probs.append(probs_KV)
        start += count + 1
    draws = Draws(temperatures, seeds, positions, drafts, draft_probs)
    tokens, logprobs = native.sample(logits, draws)
    expected_tokens, expected_logprobs = plain.sample(logits, draws)
    assert tokens == expected_tokens
    assert np.concatenate(logprobs) == pytest.approx(np.concatenate(expected_logprobs), abs=1e-5)
    assert len({row[-1] for row in tokens}) > 50
    assert {len(row) for row, count in zip(tokens, counts, strict=True) if count == 3} == {1, 2, 3, 4}


@pytest.mark.skipif(not decode.is_available(True), reason="needs AVX512-BF16")
def test_in_bf16_it_is_as_near_to_fp32_as_the_model_is():
    exact, rough = model_of("pico"), model_of("pico", torch.bfloat16)
    made = sequences([40])
    batch = chunks(made, (0,), (40,))
    truth = ModelBackend(exact, 64, 16)
    expected = torch.log_softmax(truth.logits(truth.forward(batch)), -1)
    errors = {}
    for backend in (ModelBackend(rough, 64, 16), NativeBackend(rough, 64, 16, 1, 512)):
        logprobs = torch.log_softmax(backend.logits(backend.forward(batch)), -1)
        errors[backend.name] = (logprobs - expected).abs().mean().item()
    assert 0 < errors["native"] < 1.2 * errors["model"]


def test_what_it_cannot_serve_is_said_and_auto_falls_back():
    model = model_of("pico")
    assert why_not(model, 16) is None
    assert "block_size is 8" in why_not(model, 8)
    double = Glm45(dataclasses.replace(preset("pico")), compute_dtype=torch.float64).double()
    with Engine(double, None, EngineConfig()) as engine:
        assert engine.stats()["backend"] == "model"
    with pytest.raises(ValueError, match=r"torch.float64; use backend='model'"):
        Engine(double, None, EngineConfig(backend="native"))
