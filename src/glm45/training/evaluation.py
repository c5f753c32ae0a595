"""Looking at a model while it trains: held-out loss by source, and samples to read.

B rows, T tokens, V vocabulary.
"""

from collections.abc import Mapping, Sequence

import torch

from glm45.config import configuration
from glm45.data.loader import Batch
from glm45.model.cache import KVCache
from glm45.model.transformer import Glm45
from glm45.text.tokenizer import Tokenizer
from glm45.training.losses import Counts, MicroBatch, count, pretraining_loss
from glm45.training.parallel import World
from glm45.training.pipeline import Pipeline


@configuration
class EvaluationConfig:
    """What is looked at, and how often. Not in the report."""

    every: int = 500
    """Steps between evaluations; the last step is always evaluated."""
    rows: int = 8
    """Held-out rows of each source, always the same ones."""
    prompts: tuple[str, ...] = ()
    """Beginnings of text that the model continues."""
    sample_tokens: int = 64
    """Tokens of each continuation."""
    temperature: float = 0.8
    """Of the continuations; 0 takes the likeliest token."""


@torch.no_grad()
def held_out_losses(
    model: Glm45, batches: Mapping[str, Sequence[Batch]], world: World, pipeline: Pipeline | None = None
) -> dict[str, float]:
    """Return the next-token loss of each source in nats per token, and their mean as "mean".

    Batches are divided among the data ranks; each rank runs equally many, as sharded models demand.
    """
    was_training = model.training
    model.eval()
    losses: dict[str, float] = {}
    for source, held_out in batches.items():
        totals = torch.zeros(2, dtype=torch.float64)
        for index in range(0, len(held_out), world.num_data_ranks):
            own = index + world.data_rank
            micro = MicroBatch.of(held_out[min(own, len(held_out) - 1)], world.device)
            num_targets = count(micro)[0] * world.counts_rows
            micro = micro.part(world.part)
            if pipeline is not None:
                loss = pipeline.next_token_loss(micro)
            else:
                loss = pretraining_loss(model, micro, Counts(targets=1, mtp_targets=1, rows=1), 0.0, 0.0).next_token
            if own < len(held_out):
                totals += torch.stack([loss.double().cpu(), num_targets])
        total_loss, total_targets = world.sum(totals).tolist()
        losses[source] = total_loss / max(total_targets, 1)
    model.train(was_training)
    if losses:
        losses["mean"] = sum(losses.values()) / len(losses)
    return losses


@torch.no_grad()
def continue_text(model: Glm45, tokenizer: Tokenizer, prompt: str, config: EvaluationConfig, seed: int) -> str:
    """Return what the model writes after `prompt`, up to an end token or `sample_tokens`."""
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    device, ids = model.device, tokenizer.encode(prompt) or [tokenizer.eos_token_ids[0]]
    cache = KVCache(model.config, 1, len(ids) + config.sample_tokens, device=device)
    pending, written = torch.tensor([ids], device=device), []
    for _ in range(config.sample_tokens):
        positions = torch.arange(cache.length, cache.length + pending.shape[1], device=device)[None]
        logits_V = model(pending, positions=positions, cache=cache).logits_BTV[0, -1].float().cpu()
        logits_V[tokenizer.vocab_size :] = float("-inf")  # rows of padding
        if config.temperature > 0:
            token = int(torch.multinomial((logits_V / config.temperature).softmax(-1), 1, generator=generator))
        else:
            token = int(logits_V.argmax())
        if token in tokenizer.eos_token_ids:
            break
        written.append(token)
        pending = torch.tensor([[token]], device=device)
    model.train(was_training)
    return tokenizer.decode(written)
