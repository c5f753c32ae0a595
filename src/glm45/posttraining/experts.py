"""Expert iteration as a graph of steps (report section 3): experts on one base, then one unified model.

Each expert is cold-started and trained by RL on its own domain; what its RL model answers well, after rejection
sampling, becomes part of the overall SFT set of the unified hybrid model, which thinks when asked to and answers
directly with `/nothink`; a last RL pass runs on the mix, with penalties for faults of form.
"""

from dataclasses import field
from pathlib import Path

from glm45.config import configuration, to_dict
from glm45.model.config import ModelConfig
from glm45.pipeline import Step
from glm45.posttraining.coldstart import ColdStartConfig
from glm45.posttraining.conversations import ModeBalance
from glm45.posttraining.rejection import RejectionConfig
from glm45.posttraining.sft import SFTConfig
from glm45.rl.config import PenaltyConfig, RLConfig

STEPS = "glm45.posttraining.steps"


@configuration
class Expert:
    """One expert: its domains, each with a cold start, tasks and a verifier."""

    name: str
    """Names its steps."""
    domains: tuple[str, ...]
    """"arithmetic" (reasoning, thinking), "tools" (function calls, direct), "arithmetic-direct" and "instructions"
    (general, direct)."""
    base_count: int = 3000
    """Conversations of each of its domains that a small base is trained on. Not in the report."""
    cold_start_count: int = 2000
    """Conversations of each domain in the cold start: small (report section 3.1)."""
    rl_steps: int = 40
    """Updates of its RL."""


@configuration
class TrajectoryConfig:
    """How an expert's answers are collected for the overall SFT set."""

    num_prompts: int = 1000
    """Training prompts of each expert. Not in the report."""
    num_samples: int = 4
    """Answers of each prompt that enter the filters. Not in the report."""
    drop_shorter: float = 0.0
    """Share of prompts with the shortest responses that is dropped: 0.5 in the report, for mathematics and science.
    At laptop scale short problems are half of the task, so the recipes keep them; that is not in the report."""
    hard_below: float = 0.5
    """Prompts with a smaller share of right answers are hard. Not in the report."""
    hard_responses: int = 4
    """Responses kept for a hard prompt, one for others (report section 3.1)."""
    hard_samples: int = 12
    """Further answers of each hard prompt: of the first few, too few are right. Not in the report."""
    rejection: RejectionConfig = RejectionConfig()
    """Filters."""


@configuration
class ExpertIteration:
    """A whole post-training run. Recipes are functions that return one."""

    name: str
    """The recipe's name."""
    base: str = ""
    """Hub folder of the base model with its tokenizer; empty trains a small one on sound answers of every domain."""
    base_shape: ModelConfig | None = None
    """Shape of that small base; its vocabulary follows the tokenizer."""
    base_sft: SFTConfig = SFTConfig()
    """How the small base is trained."""
    vocab_size: int = 640
    """Tokens of its tokenizer, special ones not counted."""
    experts: tuple[Expert, ...] = (
        Expert(name="reasoning", domains=("arithmetic",)),
        Expert(name="tool", domains=("tools",)),
        Expert(name="general", domains=("instructions",)),
    )
    """The experts; the report has reasoning, agent and general chat."""
    cold_start: ColdStartConfig = ColdStartConfig()
    """How good the cold starts' answers are."""
    cold_start_sft: SFTConfig = SFTConfig(epochs=1.0)
    """Fine-tuning of each expert's cold start."""
    num_tasks: int = 3000
    """Tasks of each domain that are generated, before the split by hash."""
    rl: RLConfig = field(default_factory=lambda: RLConfig(name="expert", policy="", tasks="", held_out=""))
    """RL of each expert; files and steps are filled in."""
    trajectories: TrajectoryConfig = TrajectoryConfig()
    """What of an expert's answers is learnt from."""
    balance: ModeBalance = ModeBalance()
    """Thinking against direct conversations of the overall set."""
    replay: dict[str, int] = field(default_factory=dict)
    """Sound worked conversations that join the overall SFT set, by domain. The report's set is the experts' own
    answers alone, millions of them; small runs need a floor. Not in the report."""
    overall_sft: SFTConfig = SFTConfig()
    """Fine-tuning of the unified model."""
    final_rl_steps: int = 20
    """Updates of the last RL pass on the mix; 0 leaves it out."""
    final_rl_lr: float | None = None
    """Learning rate of that pass; None is the experts'. Not in the report: on a model of a million parameters the
    experts' rate unlearns as much as a few updates teach (docs/log.md)."""
    penalties: PenaltyConfig = PenaltyConfig(format=0.5, repetition=0.5, language_mixing=0.5)
    """Penalties of the last pass (report section 3.4, pathology RL). Sizes are not in the report."""
    comparison_samples: int = 8
    """Answers to each held-out prompt, at temperature 1, when the unified model is compared with the experts. Not in
    the report."""
    seed: int = 0
    """Root seed."""

    def __post_init__(self) -> None:
        if not self.base and self.base_shape is None:
            raise ValueError("give base (a hub folder) or base_shape (a model to train first)")
        if len({expert.name for expert in self.experts}) < len(self.experts) or not self.experts:
            raise ValueError("experts need names of their own, and there must be at least one")


