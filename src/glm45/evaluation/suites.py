"""Suites by name: which tasks are asked and how answers are drawn.

Generated suites ask only what `is_held_out_task` keeps out of every training set, and `long` texts of its own.
"""

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

from glm45.config import configuration
from glm45.corpus.arithmetic import ArithmeticConfig
from glm45.environments.arithmetic import arithmetic_tasks
from glm45.environments.instructions import instruction_tasks
from glm45.environments.protocol import Task
from glm45.environments.reasoning_gym import reasoning_gym_tasks
from glm45.environments.tasks import split_tasks
from glm45.environments.tools import tool_tasks
from glm45.evaluation.benchmarks import BENCHMARKS
from glm45.evaluation.families import FAMILIES, family_tasks
from glm45.evaluation.ifeval import ifeval
from glm45.evaluation.long_context import SAMPLE, needle_tasks
from glm45.evaluation.pathology import without_pathology
from glm45.evaluation.runner import Suite, SuiteSettings
from glm45.evaluation.targets import LocalTarget, Sampling, Target
from glm45.evaluation.word_problems import word_problems

logger = logging.getLogger(__name__)

REPORT_SAMPLING = Sampling(temperature=0.6, top_p=0.95, max_tokens=81_920)
"""Of the report's evaluation toolkit (its public repository's defaults)."""

REPORT_SETTINGS = {
    "aime": SuiteSettings(num_samples=32, sampling=REPORT_SAMPLING),
    "gpqa": SuiteSettings(num_samples=8, sampling=REPORT_SAMPLING, last_characters=1024),
    "math-500": SuiteSettings(num_samples=3, sampling=REPORT_SAMPLING),
    "scicode": SuiteSettings(num_samples=3, sampling=REPORT_SAMPLING),
    "livecodebench": SuiteSettings(num_samples=2, sampling=REPORT_SAMPLING),
    "mmlu-pro": SuiteSettings(num_samples=1, sampling=REPORT_SAMPLING),
}
"""Samples, temperature and judged characters of the report (section 4 and its toolkit), by benchmark."""

UNKNOWN_CONTEXT = 2000
"""Characters of the longest text of `long` for an endpoint, which does not tell what it was trained for."""
AROUND_NEEDLE = 128
"""Tokens left for the question and the chat's form, which a small vocabulary needs."""


@configuration
class SuiteOptions:
    """How large the generated suites are."""

    num_tasks: int = 200
    """Tasks of a generated suite; all that there are, and a warning, where a family has fewer held-out prompts."""
    seed: int = 0
    """Root of generated tasks."""
    settings: SuiteSettings = SuiteSettings()
    """How answers are drawn and judged, such as `settings.num_samples=4`; `--preset` sets it to the report's."""
    max_tokens: int = 0
    """Most tokens of one answer; 0 leaves that to `settings.sampling.max_tokens`."""
    limit: int = 0
    """Ask only so many tasks of a public benchmark; 0 asks all."""
    characters: int = 0
    """Longest text of the `long` suite; 0 fills the context that the target was trained for, where it is known."""
    arithmetic: ArithmeticConfig = ArithmeticConfig()
    """Problems of the arithmetic suites."""

    def __post_init__(self) -> None:
        if self.characters < 0:
            raise ValueError(f"characters {self.characters} must be 0 or more")
        if self.num_tasks < 1 or self.max_tokens < 0:
            raise ValueError(f"num_tasks {self.num_tasks} must be 1 or more, max_tokens {self.max_tokens} 0 or more")

    @property
    def resolved_settings(self) -> SuiteSettings:
        """`settings`, with `max_tokens` where it is given."""
        if not self.max_tokens:
            return self.settings
        sampling = dataclasses.replace(self.settings.sampling, max_tokens=self.max_tokens)
        return dataclasses.replace(self.settings, sampling=sampling)


def held_out(tasks: Callable[[int, int], Iterable[Task]], options: SuiteOptions) -> list[Task]:
    """Return `num_tasks` held-out tasks with different prompts from a generator `tasks(seed, count)`.

    A small family has fewer: then all that were found. Raises ValueError if there are none.
    """
    found: dict[str, Task] = {}
    for attempt in range(8):  # more each time: some generators draw from a list that only grows with the number
        num_before = len(found)
        _, kept = split_tasks(tasks(options.seed + attempt, 30 * options.num_tasks << attempt))
        for task in kept:
            found.setdefault(str(task.messages), task)
            if len(found) == options.num_tasks:
                return list(found.values())
        if attempt >= 2 and found and len(found) == num_before:
            break
    if not found:
        raise ValueError(f"no held-out prompt where {options.num_tasks} were asked for")
    logger.warning("only %d different held-out prompts where %d were asked for", len(found), options.num_tasks)
    return list(found.values())


