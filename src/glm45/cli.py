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
from glm45.pipeline import StepError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb and return the exit status.

    0 is success, 1 a failure told in one line, 2 a usage error, 130 Ctrl-C.
    """
    options = parse(arguments)
    try:
        return options.run(options) or 0
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader of our output left: not a failure of ours
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except (ValueError, OSError, ImportError, MemoryError, StepError) as error:
        if os.environ.get("GLM45_TRACEBACK"):
            raise
        message = " ".join(str(error).split()) or type(error).__name__
        print(f"glm45: {message}", file=sys.stderr)
        return 1


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse a command line; overrides (`name=value`) may stand before, between and after options."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    strange = [each for each in rest if each.startswith("-") or "=" not in each]
    if strange or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(strange or rest)}")
    if rest:
        options.overrides = [*options.overrides, *rest]
    return options


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


def define_data(parser: argparse.ArgumentParser) -> None:
    """Arguments of `glm45 data`."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    build = actions.add_parser("build", help="build a corpus from a recipe")
    build.add_argument("recipe", help="name of a recipe (demo, debian, full) or a JSON file")
    build.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="dotted overrides of the recipe")
    build.add_argument("--out", required=True, metavar="DIR", help="folder of the corpus; an unfinished one goes on")
    build.add_argument("--workers", type=int, metavar="N", help="tasks at once (default: all cores)")
    build.set_defaults(run=_data_build)
    report = actions.add_parser("report", help="write DIR/report.html on a built corpus")
    report.add_argument("folder", metavar="DIR")
    report.set_defaults(run=_data_report)
    adopt = actions.add_parser("adopt", help="describe Megatron shards made elsewhere, so that training accepts them")
    adopt.add_argument("folder", metavar="DIR", help="holds tokenizer/ and shards/*.bin|.idx; gets a manifest.json")
    adopt.set_defaults(run=_data_adopt)
    score = actions.add_parser("score", help="have a language model score texts: seeds for a quality scorer")
    score.add_argument("texts", metavar="TEXTS", help="JSONL file with a text on each line")
    score.add_argument("--scorer", default="mathematics", help="scorer that learns from them (default: mathematics)")
    score.add_argument("--question", required=True, help="such as: What share of this text teaches mathematics?")
    score.set_defaults(run=_data_score)
    teach = actions.add_parser("teach", help="have a language model work tasks out, and keep what is right")
    teach.add_argument("tasks", metavar="TASKS", help="JSONL file with a prompt and an answer on each line")
    teach.add_argument("--verifier", default="mathematics", help="what compares answers (default: mathematics)")
    teach.add_argument("--samples", type=int, default=4, metavar="N", help="answers to each task (default: 4)")
    teach.set_defaults(run=_data_teach)
    for action in (score, teach):
        action.add_argument("out", metavar="OUT", help="JSONL file to write")
        action.add_argument("--url", required=True, help="an OpenAI-style endpoint, such as http://host/v1")
        action.add_argument("--model", required=True, help="the model's name at the endpoint")


def _data_build(options: argparse.Namespace) -> None:
    from glm45.config import override
    from glm45.corpus.build import build
    from glm45.corpus.recipe import load
    from glm45.recipes.decontamination import against_evaluations

    workers = options.workers or os.cpu_count() or 1
    recipe = override(load(options.recipe), [f"executor.workers={workers}", *options.overrides])
    build(against_evaluations(recipe, Path(options.out) / "work" / "evaluations"), Path(options.out))


def _data_report(options: argparse.Namespace) -> None:
    from glm45.corpus.report import write_report

    print(write_report(Path(options.folder)))


def _data_adopt(options: argparse.Namespace) -> None:
    from glm45.data.folder import adopt

    for name, entry in adopt(Path(options.folder))["datasets"].items():
        print(f"{name}: {entry['documents']:,} documents, {entry['tokens']:,} tokens")


def _data_score(options: argparse.Namespace) -> None:
    from glm45.recipes.teacher import write_seeds

    texts, out, endpoint = Path(options.texts), Path(options.out), {"url": options.url, "model": options.model}
    print(json.dumps(write_seeds(texts, out, options.question, options.scorer, **endpoint)))


def _data_teach(options: argparse.Namespace) -> None:
    from glm45.recipes.teacher import write_worked_answers

    tasks, out, endpoint = Path(options.tasks), Path(options.out), {"url": options.url, "model": options.model}
    print(json.dumps(write_worked_answers(tasks, out, options.verifier, **endpoint, samples=options.samples)))


