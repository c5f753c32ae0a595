"""The data pool: where prompts wait and trajectories land (report section 3.5).

Prompts are drawn in an order that depends on the seed alone. A group is in flight from `begin` until it lands, is
dropped or is given back. The whole pool, groups in flight included, goes into the checkpoint as JSON.
"""

import random
from collections import Counter
from collections.abc import Sequence
from typing import Any

from glm45.environments.protocol import Task
from glm45.rl.sample import Sample
from glm45.seeds import derive_seed

Group = list[Sample]


class Pool:
    """Prompts of the stage in force and the groups that were made from them."""

    def __init__(self, tasks: Sequence[Task], seed: int, max_staleness: int = 0):
        """Hold `tasks`; `max_staleness` is how many updates a group may lie between sampling and learning.

        Raises ValueError if there are no tasks, or two of one id.
        """
        self.max_staleness = max_staleness
        self._num_begun = 0
        self._in_flight: dict[int, str] = {}
        self._landed: list[Group] = []
        self.counts: Counter[str] = Counter()
        """Groups by fate: `begun`, `landed`, `taken`, `given_back`, `stale`, and `dropped_*` by reason."""
        self._draw_from(tasks, seed)

    def enter_stage(self, tasks: Sequence[Task], seed: int) -> None:
        """Go on with other prompts. Landed groups of the old ones are dropped and counted; ids and counts go on."""
        assert not self._in_flight, "a stage ends between two steps"
        if self._landed:
            self.counts["dropped_stage"] += len(self._landed)
        self._landed = []
        self._draw_from(tasks, seed)

    def _draw_from(self, tasks: Sequence[Task], seed: int) -> None:
        self._tasks = {task.task_id: task for task in tasks}
        if not tasks or len(self._tasks) < len(tasks):
            raise ValueError(f"a pool needs tasks with ids of their own: {len(tasks)} given, {len(self._tasks)} ids")
        self._seed = seed
        self._num_drawn = 0
        self._order: tuple[int, list[str]] = (-1, [])
        self._waiting: list[str] = []

    @property
    def num_landed(self) -> int:
        """Groups that wait to be learnt from."""
        return len(self._landed)

    @property
    def num_in_flight(self) -> int:
        """Groups that are being made."""
        return len(self._in_flight)

    def begin(self) -> tuple[int, Task]:
        """Start a group: return its id, unique in the run, and the prompt whose turn it is."""
        task_id = self._waiting.pop(0) if self._waiting else self._draw()
        group_id = self._num_begun
        self._num_begun += 1
        self._in_flight[group_id] = task_id
        self.counts["begun"] += 1
        return group_id, self._tasks[task_id]

    def land(self, group: Group) -> None:
        """Put a finished group where training takes it from."""
        self._leave_flight(group[0].group_id)
        self._landed.append(group)
        self.counts["landed"] += 1

    def drop(self, group_id: int, reason: str) -> None:
        """Forget a group that cannot be learnt from, and count why; its prompt comes again in a later epoch."""
        self._leave_flight(group_id)
        self.counts[f"dropped_{reason}"] += 1

    def give_back(self, group_id: int) -> None:
        """Let the prompt of an aborted group wait again, in front."""
        self._waiting.insert(0, self._leave_flight(group_id))
        self.counts["given_back"] += 1

    def expire(self, weight_version: int) -> None:
        """Remove landed groups that are stale for the weights in force, count them, and let their prompts wait again.

        A group is stale when its oldest token is more than `max_staleness` versions behind `weight_version`.
        """
        fresh: list[Group] = []
        for group in self._landed:
            oldest = min(sample.weight_version for sample in group)
            if weight_version - oldest > self.max_staleness:
                self._waiting.append(group[0].task.task_id)
                self.counts["stale"] += 1
            else:
                fresh.append(group)
        self._landed = fresh

    def take(self, num_groups: int, weight_version: int) -> list[Group]:
        """Return up to `num_groups` landed groups, oldest first, and none that is stale (see `expire`)."""
        self.expire(weight_version)
        taken, self._landed = self._landed[:num_groups], self._landed[num_groups:]
        self.counts["taken"] += len(taken)
        return taken

    def state_dict(self) -> dict[str, Any]:
        """Return everything as JSON values; groups in flight are saved as prompts that wait."""
        return {
            "num_begun": self._num_begun,
            "num_drawn": self._num_drawn,
            "waiting": [*self._in_flight.values(), *self._waiting],
            "landed": [[sample.to_dict() for sample in group] for group in self._landed],
            "counts": dict(self.counts),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`. Raises ValueError if it names a prompt that is not in this pool."""
        unknown = set(state["waiting"]) - set(self._tasks)
        if unknown:
            raise ValueError(f"the saved pool has {len(unknown)} prompts that are not here, such as {min(unknown)!r}")
        self._num_begun, self._num_drawn = state["num_begun"], state["num_drawn"]
        self._waiting, self._in_flight = list(state["waiting"]), {}
        self._landed = [[Sample.from_dict(sample) for sample in group] for group in state["landed"]]
        self.counts = Counter(state["counts"])

    def _leave_flight(self, group_id: int) -> str:
        if group_id not in self._in_flight:
            raise ValueError(f"group {group_id} is not in flight: it landed, was dropped or was given back before")
        return self._in_flight.pop(group_id)

    def _draw(self) -> str:
        epoch, place = divmod(self._num_drawn, len(self._tasks))
        self._num_drawn += 1
        if self._order[0] != epoch:
            ids = sorted(self._tasks)
            random.Random(derive_seed(self._seed, "pool", epoch)).shuffle(ids)
            self._order = (epoch, ids)
        return self._order[1][place]
