"""Everything that an RL run carries from one step to the next, and how it is saved."""

import json
import os
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from glm45.config import from_dict, read_json, to_dict
from glm45.environments.protocol import Task
from glm45.environments.science import expert_verified_only
from glm45.environments.tasks import question, read_tasks
from glm45.files import fingerprint, write_atomically
from glm45.model import hub
from glm45.rl.config import RLConfig
from glm45.rl.curriculum import Curriculum
from glm45.rl.pool import Pool
from glm45.rl.temperature import TemperatureController
from glm45.rl.update import PolicyTrainer
from glm45.seeds import derive_seed
from glm45.text.tokenizer import Tokenizer
from glm45.training.checkpoint import Checkpoints, training_tensors
from glm45.training.layout import Layout
from glm45.training.parallel import World

MAY_CHANGE = ("steps", "tracker")
"""What a run that goes on may have set differently: the past does not depend on it."""

INPUTS = ("policy", "tasks", "held_out", "pools")
"""Fields that name files. A run that goes on may name them otherwise, since folders move, but not others."""


class RLState:
    """Policy, optimiser, prompts, curriculum and temperature between two steps."""

    def __init__(self, config: RLConfig):
        """Begin a run. Raises ValueError or OSError for what a user can mend."""
        self.config = config
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            raise ValueError("glm45 rl drives one process: start it without torchrun (docs/rl.md says what is missing)")
        self.train_tasks, self.held_out_tasks = read_task_files(config)
        self.tokenizer = Tokenizer.load(config.policy)
        self.world = World.start(Layout())
        model = hub.load(config.policy, dtype=torch.float32, device=self.world.device)
        self.trainer = PolicyTrainer(model, config.loss, self.world)
        self.curriculum = Curriculum(config.stages)
        self.temperature = TemperatureController(config.temperature)
        self.pool = Pool(*self._prompts(), config.rollout.max_staleness)
        self.step = 0
        self.metrics_length = 0
        self.rows: list[dict[str, Any]] = []
        """The log of record so far, for the alarms."""

    def _prompts(self) -> tuple[Sequence[Task], int]:
        """Return the prompts of the stage in force and the seed of their order. Raises ValueError if it has none."""
        name = self.curriculum.stage.pool
        tasks: Sequence[Task] = self.train_tasks
        if name != "all":
            members = pool_members(self.config.pools, name)
            tasks = [task for task in tasks if task.task_id in members]
            if not tasks:
                raise ValueError(f"{self.config.pools}: no training task is in the {name} pool")
        return tasks, derive_seed(self.config.seed, "pool", self.curriculum.index)

    def advance(self, record: dict[str, Any]) -> None:
        """Take note of a finished step and enter the next stage where it is due."""
        self.step += 1
        self.rows.append(record)
        if self.curriculum.advance(self.step, record.get("reward")):
            self.pool.enter_stage(*self._prompts())

    def save(self, checkpoints: Checkpoints, metrics_length: int) -> None:
        """Start writing a checkpoint."""
        state = {
            "metrics_length": metrics_length,
            "pool": self.pool.state_dict(),
            "curriculum": self.curriculum.state_dict(),
            "temperature": self.temperature.state_dict(),
        }
        checkpoints.save(self.step, training_tensors(self.trainer.model, self.trainer.optimizers), state)
        checkpoints.prune(None)

    def load(self, checkpoints: Checkpoints) -> list[str]:
        """Go to the newest intact checkpoint, if there is any; return what was wrong with those passed over."""
        if not checkpoints.steps():
            return []
        step, problems = checkpoints.newest()
        state = checkpoints.load(step, training_tensors(self.trainer.model, self.trainer.optimizers))
        self.step, self.metrics_length = step, state["metrics_length"]
        self.curriculum.load_state_dict(state["curriculum"])
        self.temperature.load_state_dict(state["temperature"])
        self.pool = Pool(*self._prompts(), self.config.rollout.max_staleness)
        self.pool.load_state_dict(state["pool"])
        return problems


def pool_members(path: str, name: str) -> set[str]:
    """Return the ids of a pool's tasks. Raises ValueError if `path` is not what `glm45 rl pools` wrote."""
    try:
        return set(read_json(path)["pools"][name])
    except (KeyError, TypeError):
        raise ValueError(f"{path} has no {name} pool: name the file that `glm45 rl pools` wrote") from None


def read_task_files(config: RLConfig) -> tuple[list[Task], list[Task]]:
    """Return training and held-out tasks. Raises ValueError if a prompt is in both, or a set is empty."""
    train, held_out = list(read_tasks(config.tasks)), list(read_tasks(config.held_out))
    if config.expert_verified_only:
        train = [task for task in train if task.verifier != "science"] + list(
            expert_verified_only(task for task in train if task.verifier == "science")
        )
    if not train or not held_out:
        raise ValueError(f"{config.tasks} has {len(train)} tasks, {config.held_out} {len(held_out)}: both need some")
    shared = {question(task) for task in train} & {question(task) for task in held_out}
    if shared:
        raise ValueError(
            f"{len(shared)} questions are in both {config.tasks} and {config.held_out}, such as {min(shared)!r}: "
            "split them by hash (glm45.environments.tasks.split_tasks)"
        )
    # A random part, not the first: a file may hold one domain after another.
    chosen = random.Random(derive_seed(config.seed, "held-out tasks")).sample(range(len(held_out)), len(held_out))
    return train, [held_out[index] for index in sorted(chosen[: config.evaluation.num_tasks])]


def open_run(folder: Path, config: RLConfig) -> None:
    """Make the run folder and save the configuration, or check that it is the same run's.

    Raises ValueError if the folder holds a run of another configuration or of files with other contents (kept in
    `inputs.json`); `steps`, `tracker` and the names of files may change.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path, inputs = folder / "config.json", folder / "inputs.json"
    values, contents = to_dict(config), {name: fingerprint(getattr(config, name)) for name in INPUTS}
    if path.exists():
        before = to_dict(from_dict(RLConfig, read_json(path)))  # with the defaults of fields that are newer than it
        different = {key for key in values if before[key] != values[key]} - {*MAY_CHANGE, *INPUTS}
        if inputs.exists():
            held = read_json(inputs)
            different |= {name for name in INPUTS if held[name] != contents[name]}
        if different:
            named = ", ".join(sorted(different))
            raise ValueError(f"{folder} holds a run with other values of {named}: use another folder")
    write_atomically(inputs, json.dumps(contents, indent=1) + "\n")
    write_atomically(path, json.dumps(values, indent=1) + "\n")