def expert_iteration_steps(config: ExpertIteration) -> list[Step]:
    """Return the run as steps, each with everything its output depends on."""
    shared = {"seed": config.seed}
    domains = _domains(config)
    tasks = {
        "num_tasks": config.num_tasks,
        "domains": domains,
        "arithmetic": to_dict(config.cold_start.arithmetic),
        **shared,
    }
    steps = [_base(config), _step("tasks", tasks)]
    trajectories = []
    for expert in config.experts:
        steps += _expert_steps(config, expert)
        trajectories.append(f"{expert.name}-trajectories")
    replay = {"counts": config.replay, "cold_start": to_dict(config.cold_start.sound)}
    overall = {
        "sft": to_dict(config.overall_sft),
        "balance": to_dict(config.balance),
        "replay": replay,
        **shared,
    }
    # What has the machine to itself takes two cores.
    steps.append(_step("overall-sft", overall, ("base", *trajectories), seconds=120, cores=2))
    last = "overall-sft"
    if config.final_rl_steps:
        rl = {**to_dict(config.rl), "steps": config.final_rl_steps, "name": "final"}
        rl["rollout"] = {**rl["rollout"], "penalties": to_dict(config.penalties)}
        if config.final_rl_lr is not None:
            rl["loss"] = {**rl["loss"], "lr": config.final_rl_lr}
        steps.append(
            _step("final-rl", {"rl": rl, "domains": domains, **shared}, ("overall-sft", "tasks"), "expert_rl", 20, 2)
        )
        last = "final-rl"
    experts = {expert.name: list(expert.domains) for expert in config.experts}
    needs = ("tasks", *(f"{expert.name}-rl" for expert in config.experts), last)
    compared = {"experts": experts, "unified": last, "rl": to_dict(config.rl), "num_samples": config.comparison_samples}
    return [*steps, _step("comparison", {**compared, **shared}, needs)]


def _domains(config: ExpertIteration) -> list[str]:
    """The domains of all experts, each once."""
    return list(dict.fromkeys(domain for expert in config.experts for domain in expert.domains))


def _base(config: ExpertIteration) -> Step:
    if config.base:
        return _step("base", {"base": str(Path(config.base).resolve())}, function="adopt_base")
    assert config.base_shape is not None
    values = {
        "shape": to_dict(config.base_shape),
        "counts": {domain: expert.base_count for expert in config.experts for domain in expert.domains},
        "sft": to_dict(config.base_sft),
        "vocab_size": config.vocab_size,
        "cold_start": to_dict(config.cold_start),
        "seed": config.seed,
    }
    return _step("base", values, function="train_base", seconds=600)


def _expert_steps(config: ExpertIteration, expert: Expert) -> list[Step]:
    """Cold start, RL, trajectories."""
    name, shared = expert.name, {"domains": list(expert.domains), "seed": config.seed}
    cold = {
        "count": expert.cold_start_count,
        "cold_start": to_dict(config.cold_start),
        "sft": to_dict(config.cold_start_sft),
        **shared,
    }
    rl = {"rl": {**to_dict(config.rl), "steps": expert.rl_steps, "name": name}, **shared}
    collected = {"trajectories": to_dict(config.trajectories), "rl": to_dict(config.rl), **shared}
    return [
        _step(f"{name}-cold-start", cold, ("base",), "expert_cold_start", 20),
        _step(f"{name}-rl", rl, (f"{name}-cold-start", "tasks"), "expert_rl", 45),
        _step(f"{name}-trajectories", collected, (f"{name}-rl", "tasks"), "expert_trajectories", 15),
    ]


def _step(
    name: str,
    config: dict,
    needs: tuple[str, ...] = (),
    function: str | None = None,
    seconds: float = 60.0,
    cores: int = 1,
) -> Step:
    function = function or name.replace("-", "_")
    return Step(name, f"{STEPS}:{function}", config=config, needs=needs, cores=cores, seconds=seconds)
