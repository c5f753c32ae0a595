"""Post-training recipes for two cores: expert iteration, and the report's RL experiments as comparisons of arms.

The models have a million parameters and the tasks are arithmetic with written-out steps, calls of three small tools
and instructions about words. What such runs show about the report's claims is in docs/rl.md; they show that the
machinery works, and the direction of an effect at most.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from glm45.config import override, to_dict
from glm45.corpus.arithmetic import ArithmeticConfig
from glm45.model.config import ModelConfig
from glm45.pipeline import Pipeline, Step
from glm45.posttraining.coldstart import ColdStartConfig
from glm45.posttraining.experts import Expert, ExpertIteration, TrajectoryConfig, expert_iteration_steps
from glm45.posttraining.sft import SFTConfig
from glm45.recipes.display import RunDisplay
from glm45.rl.config import LossConfig, RLConfig, RLEvaluationConfig
from glm45.rl.curriculum import CurriculumStage, LengthSchedule, PoolThresholds
from glm45.rl.pools import PoolsConfig
from glm45.rl.temperature import TemperatureConfig
from glm45.training.optimizers import OptimizerConfig
from glm45.training.schedule import LearningRate

STEPS = "glm45.posttraining.steps"

SHAPE = ModelConfig(
    vocab_size=384,  # follows the tokenizer
    hidden_size=128,
    intermediate_size=256,
    moe_intermediate_size=64,
    num_hidden_layers=4,
    first_k_dense_replace=1,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    routed_scaling_factor=2.5,
    use_qk_norm=True,
    rope_theta=10_000.0,
    max_position_embeddings=1024,
    num_nextn_predict_layers=0,
)
"""A million parameters."""

FROM_NOTHING = SFTConfig(
    epochs=1.5,
    sequence_length=128,
    batch_tokens=2048,
    learning_rate=LearningRate(peak=1e-2, final=1e-3, warmup_fraction=0.05),
    optimizer=OptimizerConfig(adamw_ratio=0.5),
    mtp_weight=0.0,
    router_bias_rate=0.01,
)
"""Fine-tuning that begins with random weights: small batches and a large rate learn; see docs/log.md."""

PROBLEMS = ArithmeticConfig(operations=("add", "subtract"), min_digits=2, max_digits=3, careful_share=0.38)


def experts() -> ExpertIteration:
    """A reasoning, a tool and a general expert on one base, then the unified model."""
    gentle = dataclasses.replace(
        FROM_NOTHING,
        learning_rate=LearningRate(peak=2e-3, final=2e-4),
        sequence_length=384,
        batch_tokens=3072,
        router_bias_rate=0.0,
        epochs=1.0,
    )
    return ExpertIteration(
        name="experts",
        base_shape=SHAPE,
        base_sft=dataclasses.replace(FROM_NOTHING, sequence_length=384, batch_tokens=3072),
        experts=(
            Expert(name="reasoning", domains=("arithmetic",), base_count=12_000, rl_steps=20),
            # A prompt with its three tools is 300 tokens long, ten times the others.
            Expert(name="tool", domains=("tools",), base_count=2000, cold_start_count=500, rl_steps=15),
            Expert(name="general", domains=("instructions",), base_count=8000, rl_steps=20),
        ),
        cold_start=ColdStartConfig(arithmetic=dataclasses.replace(PROBLEMS, max_digits=2)),
        cold_start_sft=gentle,
        overall_sft=gentle,
        replay=dict.fromkeys(("arithmetic", "tools", "instructions"), 1000),
        rl=RLConfig(
            name="expert",
            policy="",
            tasks="",
            held_out="",
            stages=(CurriculumStage(prompts_per_step=16, samples_per_prompt=8),),
            lengths=LengthSchedule(caps=((0, 64),)),
            evaluation=RLEvaluationConfig(num_tasks=64, num_samples=2),
        ),
        trajectories=TrajectoryConfig(num_prompts=600),
    )


def arithmetic(seed: int = 0, steps: int = 60, conversations: int = 40_000) -> list[Step]:
    """The laptop experiment: an arithmetic cold start, then RL."""
    return [*_start(seed, PROBLEMS, conversations), _arm("rl", seed, _rl(steps=steps)), _arms(["rl"])]


def curriculum(seed: int = 0, steps: int = 60, conversations: int = 40_000) -> list[Step]:
    """Moderate then hard against staying on moderate and hard from the start (report, figure 5)."""
    problems = dataclasses.replace(PROBLEMS, max_digits=5)
    stage = CurriculumStage(pool="moderate", until_step=steps // 2)
    hard = CurriculumStage(pool="hard", prompts_per_step=8, samples_per_prompt=32)
    thresholds = PoolThresholds(hard_k=128)
    measured = Step(
        "pools",
        f"{STEPS}:pools",
        {"pools": to_dict(PoolsConfig(thresholds=thresholds)), "domain": "arithmetic", "seed": seed},
        ("policy", "tasks"),
        seconds=300,
    )
    by_digits = RLEvaluationConfig(by="num_digits")
    stages = {
        "moderate-only": (CurriculumStage(pool="moderate"),),
        "moderate-then-hard": (stage, hard),
        "hard-only": (hard,),
    }
    runs = {
        name: _rl(steps=steps, pools="measured", stages=each, evaluation=by_digits) for name, each in stages.items()
    }
    start = _start(seed, problems, conversations, num_tasks=800)
    arms = [_arm(name, seed, config, ("pools",)) for name, config in runs.items()]
    return [*start, measured, *arms, _arms(list(runs))]


def length(seed: int = 0, steps: int = 60, conversations: int = 40_000) -> list[Step]:
    """One stage at the full cap against growing caps at the report's fractions of the run (figure 6)."""
    switches = [round(steps * fraction) for fraction in (0, 320 / 2160, 1200 / 2160, 1600 / 2160)]
    caps = dict(zip(switches, (16, 32, 48, 64), strict=True))  # of switches that fall on one step, the last
    growing = LengthSchedule(caps=tuple(caps.items()))
    runs = {"single-stage": _rl(steps=steps), "multi-stage": _rl(steps=steps, lengths=growing)}
    return _comparison(seed, PROBLEMS, conversations, runs)