def define_train(parser: argparse.ArgumentParser) -> None:
    """`glm45 train RECIPE`: begin a run, or go on with it."""
    parser.add_argument("recipe", help="demo, nano_cpu, one_gpu, air or full; or a run's folder, to go on with it")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="dotted overrides of the recipe")
    parser.add_argument("--run", dest="folder", metavar="DIR", help="run folder (default: runs/RECIPE-training)")
    parser.add_argument("--dry-run", action="store_true", help="print stages, memory and time; train nothing")
    parser.add_argument("--allow-change", action="store_true", help="go on although the recipe has changed")
    parser.add_argument("--processes", type=int, metavar="N", help="processes on this machine (default: what pays)")
    parser.set_defaults(run=_train)


def _train(options: argparse.Namespace) -> int:
    from glm45.config import override
    from glm45.recipes.catalogue import is_run_folder, training_recipe
    from glm45.training.command import dry_run, run_training
    from glm45.training.run import Run

    config = override(training_recipe(options.recipe), options.overrides)
    # `glm45 run` has runs/RECIPE
    default = options.recipe if is_run_folder(options.recipe) else f"runs/{Path(options.recipe).stem}-training"
    folder = Path(options.folder or default)
    run = Run.open(folder, config, options.allow_change)
    if options.dry_run:
        dry_run(run)
        return 0
    arguments = ["train", options.recipe, *options.overrides, "--run", str(folder)]
    return run_training(run, arguments + ["--allow-change"] * options.allow_change, options.processes)


def define_export(parser: argparse.ArgumentParser) -> None:
    """`glm45 export RUN OUT`: a run's weights in the hub layout."""
    parser.add_argument("folder", metavar="RUN", help="run folder")
    parser.add_argument("out", metavar="OUT", help="folder to write")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint to export (default: the newest)")
    parser.set_defaults(run=_export)


def _export(options: argparse.Namespace) -> None:
    from glm45.training.command import export

    source = export(Path(options.folder), Path(options.out), options.dtype, options.step)
    print(f"wrote {source} to {options.out}")


def define_chat(parser: argparse.ArgumentParser) -> None:
    """`glm45 chat PATH_OR_RUN`: converse in the terminal; `glm45 chat render|parse`: templates laid open, as JSON."""
    parser.add_argument(
        "target",
        metavar="TARGET",
        help="a checkpoint or run folder; or 'render' (messages to text) or 'parse' (text on standard input)",
    )
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="of a conversation: engine.num_drafts=1 ...")
    parser.add_argument("--messages", metavar="FILE", help="JSON: a list of messages, or an object with 'messages'")
    parser.add_argument("--tools", metavar="FILE", help="JSON: a list of tools in OpenAI's form")
    parser.add_argument("--no-think", action="store_true", help="ask for an answer without reasoning")
    parser.add_argument("--dialect", default="glm-4.5", help="glm-4.5 (default) or glm-4.7")
    parser.add_argument("--ids", action="store_true", help="also print token ids and loss mask (needs --tokenizer)")
    parser.add_argument("--tokenizer", metavar="PATH", help="a tokenizer.json or a folder that holds one")
    parser.add_argument("--reasoning-open", action="store_true", help="parse: the prompt ended in <think>")
    parser.set_defaults(run=_chat)


def _chat(options: argparse.Namespace) -> None:
    if options.target not in ("render", "parse"):
        from glm45.config import override
        from glm45.serving.command import ServeConfig
        from glm45.serving.terminal import chat

        chat(options.target, override(ServeConfig(), options.overrides))
        return
    from glm45.config import read_json
    from glm45.text import debug

    tools = read_json(options.tools) if options.tools else None
    if options.target == "parse":
        result = debug.parsed(sys.stdin.read(), tools, options.reasoning_open)
    else:
        if not options.messages or (options.ids and not options.tokenizer):
            raise ValueError("chat render needs --messages FILE, and with --ids also --tokenizer PATH")
        thinking = False if options.no_think else None
        tokenizer = options.tokenizer if options.ids else None
        result = debug.rendered(read_json(options.messages), tools, thinking, options.dialect, tokenizer)
    print(json.dumps(result, indent=2, ensure_ascii=False))


