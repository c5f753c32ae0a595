"""Which share of a stage's tokens comes from which dataset, and in which order rows take turns.

A dataset is named `<source>.<bucket>`, for example `stdlib-docs.high`; `<source>.heldout` is never trained on.
Shapes: R rows, D datasets.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import field
from fnmatch import fnmatchcase

import numpy as np

from glm45.config import configuration
from glm45.seeds import derive_seed

HELD_OUT = "heldout"
BITS = 30  # fixed-point precision of a share; rows are counted up to 2 ** (63 - BITS)


@configuration
class Mixture:
    """A table of weights over datasets, by name or by pattern such as `*.high` or `code-*.*`; `|` parts alternatives.

    A dataset belongs to the first weight whose pattern it matches. The weight is divided among the datasets of its
    pattern in proportion to their tokens times their repeats, so that `Mixture(repeats={"*.high": 3.2, "*.low": 0})`
    is the recipe of report section 2.2: everything at its natural rate, the top bucket 3.2 times, the lowest never.
    """

    weights: dict[str, float] = field(default_factory=lambda: {"*": 1.0})
    """Share of the stage's tokens by pattern, in any unit: they are normalised. Not in the report."""
    repeats: dict[str, float] = field(default_factory=dict)
    """How many times a token of a matching dataset counts; 1 where no pattern matches, 0 discards the dataset."""
    max_epochs: float | None = None
    """Refuse a stage that reads a dataset more often than this. Not in the report."""

    def __post_init__(self) -> None:
        for name in ("weights", "repeats"):
            for pattern, value in getattr(self, name).items():
                if not 0 <= value < float("inf"):
                    raise ValueError(f"{name}[{pattern!r}] = {value}: it must be a number of at least 0")
        if not any(self.weights.values()):
            raise ValueError("weights are all zero: give at least one dataset a weight")


def shares(mixture: Mixture | Mapping[str, float], tokens: Mapping[str, int]) -> dict[str, float]:
    """Return the share of tokens of every dataset that takes part, summing to 1, given all datasets' token counts.

    Raises ValueError for a pattern that matches no dataset, for one that names a held-out dataset, and for a weight
    whose datasets have no tokens.
    """
    if not isinstance(mixture, Mixture):
        mixture = Mixture(weights=dict(mixture))
    names = [name for name in tokens if not name.endswith(f".{HELD_OUT}")]
    for pattern in (*mixture.weights, *mixture.repeats):
        _refuse_unknown(pattern, names)
    effective = {name: tokens[name] * _first_match(mixture.repeats, name, default=1.0) for name in names}
    members: dict[str, list[str]] = {pattern: [] for pattern in mixture.weights}
    for name in names:
        first = next((pattern for pattern in mixture.weights if _matches(name, pattern)), None)
        if first is not None:
            members[first].append(name)
    total = sum(mixture.weights.values())
    result: dict[str, float] = {}
    for pattern, weight in mixture.weights.items():
        if not weight:
            continue
        size = sum(effective[name] for name in members[pattern])
        empty = [name for name in members[pattern] if not tokens[name]]
        if empty or not size:
            raise ValueError(f"weights[{pattern!r}] = {weight}, and {_why_nothing(members[pattern], empty)}")
        result |= {name: weight / total * effective[name] / size for name in members[pattern] if effective[name]}
    return dict(sorted(result.items()))


def epochs(mixture: Mixture | Mapping[str, float], tokens: Mapping[str, int], stage_tokens: int) -> dict[str, float]:
    """Return how many times a stage of `stage_tokens` reads each dataset.

    Raises ValueError where that is more often than the mixture's `max_epochs`.
    """
    count = {name: share * stage_tokens / tokens[name] for name, share in shares(mixture, tokens).items()}
    limit = mixture.max_epochs if isinstance(mixture, Mixture) else None
    over = {name: f"{value:.2f}" for name, value in count.items() if limit is not None and value > limit}
    if over:
        raise ValueError(f"max_epochs = {limit}, and {stage_tokens} tokens read {over}: lower their weight")
    return count


