"""What `glm45 eval` does, once its arguments are read."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from glm45.config import override
from glm45.evaluation.contamination import measure_contamination, training_documents, write_contamination
from glm45.evaluation.endpoint import HttpTarget
from glm45.evaluation.judge import Judge
from glm45.evaluation.likelihood import LIKELIHOOD, run_choices
from glm45.evaluation.perplexity import held_out_perplexity
from glm45.evaluation.runner import Suite, SuiteResult, run_suite
from glm45.evaluation.suites import SuiteOptions, build_suite, report_settings
from glm45.evaluation.targets import LocalTarget, Target

API_KEY = "GLM45_API_KEY"
"""Environment variable with the key for the endpoint that is evaluated."""
JUDGE_API_KEY = "GLM45_JUDGE_API_KEY"
"""Environment variable with the key for the judge's endpoint."""


def read_options(overrides: Sequence[str], preset: str | None) -> SuiteOptions:
    """Return the options that a command line names: the preset's settings, then overrides."""
    options = SuiteOptions(settings=report_settings(preset)) if preset else SuiteOptions()
    return override(options, overrides)


def evaluate(
    target: Target, suites: Sequence[str], folder: Path, options: SuiteOptions, judge: Judge | None = None
) -> list[SuiteResult]:
    """Run suites against a target, print their figures and return them.

    Transcripts and results go to `folder/SUITE`; what is there already is not asked again. Raises ValueError,
    FileNotFoundError or OSError for what a user can mend.
    """
    results = []
    for suite in [build_suite(name, options) for name in suites]:
        results.append(run_any(target, suite, folder / suite.name, judge))
        print(describe(results[-1]))
    return results


def run_any(target: Target, suite: Suite, folder: Path, judge: Judge | None = None) -> SuiteResult:
    """Run a suite the way its tasks want: by likelihood, or by generating and judging."""
    if suite.tasks and suite.tasks[0].verifier == LIKELIHOOD:
        return run_choices(target, suite, folder, progress=_tell)
    return run_suite(target, suite, folder, judge=judge, progress=_tell)


def check_contamination(suites: Sequence[str], data: Path, folder: Path, options: SuiteOptions) -> None:
    """Say how far the suites' prompts occur in the training documents of `data`; details go to `folder/SUITE`."""
    for name in suites:
        finding = measure_contamination(build_suite(name, options).tasks, training_documents(data))
        path = folder / name / "contamination.json"
        write_contamination(finding, path)
        print(f"{name}: {finding.describe()} ({path})")


def measure_perplexity(model: str, data: str, length: int) -> None:
    """Print held-out perplexity by source and by position (the `base` suite's first part)."""
    folder = checkpoint_folder(model)
    for name, nats in held_out_perplexity(folder, Path(data), length=length).items():
        print(f"  {name:<24} {nats.mean:.4f} nats a token  [{nats.low:.4f}, {nats.high:.4f}]  {nats.count} rows")


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
        return HttpTarget(model, served_name, os.environ.get(API_KEY), extensions=extensions)
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
    lines += [f"  not judged ({kind})       {count}" for kind, count in result.failures.items()]
    return "\n".join(lines)


def _tell(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} answers", end="\n" if done == total else "", file=sys.stderr, flush=True)