def arithmetic(options: SuiteOptions, *, thinking: bool) -> list[Task]:
    """Held-out arithmetic, with written-out steps or answered directly."""
    tasks = held_out(lambda seed, n: arithmetic_tasks(seed, n, options.arithmetic), options)
    return [dataclasses.replace(task, thinking=thinking) for task in tasks]


def tools(options: SuiteOptions) -> list[Task]:
    """Held-out requests that need one call, several or none."""
    return held_out(tool_tasks, options)


def instructions(options: SuiteOptions) -> list[Task]:
    """Held-out requests whose constraints are checked by rules."""
    return held_out(instruction_tasks, options)


REASONING_FAMILIES = ("chain_sum", "spell_backward", "gcd", "simple_equations", "count_bits", "products")


def reasoning(options: SuiteOptions) -> list[Task]:
    """Held-out entries of several reasoning-gym families and of our word problems, in equal parts."""
    each = dataclasses.replace(options, num_tasks=max(1, options.num_tasks // (1 + len(REASONING_FAMILIES))))

    def family_tasks(family: str) -> Iterator[Task]:
        yield from held_out(lambda seed, n: reasoning_gym_tasks(family, seed, n), each)

    return [*held_out(word_problems, each), *(task for family in REASONING_FAMILIES for task in family_tasks(family))]


def base(options: SuiteOptions) -> list[Task]:
    """Multiple choice by likelihood from every generated family, in equal parts."""
    each = max(1, options.num_tasks // len(FAMILIES))
    return [task for family in FAMILIES for task in family_tasks(family, options.seed, each)]


def long_context(options: SuiteOptions) -> list[Task]:
    """Needles in texts of a quarter, half and all of the length."""
    longest = options.characters or UNKNOWN_CONTEXT
    each = max(1, options.num_tasks // 3)
    return [task for part in (4, 2, 1) for task in needle_tasks(options.seed, each, longest // part)]


def fitted(options: SuiteOptions, target: Target, length: int | None) -> SuiteOptions:
    """Return options whose texts fill `length` tokens, or all of the target's context where that is not known."""
    if options.characters or not isinstance(target, LocalTarget):
        return options
    room = min(length or target.max_length, target.max_length) - options.resolved_settings.sampling.max_tokens
    return dataclasses.replace(options, characters=max(1, target.characters_in(room - AROUND_NEEDLE, SAMPLE)))


def pathology(options: SuiteOptions) -> list[Task]:
    """Questions of every generated family, judged by the form of the answer only."""
    each = dataclasses.replace(options, num_tasks=max(1, options.num_tasks // 3))
    return list(without_pathology([*arithmetic(each, thinking=True), *arithmetic(each, thinking=False), *tools(each)]))


def benchmark(tasks: Callable[[], Iterator[Task]]) -> Callable[[SuiteOptions], list[Task]]:
    """Return a suite of a public benchmark's tasks."""
    return lambda options: list(islice(tasks(), options.limit or None))


SUITES: dict[str, Callable[[SuiteOptions], list[Task]]] = {
    "arithmetic-thinking": lambda options: arithmetic(options, thinking=True),
    "arithmetic-direct": lambda options: arithmetic(options, thinking=False),
    "tools": tools,
    "instructions": instructions,
    "reasoning": reasoning,
    "base": base,
    "pathology": pathology,
    "long": long_context,
    "ifeval": benchmark(ifeval),
    **{name: benchmark(tasks) for name, tasks in BENCHMARKS.items()},
}
"""Generated suites, and public benchmarks whose data `glm45 eval --fetch` brings."""

GROUPS = {
    "code": ["humaneval"],
    "aime": ["aime24", "aime25"],
    "math": ["math-500", "gsm"],
    "bfcl": [name for name in BENCHMARKS if name.startswith("bfcl-")],
}
"""Names that stand for several public benchmarks."""


def expand(names: Iterable[str]) -> list[str]:
    """Return names of suites, groups replaced by what they hold."""
    return [each for name in names for each in GROUPS.get(name, [name])]


def build_suite(name: str, options: SuiteOptions) -> Suite:
    """Return a suite by name. Raises ValueError with the known names."""
    if name not in SUITES:
        raise ValueError(f"no suite {name!r}; known: {', '.join([*SUITES, *GROUPS])}")
    return Suite(name, SUITES[name](options), options.resolved_settings)


def report_settings(name: str) -> SuiteSettings:
    """Return the report's settings for a benchmark. Raises ValueError with the known names."""
    if name not in REPORT_SETTINGS:
        raise ValueError(f"no preset {name!r}; known: {', '.join(REPORT_SETTINGS)}")
    return REPORT_SETTINGS[name]
