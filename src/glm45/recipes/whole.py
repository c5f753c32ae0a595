"""Whole runs: the graph of steps from raw text to an evaluated model, by recipe."""

import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm45.config import to_dict
from glm45.corpus.arithmetic import ArithmeticConfig
from glm45.evaluation.suites import SuiteOptions
from glm45.pipeline import Pipeline, Step
from glm45.posttraining.coldstart import ColdStartConfig
from glm45.posttraining.experts import Expert, ExpertIteration, TrajectoryConfig, expert_iteration_steps
from glm45.recipes.display import RunDisplay
from glm45.recipes.posttraining import FROM_NOTHING
from glm45.report.run import write_report
from glm45.rl.config import RLConfig, RLEvaluationConfig
from glm45.rl.curriculum import LengthSchedule
from glm45.training.schedule import LearningRate

STEPS = "glm45.recipes.steps"
SUITES = ("arithmetic-thinking", "arithmetic-direct", "tools", "instructions")
PROBLEMS = ArithmeticConfig(operations=("add", "subtract"), min_digits=2, max_digits=2, careful_share=0.4)
SOUND = ColdStartConfig(arithmetic=dataclasses.replace(PROBLEMS, careful_share=1.0), sound_share=1.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scale:
    """How large a run from raw text on two cores is. Nothing of it is in the report."""

    corpus: tuple[str, ...]
    """Overrides of the corpus recipe."""
    conversations: int = 20_000
    """Worked conversations of each domain in mid-training."""
    cold_start: int = 1500
    """Conversations of each expert's cold start."""
    rl_steps: int = 30
    """Updates of each expert's RL."""
    final_steps: int = 10
    """Updates of the last RL pass."""
    prompts: int = 600
    """Training prompts on which each expert is sampled for the unified model."""
    replay: int = 1000
    """Sound conversations of each domain that join the unified model's set."""
    num_tasks: int = 150
    """Held-out tasks of each suite."""
    sequence_length: int = 512
    """Tokens of a fine-tuning row: the tools' schemas are most of it."""


FEW_MODULES = (
    '[{"name": "stdlib", "reader": "stdlib", "license": "PSF-2.0", "include": ["*json/*.py", "*email/*.py", '
    '"*http/*.py", "*logging/*.py", "*asyncio/*.py", "*unittest/*.py"]}, '
    '{"name": "arithmetic", "reader": "generated", "limit": 300}]'
)

DEMO = Scale(corpus=("vocab_size=4096",))
FAST = Scale(
    corpus=("vocab_size=1024", f"sources={FEW_MODULES}", "num_tasks=2"),
    conversations=300,
    cold_start=100,
    rl_steps=2,
    final_steps=1,
    prompts=40,
    replay=50,
    num_tasks=10,
    sequence_length=2048,
)


def demo(*, fast: bool = False) -> list[Step]:
    """The report's whole recipe in minutes on two cores; `fast` is a smoke test of two."""
    scale = FAST if fast else DEMO
    recipe = "demo_fast" if fast else "demo_whole"
    domains = dict.fromkeys(("arithmetic", "arithmetic-direct", "tools", "instructions"), scale.conversations)
    data = {"domains": domains, "cold_start": to_dict(SOUND), "seed": 0}
    return [
        Step("corpus", f"{STEPS}:build_corpus", {"recipe": "demo", "overrides": list(scale.corpus)}, (), 2, 170),
        Step("data", f"{STEPS}:add_conversations", data, ("corpus",), 2, 20),
        Step("base", f"{STEPS}:pretrain", {"recipe": recipe}, ("data",), 2, 240),
        *_posttraining(scale),
        _evaluation(scale),
        Step("publish", f"{STEPS}:publish", {}, ("final-rl",), seconds=5),
    ]


def _posttraining(scale: Scale) -> list[Step]:
    """Expert iteration on the step called `base`."""
    gentle = dataclasses.replace(
        FROM_NOTHING,
        learning_rate=LearningRate(peak=2e-3, final=2e-4),
        sequence_length=scale.sequence_length,
        batch_tokens=4096,
        router_bias_rate=0.0,
        mtp_weight=0.1,
        epochs=1.0,
    )
    experts = {"reasoning": "arithmetic", "direct": "arithmetic-direct", "tool": "tools", "general": "instructions"}
    config = ExpertIteration(
        name="demo",
        base="base",
        experts=tuple(
            Expert(name=name, domain=domain, cold_start_count=scale.cold_start, rl_steps=scale.rl_steps)
            for name, domain in experts.items()
        ),
        cold_start=ColdStartConfig(arithmetic=PROBLEMS),
        cold_start_sft=gentle,
        overall_sft=gentle,
        num_tasks=2000,
        rl=RLConfig(
            name="expert",
            policy="",
            tasks="",
            held_out="",
            lengths=LengthSchedule(caps=((0, 64),)),
            evaluation=RLEvaluationConfig(every=10, num_tasks=64, num_samples=2),
        ),
        trajectories=TrajectoryConfig(num_prompts=scale.prompts),
        replay_count=scale.replay,
        final_rl_steps=scale.final_steps,
    )
    return [step for step in expert_iteration_steps(config) if step.name not in ("base", "comparison")]


def _evaluation(scale: Scale) -> Step:
    options = SuiteOptions(num_tasks=scale.num_tasks, max_tokens=64, arithmetic=PROBLEMS)
    models = ("base", "reasoning-rl", "direct-rl", "tool-rl", "general-rl", "final-rl")
    return Step("evaluation", f"{STEPS}:evaluate", {"suites": list(SUITES), "options": to_dict(options)}, models, 2, 40)


RUNS: dict[str, Callable[..., list[Step]]] = {"demo": demo}


def whole_run(name: str, *, fast: bool = False) -> list[Step]:
    """Return the steps of a whole run. Raises ValueError with the known names."""
    if name not in RUNS:
        raise ValueError(f"no run {name!r}; known: {', '.join(RUNS)}")
    return RUNS[name](fast=fast)


def run_whole(
    name: str,
    folder: Path | None = None,
    *,
    fast: bool = False,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    again: Sequence[str] = (),
    list_only: bool = False,
) -> int:
    """Bring a whole run up to date and write its report; return the exit status.

    `again` throws the output of steps away first. Raises ValueError for unknown names, StepError if a step fails.
    """
    folder = folder or Path("runs") / (f"{name}-fast" if fast else name)
    pipeline = Pipeline(folder, whole_run(name, fast=fast))
    if list_only:
        for step in pipeline.steps:
            print(f"{step:<24} {'up to date' if pipeline.is_current(step) else 'to do'}")
        return 0
    for step in again:
        pipeline.invalidate(step)
    choice: dict[str, Any] = {"only": only, "skip": skip}
    try:
        with RunDisplay() as display:
            pipeline.run(**choice, watch=display.watch)
    except KeyboardInterrupt:
        print(f"stopped; everything finished is kept. Go on with: glm45 run {name} --run {folder}", file=sys.stderr)
        return 130
    print(f"report: {write_report(folder)}")
    if (folder / "model").exists():
        print(f"chat:   glm45 chat {folder}\nserve:  glm45 serve {folder}")
    return 0
