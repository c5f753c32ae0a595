"""The command line: one function a verb, parsing and nothing else.

A verb's function adds its arguments to a parser and sets `run`, the function that does the work. Whatever is heavy
is imported inside `run`, so that `glm45 --help` answers at once.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from glm45 import __version__


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    0 is success, 1 a failure told in one line, 2 a usage error, 130 Ctrl-C.
    """
    options = build_parser().parse_args(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left: not a failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, MemoryError) as error:
        if os.environ.get("GLM45_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"glm45: {message}", file=sys.stderr)
        return 1


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every verb."""
    parser = argparse.ArgumentParser(
        prog="glm45",
        description="Train, post-train, serve and study GLM-4.5-class models.",
        epilog="Set GLM45_TRACEBACK=1 to see the traceback of a failure.",
    )
    parser.add_argument("--version", action="version", version=f"glm45 {__version__}")
    verbs = parser.add_subparsers(title="verbs", metavar="VERB", required=True)
    for name, (define, summary) in VERBS.items():
        define(verbs.add_parser(name, help=summary, description=summary))
    return parser


def define_inspect(parser: argparse.ArgumentParser) -> None:
    """`glm45 inspect NAME_OR_PATH`: what a model consists of and costs."""
    parser.add_argument("model", nargs="?", help="a preset (glm-4.5, glm-4.5-air, mini, nano, demo, pico) or a folder")
    parser.add_argument("--length", type=int, default=4096, help="sequence length in tokens (default: 4096)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--kernels", action="store_true", help="print which kernels run on this machine, and why")
    parser.set_defaults(run=_inspect)


def _inspect(options: argparse.Namespace) -> None:
    from glm45.model.census import describe, summary
    from glm45.model.config import PRESETS, ModelConfig, preset

    if options.kernels:
        from glm45.kernels.probe import report

        print(report())
    if options.model is None:
        if not options.kernels:
            raise ValueError(f"name a preset ({', '.join(PRESETS)}) or a checkpoint folder, or ask for --kernels")
        return
    if options.length < 1:
        raise ValueError(f"--length is {options.length}: give 1 or more tokens")
    config: ModelConfig
    if options.model not in PRESETS and Path(options.model).is_dir():
        from glm45.model.hub import load_config

        config = load_config(options.model)
    else:
        config = preset(options.model)
    if options.json:
        print(json.dumps({"model": options.model, **describe(config, options.length)}, indent=2))
    else:
        print(summary(options.model, config, options.length))


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "inspect": (define_inspect, "show a model's parameters, operations and cache size"),
}


if __name__ == "__main__":
    sys.exit(main())
