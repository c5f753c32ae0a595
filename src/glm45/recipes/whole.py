"""Whole runs: the graph of steps from raw text to an evaluated model, by recipe."""

import dataclasses
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from glm45.config import configuration, override, to_dict
from glm45.corpus.arithmetic import ArithmeticConfig
from glm45.evaluation.suites import SuiteOptions
from glm45.pipeline import Pipeline, Step
from glm45.posttraining.coldstart import ColdStartConfig
from glm45.posttraining.conversations import ModeBalance
from glm45.posttraining.experts import Expert, ExpertIteration, TrajectoryConfig, expert_iteration_steps
from glm45.recipes import demo as demo_training
from glm45.recipes import nano_cpu as nano_cpu_training
from glm45.recipes import one_gpu as one_gpu_training
from glm45.recipes.display import RunDisplay
from glm45.recipes.posttraining import FROM_NOTHING
from glm45.report.run import CONFIGURATION, REPORT, write_report
from glm45.rl.config import RLConfig, RLEvaluationConfig
from glm45.rl.curriculum import CurriculumStage, LengthSchedule
from glm45.training.run import TrainConfig
from glm45.training.schedule import LearningRate

STEPS = "glm45.recipes.steps"
SUITES = ("arithmetic-thinking", "arithmetic-direct", "tools", "instructions")
PROBLEMS = ArithmeticConfig(operations=("add", "subtract"), min_digits=2, max_digits=2, careful_share=0.6)

FEW_MODULES = (
    '[{"name": "stdlib", "reader": "stdlib", "license": "PSF-2.0", "include": ["*json/*.py", "*email/*.py", '
    '"*http/*.py", "*logging/*.py", "*asyncio/*.py", "*unittest/*.py"]}, '
    '{"name": "arithmetic", "reader": "generated", "limit": 300}]'
)


@configuration
class WholeRun:
    """Everything from raw text to an evaluated hybrid-reasoning model. No size of it is in the report."""

    corpus: str
    """Recipe of the corpus."""
    corpus_overrides: tuple[str, ...] = ()
    """Dotted overrides of the corpus recipe."""
    vocab_size: int
    """Of the tokenizer, which learns from the corpus and the conversations."""
    conversations: dict[str, int]
    """Worked conversations of each domain for mid-training."""
    training: TrainConfig
    """Pre-training and mid-training; its data are filled in."""
    processes: int | None = None
    """Processes of the training on this machine; None is what pays."""
    iteration: ExpertIteration
    """The experts on this base, and the unified model."""
    suites: tuple[str, ...] = SUITES
    """Evaluations of the base, the experts and the unified model."""
    evaluation: SuiteOptions
    """Size of the evaluations."""
    seed: int = 0
    """Root seed of all steps but the corpus and the evaluation, which are the same for every seed."""


def demo() -> WholeRun:
    """The report's whole recipe in minutes on two cores."""
    gentle = dataclasses.replace(
        FROM_NOTHING,
        learning_rate=LearningRate(peak=2e-3, final=2e-4),
        sequence_length=512,  # the tools' schemas are most of a row
        mtp_weight=0.0,  # a third of the time
        epochs=1.0,
    )
    rl = RLConfig(
        name="expert",
        policy="",
        tasks="",
        held_out="",
        stages=(CurriculumStage(prompts_per_step=16, samples_per_prompt=8),),
        lengths=LengthSchedule(caps=((0, 96),)),
        evaluation=RLEvaluationConfig(every=10, num_tasks=64, num_samples=2),
    )
    return WholeRun(
        corpus="demo",
        vocab_size=2048,
        conversations={"arithmetic": 10_000, "arithmetic-direct": 20_000, "tools": 1500, "instructions": 10_000},
        training=demo_training.whole(),
        iteration=ExpertIteration(
            name="demo",
            base="base",
            experts=(
                Expert(name="reasoning", domains=("arithmetic",), cold_start_count=1500, rl_steps=30),
                Expert(name="tool", domains=("tools",), cold_start_count=200, rl_steps=10),
                Expert(
                    name="general", domains=("arithmetic-direct", "instructions"), cold_start_count=1500, rl_steps=30
                ),
            ),
            cold_start=ColdStartConfig(arithmetic=PROBLEMS, requests_per_conversation=3),
            cold_start_sft=gentle,
            overall_sft=dataclasses.replace(gentle, learning_rate=LearningRate(peak=4e-3, final=2e-4)),
            balance=ModeBalance(thinking_share=0.15),  # sums by heart take more examples than written-out ones
            num_tasks=2000,
            rl=rl,
            trajectories=TrajectoryConfig(num_prompts=600),
            replay={"arithmetic": 2400, "arithmetic-direct": 11_000, "tools": 1200, "instructions": 3500},
            final_rl_steps=8,
            final_rl_lr=5e-5,
        ),
        evaluation=SuiteOptions(num_tasks=100, max_tokens=96, arithmetic=PROBLEMS),
    )