def temperature(seed: int = 0, steps: int = 60, conversations: int = 40_000) -> list[Step]:
    """A temperature that rises on plateaus against a fixed one."""
    dynamic = TemperatureConfig(candidates=(0.8, 1.0, 1.2, 1.4), plateau_window=8)
    runs = {"fixed": _rl(steps=steps), "dynamic": _rl(steps=steps, temperature=dynamic)}
    return _comparison(seed, PROBLEMS, conversations, runs)


def aggregation(seed: int = 0, steps: int = 60, conversations: int = 40_000) -> list[Step]:
    """Token-weighted against sequence-mean loss (figure 7), on responses of five-fold spread in length."""
    spread = dataclasses.replace(PROBLEMS, min_digits=1, max_digits=5)
    runs = {
        "token-weighted": _rl(steps=steps, loss=LossConfig(default_aggregation="token")),
        "sequence-mean": _rl(steps=steps, loss=LossConfig(default_aggregation="sequence")),
    }
    return _comparison(seed, spread, conversations, runs)


RECIPES: dict[str, Callable[..., list[Step]]] = {
    "arithmetic": arithmetic,
    "curriculum": curriculum,
    "length": length,
    "temperature": temperature,
    "aggregation": aggregation,
}


def posttraining_steps(name: str, overrides: Sequence[str]) -> list[Step]:
    """Return a recipe's steps. Raises ValueError for an unknown name, listing the known, or a wrong override.

    `experts` takes dotted overrides of its whole configuration, the experiments `seed=`, `steps=` (updates of each
    arm) and `conversations=` (of the cold start).
    """
    if name == "experts":
        return expert_iteration_steps(override(experts(), overrides))
    if name not in RECIPES:
        raise ValueError(f"no post-training recipe {name!r}; known: experts, {', '.join(RECIPES)}")
    values: dict[str, int] = {}
    for assignment in overrides:
        key, equals, value = assignment.partition("=")
        if key not in ("seed", "steps", "conversations") or not equals or not value.isdigit():
            raise ValueError(f"override {assignment!r}: {name} takes seed=, steps= and conversations= with a number")
        values[key] = int(value)
    return RECIPES[name](**values)


def run_posttraining(name: str, folder: Path, overrides: Sequence[str], only: Sequence[str] = ()) -> str:
    """Bring a post-training run up to date, write its lineage, and return its last step's table, if that was run.

    Raises what `posttraining_steps` raises, and StepError if a step fails.
    """
    pipeline = Pipeline(folder, posttraining_steps(name, overrides))
    with RunDisplay() as display:
        pipeline.run(only=only, watch=display.watch)
    (folder / "lineage.json").write_text(json.dumps(pipeline.lineage(), indent=1) + "\n")
    last = list(pipeline.steps)[-1]
    table = pipeline.folder_of(last) / f"{last}.md"
    return table.read_text() if table.exists() else ""


def _comparison(seed: int, problems: ArithmeticConfig, conversations: int, runs: dict[str, RLConfig]) -> list[Step]:
    arms = [_arm(name, seed, config) for name, config in runs.items()]
    return [*_start(seed, problems, conversations), *arms, _arms(list(runs))]


def _rl(**changes: Any) -> RLConfig:
    return RLConfig(name="arm", policy="", tasks="", held_out="", **changes)


def _start(seed: int, problems: ArithmeticConfig, conversations: int, num_tasks: int = 6000) -> list[Step]:
    """The steps that every experiment begins with: a policy with something to learn, and tasks split by hash."""
    policy = {
        "shape": to_dict(SHAPE),
        "count": conversations,
        "sft": to_dict(dataclasses.replace(FROM_NOTHING, seed=seed)),
        "vocab_size": 300,
        "cold_start": to_dict(ColdStartConfig(arithmetic=problems)),
        "domain": "arithmetic",
        "seed": seed,
    }
    tasks = {"num_tasks": num_tasks, "domains": ["arithmetic"], "arithmetic": to_dict(problems), "seed": seed}
    return [
        Step("policy", f"{STEPS}:train_policy", policy, seconds=240),
        Step("tasks", f"{STEPS}:tasks", tasks, seconds=10),
    ]


def _arm(name: str, seed: int, config: RLConfig, more_needs: tuple[str, ...] = ()) -> Step:
    values = {"rl": {**to_dict(config), "name": name}, "domains": ["arithmetic"], "seed": seed}
    return Step(name, f"{STEPS}:expert_rl", values, ("policy", "tasks", *more_needs), seconds=300)


def _arms(names: list[str]) -> Step:
    return Step("arms", f"{STEPS}:arms", needs=tuple(names), seconds=1)