def define_serve(parser: argparse.ArgumentParser) -> None:
    """`glm45 serve PATH`: an OpenAI-compatible server with a chat page."""
    parser.add_argument("path", metavar="PATH_OR_RUN", help="a checkpoint folder in the hub layout, or a run folder")
    parser.add_argument(
        "overrides", nargs="*", metavar="NAME=VALUE", help="such as limits.samples=64 engine.num_drafts=1"
    )
    parser.add_argument("--host", help="address to listen on (default: 127.0.0.1, this machine only)")
    parser.add_argument("--port", type=int, help="port to listen on (default: 8000; 0 takes a free one)")
    parser.set_defaults(run=_serve)


def _serve(options: argparse.Namespace) -> None:
    from glm45.config import override
    from glm45.serving.command import ServeConfig, serve

    given = [f"{name}={value}" for name in ("host", "port") if (value := getattr(options, name)) is not None]
    serve(options.path, override(ServeConfig(), [*given, *options.overrides]))


def define_run(parser: argparse.ArgumentParser) -> None:
    """`glm45 run RECIPE`: everything from raw text to an evaluated model; the same command goes on."""
    parser.add_argument("recipe", help="demo, nano_cpu or one_gpu")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="dotted overrides, such as seed=1")
    parser.add_argument("--run", dest="folder", metavar="DIR", help="run folder (default: runs/RECIPE)")
    parser.add_argument("--fast", action="store_true", help="a smoke test of minutes instead of the real thing")
    parser.add_argument("--only", nargs="+", default=[], metavar="STEP", help="run these steps only")
    parser.add_argument("--skip", nargs="+", default=[], metavar="STEP", help="leave steps, and what needs them, out")
    parser.add_argument("--again", nargs="+", default=[], metavar="STEP", help="run these again, and what needs them")
    parser.add_argument("--list", action="store_true", help="list the steps and whether they are up to date")
    parser.set_defaults(run=_run)


def _run(options: argparse.Namespace) -> int:
    from glm45.recipes.whole import run_whole

    return run_whole(
        f"{options.recipe}_fast" if options.fast else options.recipe,
        options.overrides,
        Path(options.folder) if options.folder else None,
        only=options.only,
        skip=options.skip,
        again=options.again,
        list_only=options.list,
    )


def define_rl(parser: argparse.ArgumentParser) -> None:
    """`glm45 rl pools|run`: how hard prompts are for a policy, and reinforcement learning on tasks."""
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    pools = actions.add_parser("pools", help="measure pass@k of every task and sort prompts into pools")
    pools.add_argument("policy", metavar="POLICY", help="checkpoint folder in the hub layout, with its tokenizer")
    pools.add_argument("tasks", metavar="TASKS", help="JSONL file of tasks")
    pools.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="such as thresholds.hard_k=128 max_tokens=64")
    pools.add_argument("--out", required=True, metavar="FILE", help="JSON file to write; an unfinished one goes on")
    pools.set_defaults(run=_rl_pools)
    run = actions.add_parser("run", help="train a policy; the same command goes on with a run")
    run.add_argument("config", metavar="CONFIG", help="JSON file: policy, tasks, held_out and what is not default")
    run.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="such as loss.lr=1e-4 steps=90")
    run.add_argument("--run", dest="folder", required=True, metavar="DIR", help="run folder")
    run.set_defaults(run=_rl_run)


def _rl_pools(options: argparse.Namespace) -> None:
    from glm45.config import override
    from glm45.rl.pools import PoolsConfig, measure_pools

    config = override(PoolsConfig(policy=options.policy, tasks=options.tasks), options.overrides)
    print(json.dumps(measure_pools(config, options.out)["counts"]))


def _rl_run(options: argparse.Namespace) -> None:
    from glm45.config import from_dict, override, read_json
    from glm45.rl.config import RLConfig
    from glm45.rl.driver import run_rl

    values = read_json(options.config)
    named = {"name": Path(options.config).stem, **values} if isinstance(values, dict) else values
    config = from_dict(RLConfig, named)
    print(run_rl(override(config, options.overrides), options.folder))


def define_posttrain(parser: argparse.ArgumentParser) -> None:
    """`glm45 posttrain RECIPE`: cold start, RL, rejection sampling and unification as one resumable run."""
    parser.add_argument("recipe", help="experts, arithmetic, curriculum, length, temperature or aggregation")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="such as seed=1 steps=30")
    parser.add_argument("--run", dest="folder", metavar="DIR", help="run folder (default: runs/RECIPE)")
    parser.add_argument("--only", action="append", default=[], metavar="STEP", help="run this step alone (repeatable)")
    parser.set_defaults(run=_posttrain)