def demo_fast() -> WholeRun:
    """A smoke test of the demo: every step, and nothing learnt."""
    whole = demo()
    iteration = whole.iteration
    experts = [dataclasses.replace(each, cold_start_count=100, rl_steps=2) for each in iteration.experts]
    sft = dataclasses.replace(iteration.overall_sft, sequence_length=2048)
    return dataclasses.replace(
        whole,
        corpus_overrides=(f"sources={FEW_MODULES}", "num_tasks=2"),
        vocab_size=1024,
        conversations=dict.fromkeys(whole.conversations, 300),
        training=demo_training.fast(),
        iteration=dataclasses.replace(
            iteration,
            experts=tuple(experts),
            cold_start_sft=sft,
            overall_sft=sft,
            num_tasks=200,
            rl=dataclasses.replace(
                iteration.rl,
                lengths=LengthSchedule(caps=((0, 32),)),
                evaluation=RLEvaluationConfig(every=10, num_tasks=4, num_samples=1),
            ),
            trajectories=TrajectoryConfig(num_prompts=20),
            replay=dict.fromkeys(whole.conversations, 50),
            final_rl_steps=1,
            comparison_samples=1,
        ),
        evaluation=dataclasses.replace(whole.evaluation, num_tasks=10, max_tokens=32),
    )


def nano_cpu() -> WholeRun:
    """The same for `nano` on two cores in a night, on everything that pip and apt reach."""
    return _larger(nano_cpu_training.training(), conversations=50_000, rl_steps=60)


def one_gpu() -> WholeRun:
    """The same for `mini` on one GPU of 80 GB, on everything that pip and apt reach."""
    return _larger(one_gpu_training.training(), conversations=100_000, rl_steps=100)


def _larger(training: TrainConfig, conversations: int, rl_steps: int) -> WholeRun:
    """The demo with another model, more of everything and problems of up to four digits.

    As in the demo the balance bias moves in every stage, at the first stage's rate: it is what keeps experts in use.
    """
    whole = demo()
    problems = dataclasses.replace(PROBLEMS, max_digits=4)
    sft = dataclasses.replace(whole.iteration.overall_sft, batch_tokens=16_384)
    experts = [dataclasses.replace(each, cold_start_count=4000, rl_steps=rl_steps) for each in whole.iteration.experts]
    return dataclasses.replace(
        whole,
        corpus="full",
        vocab_size=training.model.vocab_size,
        conversations=dict.fromkeys(whole.conversations, conversations),
        training=dataclasses.replace(
            training, stages=demo_training.on_corpus_and_chats(training.stages, "*-prose.*|*-web.*")
        ),
        iteration=dataclasses.replace(
            whole.iteration,
            experts=tuple(experts),
            cold_start=dataclasses.replace(whole.iteration.cold_start, arithmetic=problems),
            cold_start_sft=sft,
            overall_sft=sft,
            num_tasks=6000,
            rl=dataclasses.replace(
                whole.iteration.rl,
                stages=(CurriculumStage(),),
                lengths=LengthSchedule(caps=((0, 128),)),
                evaluation=RLEvaluationConfig(),
            ),
            trajectories=TrajectoryConfig(num_prompts=3000),
            replay=dict.fromkeys(whole.conversations, 5000),
            final_rl_steps=rl_steps // 2,
        ),
        evaluation=SuiteOptions(max_tokens=128, num_tasks=100, arithmetic=problems),
    )


