"""The rows of every step, read ahead in a thread; which rows they are follows from the step's number alone."""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm45.data.answers import AnswersOnly
from glm45.data.folder import DataFolder
from glm45.data.loader import Batch, Loader, prefetch
from glm45.text.tokenizer import Tokenizer
from glm45.training.parallel import World
from glm45.training.run import TrainConfig
from glm45.training.schedule import Plan, Step


@dataclass(frozen=True)
class Rows:
    """This rank's rows of one step."""

    step: Step
    batch: Batch


class Batches:
    """The loaders of a run's stages, each going on in every dataset where the stage before it stopped."""

    def __init__(
        self, config: TrainConfig, plan: Plan, folder: DataFolder, world: World, tokenizer: Tokenizer | None = None
    ) -> None:
        self.folder, self.plan, self.world = folder, plan, world
        self._answers_only = AnswersOnly(tokenizer) if tokenizer else None
        self.loaders: list[Loader] = []
        self.epochs: list[dict[str, float]] = []  # how many times each stage reads each dataset
        for number, stage in enumerate(config.stages):
            before = self.loaders[-1].cursors(plan.stage_rows(number - 1)) if self.loaders else None
            loader = Loader(folder, stage.mixture, stage.sequence_length, stage.packing, config.seed, start=before)
            self.loaders.append(loader)
            self.epochs.append(loader.epochs(plan.stage_rows(number)))
        _check_divisible(plan, world.num_data_ranks)

    def read(self, index: int) -> Rows:
        """Return this rank's rows of step `index`."""
        step = self.plan.step(index)
        segment = step.segment
        loader = self.loaders[segment.stage_index]
        batch = loader.rows(step.first_row, segment.rows, self.world.data_rank, self.world.num_data_ranks)
        if segment.stage.answers_only:
            assert self._answers_only is not None, "answers are found by the tokenizer's role tokens"
            batch = self._answers_only(batch)
        return Rows(step, batch)

    def ahead(self, first: int) -> Iterator[Rows]:
        """Yield the rows of step `first` and all later ones, made while the model works."""
        return prefetch(self.read, first, self.plan.num_steps)


def open_data(config: TrainConfig) -> DataFolder:
    """Open the recipe's data folder. Raises FileNotFoundError or ValueError, naming the file."""
    if not Path(config.data).exists():
        raise FileNotFoundError(f"no data at {config.data}: build it with glm45 data build, or set data=FOLDER")
    # One process a machine reads every byte; if it finds damage, the others stop with it.
    return DataFolder.open(config.data, check=os.environ.get("LOCAL_RANK", "0") == "0")


def _check_divisible(plan: Plan, num_ranks: int) -> None:
    for segment in plan.segments:
        if segment.rows % num_ranks:
            raise ValueError(
                f"stage {segment.stage.name!r}: a batch of {segment.rows} rows cannot be divided among {num_ranks} "
                "ranks: change batch_tokens, batch_warmup_from or the layout"
            )
