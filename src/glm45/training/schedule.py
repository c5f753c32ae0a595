"""Everything that changes over a run, as values: learning rate, batch size, and what each stage sets.

All schedules are functions of tokens, as in the report, so that a batch that grows does not bend them.
"""

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from glm45.config import configuration
from glm45.training.stages import Stage


@configuration
class LearningRate:
    """Learning rate over the tokens of a run (report section 2.4: cosine, not WSD)."""

    peak: float = 2.5e-4
    """Rate after the warm-up."""
    final: float = 2.5e-5
    """Rate at the end."""
    shape: Literal["cosine", "wsd", "constant"] = "cosine"
    """Cosine from the warm-up to the end; warm-up, stable, decay; or constant after the warm-up."""
    warmup_fraction: float = 0.01
    """Share of the tokens over which the rate rises from 0. Not in the report."""
    decay_fraction: float = 0.2
    """Share of the tokens over which WSD decays, linearly. Not in the report."""

    def __post_init__(self) -> None:
        if not (0 < self.peak < math.inf and 0 <= self.final < math.inf):
            raise ValueError(f"learning_rate: peak {self.peak} must be above 0, final {self.final} 0 or more")
        if not (0 <= self.warmup_fraction < 1 and 0 < self.decay_fraction <= 1 - self.warmup_fraction):
            raise ValueError(
                f"learning_rate: warmup_fraction {self.warmup_fraction} and decay_fraction {self.decay_fraction} "
                "must lie between 0 and 1 and fit into the run together"
            )

    def at(self, progress: float) -> float:
        """Return the rate at `progress`, the share of the run's tokens seen, the step's own included."""
        if progress < self.warmup_fraction:
            return self.peak * progress / self.warmup_fraction
        if self.shape == "constant":
            return self.peak
        if self.shape == "wsd":
            into_decay = (progress - (1 - self.decay_fraction)) / self.decay_fraction
            return self.peak - (self.peak - self.final) * min(max(into_decay, 0.0), 1.0)
        into_cosine = (progress - self.warmup_fraction) / (1 - self.warmup_fraction)
        return self.final + (self.peak - self.final) * 0.5 * (1 + math.cos(math.pi * min(into_cosine, 1.0)))


@dataclass(frozen=True)
class Segment:
    """Consecutive steps of one stage with one batch size."""

    stage_index: int
    stage: Stage
    first_step: int
    """Step of the run, from 0."""
    num_steps: int
    rows: int
    """Sequences a step, over all ranks."""
    first_row: int
    """Row of the stage's data with which the segment begins."""
    first_token: int
    """Tokens of the run before this segment."""

    @property
    def step_tokens(self) -> int:
        """Tokens of one step."""
        return self.rows * self.stage.sequence_length


@dataclass(frozen=True)
class Step:
    """What one optimiser step is made of."""

    index: int
    segment: Segment
    first_row: int
    """Row of the stage's data with which the batch begins."""
    tokens_after: int
    """Tokens of the run once this step is done."""


class Plan:
    """The steps of a run. Which batch a step takes follows from its number alone, so a resumed run repeats none."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.segments = list(_segments(stages))
        self.num_steps = self.segments[-1].first_step + self.segments[-1].num_steps
        last = self.segments[-1]
        self.tokens = last.first_token + last.num_steps * last.step_tokens
        self._starts = [segment.first_step for segment in self.segments]

    def step(self, index: int) -> Step:
        """Return step `index`, counted from 0."""
        assert 0 <= index < self.num_steps, f"step {index} of {self.num_steps}"
        segment = self.segments[bisect_right(self._starts, index) - 1]
        done = index - segment.first_step
        first_row = segment.first_row + done * segment.rows
        return Step(index, segment, first_row, segment.first_token + (done + 1) * segment.step_tokens)

    def stage_steps(self, stage_index: int) -> int:
        """Return the number of steps of a stage."""
        return sum(segment.num_steps for segment in self.segments if segment.stage_index == stage_index)

    def stage_rows(self, stage_index: int) -> int:
        """Return the number of rows that a stage reads."""
        own = (segment for segment in self.segments if segment.stage_index == stage_index)
        return sum(segment.num_steps * segment.rows for segment in own)


def _segments(stages: Sequence[Stage]) -> Iterator[Segment]:
    step = token = 0
    for stage_index, stage in enumerate(stages):
        row = 0
        for rows, num_steps in _batch_sizes(stage):
            yield Segment(stage_index, stage, step, num_steps, rows, row, token)
            step, row = step + num_steps, row + num_steps * rows
            token += num_steps * rows * stage.sequence_length


def _batch_sizes(stage: Stage) -> Iterator[tuple[int, int]]:
    """Yield (rows a step, number of steps) of a stage: the warm-up's sizes for equal numbers of tokens, then the rest.

    The warm-up goes through the multiples of its first batch.
    """
    final = stage.batch_tokens // stage.sequence_length
    total = stage.tokens // stage.sequence_length
    done = 0
    if stage.batch_warmup_from:
        start = stage.batch_warmup_from // stage.sequence_length
        sizes = range(start, final, start)
        share = stage.batch_warmup_tokens / stage.sequence_length / max(len(sizes), 1)
        for number, rows in enumerate(sizes, 1):
            steps = min(max(0, round((number * share - done) / rows)), (total - done) // rows)
            if steps:
                yield rows, steps
                done += steps * rows
    if total - done >= final:
        yield final, (total - done) // final


def plot(stages: Sequence[Stage], learning_rate: LearningRate, path: str | Path) -> None:
    """Draw every schedule of a run over its tokens into an image file."""
    from matplotlib.figure import Figure

    plan = Plan(stages)
    tokens = [segment.first_token for segment in plan.segments] + [plan.tokens]

    def held(values: Sequence[float]) -> list[float]:
        return [*values, values[-1]]

    segments = plan.segments
    steps: dict[str, list[float]] = {
        "batch (tokens)": held([segment.step_tokens for segment in segments]),
        "sequence length": held([segment.stage.sequence_length for segment in segments]),
        "RoPE base": held([segment.stage.rope_theta for segment in segments]),
        "MTP weight": held([segment.stage.mtp_weight for segment in segments]),
        "router bias rate": held([segment.stage.router_bias_rate for segment in segments]),
    }
    figure = Figure(figsize=(8, 10), layout="constrained")
    rate_axes, *axes = figure.subplots(1 + len(steps), 1, sharex=True)
    grid = [plan.tokens * i / 1000 for i in range(1001)]
    rate_axes.plot(grid, [learning_rate.at(token / plan.tokens) for token in grid])
    rate_axes.set_ylabel("learning rate")
    for ax, (label, values) in zip(axes, steps.items(), strict=True):
        ax.step(tokens, values, where="post")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        if max(values) > 50 * min(values) > 0:
            ax.set_yscale("log")
            ax.set_ylim(min(values) / 2, max(values) * 2)
    for ax in (rate_axes, *axes):
        for segment in segments:
            if segment.first_step and segment.stage is not plan.step(segment.first_step - 1).segment.stage:
                ax.axvline(segment.first_token, color="grey", linewidth=0.5, linestyle="--")
    for index, stage in enumerate(stages):
        first = next(segment.first_token for segment in segments if segment.stage_index == index)
        rate_axes.annotate(stage.name, (first, learning_rate.peak), rotation=30, fontsize=7)
    axes[-1].set_xlabel("tokens")
    figure.savefig(path, dpi=120)