def whole_steps(whole: WholeRun) -> list[Step]:
    """Return a whole run as steps, each with everything that its output depends on.

    Durations are those of the demo; of larger runs nobody knows them yet.
    """
    iteration = dataclasses.replace(whole.iteration, seed=whole.seed)
    data = {
        "vocab_size": whole.vocab_size,
        "conversations": whole.conversations,
        "cold_start": to_dict(iteration.cold_start.sound),
        "seed": whole.seed,
    }
    training = dataclasses.replace(whole.training, seed=whole.seed)
    experts = [step for step in expert_iteration_steps(iteration) if step.name != "base"]
    last = "final-rl" if iteration.final_rl_steps else "overall-sft"
    models = ("base", *(f"{expert.name}-rl" for expert in iteration.experts), last)
    overrides = [*whole.corpus_overrides, "vocab_size=0"]
    length = max(stage.sequence_length for stage in training.stages)
    evaluation = {"suites": list(whole.suites), "options": to_dict(whole.evaluation), "length": length}
    steps = [
        Step("corpus", f"{STEPS}:build_corpus", {"recipe": whole.corpus, "overrides": overrides}, (), 2, 150),
        Step("data", f"{STEPS}:tokenize_data", data, ("corpus",), 2, 40),
        Step(
            "base",
            f"{STEPS}:pretrain",
            {"training": to_dict(training), "processes": whole.processes},
            ("data",),
            2,
            250,
        ),
        *experts,
        Step("evaluation", f"{STEPS}:evaluate", evaluation, models, 1, 25),
        Step("publish", f"{STEPS}:publish", {}, (last,), seconds=5),
    ]
    measured = whole.corpus == "demo" and not whole.corpus_overrides
    return steps if measured else [dataclasses.replace(step, seconds=None) for step in steps]


RUNS: dict[str, Callable[[], WholeRun]] = {
    "demo": demo,
    "demo_fast": demo_fast,
    "nano_cpu": nano_cpu,
    "one_gpu": one_gpu,
}


def whole_run(name: str) -> WholeRun:
    """Return the whole run of that name. Raises ValueError with the known names."""
    if name not in RUNS:
        raise ValueError(f"no run {name!r}; known: {', '.join(RUNS)}")
    return RUNS[name]()


def run_whole(
    name: str,
    overrides: Sequence[str] = (),
    folder: Path | None = None,
    *,
    only: Sequence[str] = (),
    skip: Sequence[str] = (),
    again: Sequence[str] = (),
    list_only: bool = False,
) -> int:
    """Bring a whole run up to date and write its report; return the exit status.

    `overrides` are dotted ones of `WholeRun`, such as `seed=1`; `again` throws the output of steps away first. Raises
    ValueError for unknown names, StepError if a step fails.
    """
    folder = folder or Path("runs") / name
    whole = override(whole_run(name), overrides)
    pipeline = Pipeline(folder, whole_steps(whole))
    if list_only:
        for step in pipeline.steps:
            print(f"{step:<24} {'up to date' if pipeline.is_current(step) else 'to do'}")
        return 0

    def write_configuration() -> None:
        (folder / CONFIGURATION).write_text(json.dumps(to_dict(whole), indent=1) + "\n")

    command = " ".join(["glm45 run", name, *overrides, "--run", str(folder)])
    try:
        with RunDisplay() as display:
            done = pipeline.run(only=only, skip=skip, again=again, prepare=write_configuration, watch=display.watch)
    except KeyboardInterrupt:
        print(f"stopped; everything finished is kept. Go on with: {command}", file=sys.stderr)
        return 130
    report = folder / REPORT
    if done or not report.exists():
        write_report(folder, stale=pipeline.pending())
    print(f"report: {report}")
    if (folder / "model").exists():
        print(f"chat:   glm45 chat {folder}\nserve:  glm45 serve {folder}")
    return 0
