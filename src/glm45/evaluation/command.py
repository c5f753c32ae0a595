"""What `glm45 eval` does, once its arguments are read."""

import sys
from collections.abc import Sequence
from pathlib import Path

from glm45.config import override
from glm45.evaluation.perplexity import held_out_perplexity
from glm45.evaluation.runner import SuiteResult, run_suite
from glm45.evaluation.suites import SuiteOptions, build_suite
from glm45.evaluation.targets import HttpTarget, LocalTarget, Target


def evaluate(
    model: str, suites: Sequence[str], folder: Path, overrides: Sequence[str] = (), served_name: str | None = None
) -> list[SuiteResult]:
    """Run suites against a checkpoint, a run or an endpoint, print their figures and return them.

    `overrides` are those of `SuiteOptions`. Transcripts and results go to `folder/SUITE`; what is there already is not
    asked again. Raises ValueError, FileNotFoundError or OSError for what a user can mend.
    """
    options = override(SuiteOptions(), overrides)
    built = [build_suite(name, options) for name in suites]
    target = open_target(model, served_name)
    results = []
    try:
        for suite in built:
            result = run_suite(target, suite, folder / suite.name, progress=_tell)
            print(describe(result))
            results.append(result)
    finally:
        target.close()
    return results


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


def open_target(model: str, served_name: str | None = None) -> Target:
    """Return the target that `model` names: a URL, a checkpoint folder, or a run folder with a `model` in it."""
    if model.startswith(("http://", "https://")):
        return HttpTarget(model, served_name)
    return LocalTarget.load(checkpoint_folder(model))


def describe(result: SuiteResult) -> str:
    """Return a result as lines for people."""
    lines = [f"{result.suite}: {result.num_answers} answers, {result.mean_tokens:.0f} tokens each on average"]
    for name, value in sorted(result.metrics.items(), key=lambda item: item[0] != "score"):
        lines.append(f"  {name:<24} {value.mean:7.1%}  [{value.low:.1%}, {value.high:.1%}]  {value.count} tasks")
    lines += [f"  not judged ({kind})       {count}" for kind, count in result.failures.items()]
    return "\n".join(lines)


def _tell(done: int, total: int) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} answers", end="\n" if done == total else "", file=sys.stderr, flush=True)