class Interleaver:
    """The order in which datasets take turns row by row: after any number of rows, within 3 rows of exact shares.

    Row n's dataset and its number within the dataset follow in closed form. Datasets are the leaves of a binary tree
    of about equal halves; of a node's first n rows, floor(n * a + b) go left (a the left half's share, b a seeded
    phase), which is never off by a whole row, and each level halves the error of the level above.
    """

    def __init__(self, share_D: Sequence[float], seed: int) -> None:
        rng = np.random.default_rng(derive_seed(seed, "interleaver"))
        self.num_datasets = len(share_D)
        by_share = sorted(range(len(share_D)), key=lambda dataset: -share_D[dataset])
        self._root = _build_tree(by_share, share_D, rng)

    def assign(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Return, for rows `first` to `last - 1`, their dataset and their number among its rows, int64 [R] each."""
        assert last < 1 << (63 - BITS)
        dataset_R = np.empty(last - first, dtype=np.int64)
        number_R = np.empty(last - first, dtype=np.int64)

        def visit(node: "_Node | int", rows: np.ndarray, numbers: np.ndarray) -> None:
            if isinstance(node, int):
                dataset_R[rows], number_R[rows] = node, numbers
                return
            left, ratio, phase = node[0], node[2], node[3]
            before = (numbers * ratio + phase) >> BITS
            goes_left = ((numbers + 1) * ratio + phase) >> BITS > before
            visit(left, rows[goes_left], before[goes_left])
            visit(node[1], rows[~goes_left], (numbers - before)[~goes_left])

        visit(self._root, np.arange(last - first), np.arange(first, last, dtype=np.int64))
        return dataset_R, number_R

    def counts(self, rows: int) -> list[int]:
        """Return how many of the first `rows` rows each dataset gives."""
        count_D = [0] * self.num_datasets

        def visit(node: "_Node | int", number: int) -> None:
            if isinstance(node, int):
                count_D[node] = number
                return
            left = (number * node[2] + node[3]) >> BITS
            visit(node[0], left)
            visit(node[1], number - left)

        visit(self._root, rows)
        return count_D


_Node = tuple["_Node | int", "_Node | int", int, int]  # left, right, the left's share and the phase in fixed point


def _build_tree(datasets: list[int], share_D: Sequence[float], rng: np.random.Generator) -> "_Node | int":
    if len(datasets) == 1:
        return datasets[0]
    total = sum(share_D[dataset] for dataset in datasets)
    split, left = 1, share_D[datasets[0]]
    while split < len(datasets) - 1 and left + share_D[datasets[split]] <= total / 2:
        left += share_D[datasets[split]]
        split += 1
    ratio = min(max(round(left / total * (1 << BITS)), 1), (1 << BITS) - 1)
    phase = int(rng.integers(1 << BITS))
    return (
        _build_tree(datasets[:split], share_D, rng),
        _build_tree(datasets[split:], share_D, rng),
        ratio,
        phase,
    )


def _first_match(table: Mapping[str, float], name: str, default: float) -> float:
    return next((value for pattern, value in table.items() if _matches(name, pattern)), default)


def _matches(name: str, pattern: str) -> bool:
    return any(fnmatchcase(name, alternative) for alternative in pattern.split("|"))


def _refuse_unknown(pattern: str, names: Sequence[str]) -> None:
    if any(alternative.endswith(f".{HELD_OUT}") for alternative in pattern.split("|")):
        raise ValueError(f"mixture: {pattern!r} is held out for evaluation and cannot be trained on: leave it out")
    if any(_matches(name, pattern) for name in names):
        return
    near = difflib.get_close_matches(pattern, names, n=1)
    hint = f"did you mean {near[0]!r}?" if near else f"datasets here: {', '.join(names) or 'none'}"
    raise ValueError(f"mixture: no dataset matches {pattern!r}; {hint}")


def _why_nothing(members: Sequence[str], empty: Sequence[str]) -> str:
    if not members:
        return "earlier patterns took all its datasets: put the narrower pattern first"
    if empty:
        return f"{', '.join(empty)} has no tokens: build the data again with a source that gives some"
    return f"repeats discards {', '.join(members)}: leave the weight out"
