"""What `glm45 eval` does, once its arguments are read."""

import asyncio
import dataclasses
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from glm45.config import override
from glm45.evaluation.contamination import measure_contamination, training_documents, write_contamination
from glm45.evaluation.endpoint import HttpTarget
from glm45.evaluation.judge import Judge
from glm45.evaluation.likelihood import LIKELIHOOD, run_choices
from glm45.evaluation.perplexity import POSITION, held_out_perplexity
from glm45.evaluation.runner import Suite, SuiteResult, run_suite, store
from glm45.evaluation.statistics import Estimate
from glm45.evaluation.suites import SuiteOptions, build_suite, expand, fitted, report_settings
from glm45.evaluation.targets import LocalTarget, Target

API_KEY = "GLM45_API_KEY"
"""Environment variable with the key for the endpoint that is evaluated."""
PERPLEXITY = "perplexity"
"""What stands among suites for held-out perplexity alone."""
BASE_LENGTH = 512
"""Most tokens of a row for perplexity by source."""
JUDGE_API_KEY = "GLM45_JUDGE_API_KEY"
"""Environment variable with the key for the judge's endpoint."""


def read_options(overrides: Sequence[str], preset: str | None) -> SuiteOptions:
    """Return the options that a command line names: the preset's settings, then overrides."""
    options = SuiteOptions(settings=report_settings(preset)) if preset else SuiteOptions()
    return override(options, overrides)


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOut:
    """On what perplexity is measured."""

    data: Path | None
    """Data folder; None measures none."""
    length: int | None
    """Tokens of the context up to which the model was trained; None is all of the model's."""

    @staticmethod
    def of(model: str, data: str | None, length: int | None) -> "HeldOut":
        """Return what is given, or else what a whole run's folder holds."""
        run = Path(model)
        own = run / "steps" / "data"
        if length is None and (run / "run.json").exists():
            stages = json.loads((run / "run.json").read_text())["training"]["stages"]
            length = max(stage["sequence_length"] for stage in stages)
        return HeldOut(data=Path(data) if data else own if own.exists() else None, length=length)


def evaluate(
    target: Target,
    suites: Sequence[str],
    folder: Path,
    options: SuiteOptions,
    judge: Judge | None = None,
    held_out: HeldOut | None = None,
) -> list[SuiteResult]:
    """Run suites, or groups of them, against a target, print their figures and return them.

    Transcripts and results go to `folder/SUITE`; what is there already is not asked again. With data, `base` also
    measures held-out perplexity by source, `long` by position, and `perplexity` is the two alone. Raises ValueError,
    FileNotFoundError or OSError for what a user can mend.
    """
    results = []
    held_out = held_out or HeldOut(data=None, length=None)
    options = fitted(options, target, held_out.length)
    chosen = expand(suites)
    for suite in [build_suite(name, options) if name != PERPLEXITY else None for name in chosen]:
        name = suite.name if suite else PERPLEXITY
        result = run_any(target, suite, folder / name, judge) if suite else SuiteResult(name, target.name, {})
        if held_out.data is not None and name in ("base", "long", PERPLEXITY):
            result = dataclasses.replace(result, nats=measure_perplexity(target, held_out, name))
            (folder / name).mkdir(parents=True, exist_ok=True)
            store(result, folder / name)
        results.append(result)
        print(describe(result))
    return results


def run_any(target: Target, suite: Suite, folder: Path, judge: Judge | None = None) -> SuiteResult:
    """Run a suite the way its tasks want: by likelihood, or by generating and judging."""
    if suite.tasks and suite.tasks[0].verifier == LIKELIHOOD:
        return run_choices(target, suite, folder, progress=_tell)
    return run_suite(target, suite, folder, judge=judge, progress=_tell)


def check_contamination(suites: Sequence[str], data: Path, folder: Path, options: SuiteOptions) -> None:
    """Say how far the suites' prompts occur in the training documents of `data`; details go to `folder/SUITE`."""
    for name in expand(suites):
        finding = measure_contamination(build_suite(name, options).tasks, training_documents(data))
        path = folder / name / "contamination.json"
        write_contamination(finding, path)
        print(f"{name}: {finding.describe()} ({path})")


def measure_perplexity(target: Target, held_out: HeldOut, suite: str) -> dict[str, Estimate]:
    """Return held-out nats a token: by source for `base`, by position for `long`, both for `perplexity`.

    Raises ValueError for an endpoint, whose tokenizer is not known.
    """
    if not isinstance(target, LocalTarget) or held_out.data is None:
        raise ValueError(f"{target.name}: perplexity needs a checkpoint or a run, and --data DIR: its tokens are ids")
    length = min(held_out.length or target.max_length, target.max_length)
    if suite == "base":
        length = min(length, BASE_LENGTH)
    found = held_out_perplexity(target.folder, held_out.data, length=length)
    unwanted = {"base": True, "long": False}.get(suite)
    return {name: nats for name, nats in found.items() if name.startswith(POSITION) is not unwanted}


def default_folder(model: str | None) -> Path:
    """Return where a model's transcripts and results go: a folder of its own."""
    return Path("evaluation") / re.sub(r"[^\w.-]+", "-", model or "").strip("-.")


def checkpoint_folder(model: str) -> Path:
    """Return the folder with weights and tokenizer that `model`, a checkpoint or a run, names."""
    folder = Path(model)
    for candidate in (folder, folder / "model"):
        if (candidate / "config.json").exists() and (candidate / "tokenizer.json").exists():
            return candidate
    raise FileNotFoundError(
        f"{model} is neither a URL nor a folder with config.json, weights and tokenizer.json (nor a run with such a "
        "folder called model): export a run with glm45 export RUN OUT"
    )


def open_target(model: str, served_name: str | None = None, *, extensions: bool = True) -> Target:
    """Return the target that `model` names: a URL, a checkpoint folder, or a run folder with a `model` in it."""
    if model.startswith(("http://", "https://")):
        endpoint = HttpTarget(model, served_name, os.environ.get(API_KEY), extensions=extensions)
        asyncio.run(endpoint.model_name())  # answers are kept under it
        return endpoint
    return LocalTarget.load(checkpoint_folder(model))


def open_judge(url: str, served_name: str | None) -> Judge:
    """Return a judge behind an OpenAI-style endpoint."""
    return Judge(HttpTarget(url, served_name, os.environ.get(JUDGE_API_KEY), extensions=False))


def describe(result: SuiteResult) -> str:
    """Return a result as lines for people."""
    length = f", {result.mean_tokens:.0f} tokens each on average" if result.mean_tokens else ""
    lines = [f"{result.suite}: {result.num_answers} answers{length}"]
    for name, value in sorted(result.metrics.items(), key=lambda item: item[0] != "score"):
        lines.append(f"  {name:<24} {value.mean:7.1%}  [{value.low:.1%}, {value.high:.1%}]  {value.count} tasks")
    lines += [
        f"  {name:<24} {nats.mean:.4f} nats a token  [{nats.low:.4f}, {nats.high:.4f}]  {nats.count} rows"
        for name, nats in result.nats.items()
    ]
    lines += [f"  not judged ({kind})       {count}" for kind, count in result.failures.items()]
    return "\n".join(lines)


def _tell(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} answers", end="\n" if done == total else "", file=sys.stderr, flush=True)