def _posttrain(options: argparse.Namespace) -> None:
    from glm45.recipes.posttraining import run_posttraining

    folder = Path(options.folder or f"runs/{options.recipe}")
    print(run_posttraining(options.recipe, folder, options.overrides, options.only))


def define_eval(parser: argparse.ArgumentParser) -> None:
    """`glm45 eval MODEL_OR_URL --suite NAME`: scores with intervals; every answer is kept."""
    parser.add_argument("model", nargs="?", help="a checkpoint or run folder, or the URL of an OpenAI-style endpoint")
    parser.add_argument("overrides", nargs="*", metavar="NAME=VALUE", help="num_tasks=, seed=, max_tokens=, ...")
    parser.add_argument("--suite", nargs="+", default=[], metavar="NAME", help="suites; an unknown name lists them")
    parser.add_argument("--preset", metavar="NAME", help="the report's samples, temperature and judged characters")
    parser.add_argument("--data", metavar="DIR", help="data folder for held-out perplexity (default: a whole run's)")
    parser.add_argument(
        "--length", type=int, help="longest context, in tokens (default: a whole run's, or the model's)"
    )
    parser.add_argument("--contamination", metavar="DIR", help="look for the suites' prompts in these training data")
    parser.add_argument(
        "--judge", metavar="URL", help="an OpenAI-style endpoint that decides whether answers are right"
    )
    parser.add_argument("--judge-name", metavar="NAME", help="the judge's name at its endpoint")
    parser.add_argument("--out", metavar="DIR", help="folder of transcripts and results (default: evaluation/MODEL)")
    parser.add_argument("--served-name", metavar="NAME", help="the model's name at the endpoint")
    parser.add_argument("--no-extensions", action="store_true", help="send an endpoint only what OpenAI's API knows")
    parser.add_argument("--fetch", action="store_true", help="download the public benchmarks' packages (pinned hashes)")
    parser.set_defaults(run=_eval)


def _eval(options: argparse.Namespace) -> None:
    from glm45.evaluation import command
    from glm45.evaluation.packages import fetch

    if options.fetch:
        print("\n".join(str(path) for path in fetch()))
    if options.model is None and not options.fetch and not options.contamination:
        raise ValueError("name a checkpoint, a run or a URL to evaluate")
    if not options.suite and (options.contamination or (options.model and not options.data)):
        raise ValueError("name what to evaluate: --suite NAME ..., or --data DIR for held-out perplexity")
    names = [word for word in options.suite if "=" not in word] or [command.PERPLEXITY]
    overrides = [*options.overrides, *(word for word in options.suite if "=" in word)]  # written after --suite's names
    suites = command.read_options(overrides, options.preset)
    folder = Path(options.out) if options.out else command.default_folder(options.model)
    if options.contamination:
        command.check_contamination(names, Path(options.contamination), folder, suites)
    if options.model:
        judge = command.open_judge(options.judge, options.judge_name) if options.judge else None
        target = command.open_target(options.model, options.served_name, extensions=not options.no_extensions)
        try:
            held_out = command.HeldOut.of(options.model, options.data, options.length)
            command.evaluate(target, names, folder, suites, judge, held_out)
        finally:
            target.close()


VERBS: dict[str, tuple[Callable[[argparse.ArgumentParser], None], str]] = {
    "data": (define_data, "build a corpus and report on it"),
    "inspect": (define_inspect, "show a model's parameters, operations and cache size"),
    "run": (define_run, "run a whole recipe, from raw text to an evaluated model and its report"),
    "train": (define_train, "pre-train and mid-train a recipe; the same command goes on with a run"),
    "rl": (define_rl, "measure prompts and train a policy by reinforcement learning"),
    "posttrain": (define_posttrain, "expert iteration and the RL experiments, each as one resumable run"),
    "eval": (define_eval, "score a model or an endpoint on suites of tasks"),
    "export": (define_export, "write a run's weights in the hub layout"),
    "serve": (define_serve, "serve a model: OpenAI-compatible HTTP and a chat page"),
    "chat": (define_chat, "converse with a model in the terminal; or render and parse chats, to debug templates"),
}


if __name__ == "__main__":
    sys.exit(main())
