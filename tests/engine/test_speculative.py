"""Drafts change how fast tokens come, never which tokens are likely."""

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch
from scipy.stats import chisquare

from glm45.engine.request import Request, SamplingParams, Sequence
from glm45.engine.sampling import Draws, verify
from glm45.kernels import decode
from glm45.model.config import preset
from glm45.model.transformer import Glm45

BACKENDS = ["model"] + ["native"] * decode.is_available(False)


def drafted(seed, draft_probs, drafts):
    sequence = Sequence.of(Request("r", [0], SamplingParams()), 0, seed)
    sequence.drafts, sequence.draft_probs = drafts, draft_probs
    return sequence


def test_verified_tokens_follow_the_target_whatever_the_drafts_distribution():
    generator = torch.Generator().manual_seed(0)
    target = torch.softmax(2 * torch.randn(3, 6, generator=generator).double(), -1)  # after each draft
    proposal = torch.softmax(2 * torch.randn(2, 6, generator=generator).double(), -1)
    count = 6_000
    drawn = torch.stack([torch.multinomial(row, count, replacement=True, generator=generator) for row in proposal], 1)
    sequences = [drafted(i, proposal, drawn[i].tolist()) for i in range(count)]
    tokens = verify(target.repeat(count, 1), Draws.of(sequences))
    firsts = torch.bincount(torch.tensor([row[0] for row in tokens]), minlength=6)
    assert chisquare(firsts.numpy(), count * target[0].numpy()).pvalue > 1e-3
    # The second token, whether accepted or drawn, follows its own target; it exists where the first draft was kept.
    seconds = torch.bincount(torch.tensor([row[1] for row in tokens if len(row) > 1]), minlength=6)
    expected = seconds.sum().item() * target[1]
    assert chisquare(seconds.numpy(), expected.numpy()).pvalue > 1e-3
    # As many first drafts are kept as the distributions overlap: no exact method can keep more.
    overlap = torch.minimum(target[0], proposal[0]).sum().item()
    assert sum(len(row) > 1 for row in tokens) / count == pytest.approx(overlap, abs=0.025)


def test_equal_distributions_keep_every_draft_and_disjoint_ones_none():
    probs = torch.tensor([[0.5, 0.5, 0.0, 0.0]])
    other = torch.tensor([[0.0, 0.0, 0.5, 0.5]])
    for seed in range(50):
        equal, disjoint = drafted(seed, probs, [seed % 2]), drafted(seed, other, [2 + seed % 2])
        assert len(verify(probs.repeat(2, 1), Draws.of([equal]))[0]) == 2
        [tokens] = verify(probs.repeat(2, 1), Draws.of([disjoint]))
        assert len(tokens) == 1
        assert tokens[0] in (0, 1)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bias", [0.0, 0.5])
def test_sampled_sequences_follow_the_model_with_drafts_on(build, backend, bias):
    """Chi-square over all continuations of a vocabulary of two, against the model's own forward.

    A bias shapes the distribution beyond its temperature, of which the drafts know nothing.
    """
    model = Glm45(dataclasses.replace(preset("pico"), vocab_size=2, eos_token_id=()), seed=1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.0 if parameter.dim() == 1 else 4.0)
    prompt, length, count = [0, 1, 1, 0], 6, 2000
    paths = {(): 1.0}
    for _ in range(length):
        prefixes = list(paths)
        with torch.no_grad():
            logits = model(torch.tensor([[*prompt, *path] for path in prefixes])).logits_BTV[:, -1]
        shares = torch.softmax((logits.double() + torch.tensor([bias, 0])) / 3, -1)
        paths = {
            (*path, token): paths[path] * float(shares[i, token])
            for (i, path), token in itertools.product(enumerate(prefixes), range(2))
        }
    engine = build(backend=backend, of=model, num_drafts=2)
    params = SamplingParams(n=count, max_tokens=length, temperature=3.0, logit_bias={0: bias} if bias else {}, seed=1)
    [completions] = engine.generate([prompt], params)
    seen = dict.fromkeys(paths, 0)
    for completion in completions:
        seen[tuple(completion.token_ids)] += 1
    rare = [path for path, probability in paths.items() if probability * count < 5]
    observed = [seen[path] for path in paths if path not in rare] + [sum(seen[path] for path in rare)]
    expected = [paths[path] * count for path in paths if path not in rare] + [sum(paths[p] * count for p in rare)]
    if not rare:
        observed, expected = observed[:-1], expected[:-1]
    assert chisquare(observed, expected, sum_check=False).pvalue > 1e-3
    stats = engine.stats()
    assert 0.2 < stats["acceptance"] < 0.98, "all or nothing was accepted: the test would show little"
    assert stats["acceptance"] == stats["accepted_tokens"] / stats["drafted_tokens"]


def test_a_prefix_from_the_cache_drafts_as_if_it_were_computed(build, prompts):
    """The MTP layer's cache is exact for shared blocks: same drafts, so the same count of accepted ones."""
    params = SamplingParams(max_tokens=30, temperature=0)
    fresh, warm = build(num_drafts=3), build(num_drafts=3)
    [[expected]] = fresh.generate([prompts[3]], params)
    warm.generate([prompts[3]], SamplingParams(max_tokens=3))
    before = SimpleNamespace(**warm.stats())
    [[completion]] = warm.generate([prompts[3]], params)
    after = warm.stats()
    assert completion.num_cached_tokens == 48
    assert completion.token_ids == expected.token_ids
    assert after["drafted_tokens"] - before.drafted_tokens == fresh.stats()["drafted_tokens"]
    assert after["accepted_tokens"] - before.accepted_tokens == fresh.stats()["accepted_tokens"]
