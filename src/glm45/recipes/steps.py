"""The steps of a whole run, as functions that a pipeline calls (see `glm45.pipeline`)."""

import json

from glm45.config import from_dict, override, to_dict
from glm45.data.folder import update_manifest
from glm45.pipeline import Context

CHECKPOINT = "model"
"""Folder of the hub checkpoint inside the folder of every step that makes one."""
DRAFTED_TASKS = 20
"""Tasks of each suite on which the acceptance of drafts is measured."""


def build_corpus(context: Context) -> None:
    """Build a corpus, `config["recipe"]` with `config["overrides"]`, without what our suites ask."""
    from glm45.corpus import recipe
    from glm45.corpus.build import build
    from glm45.recipes.decontamination import against_evaluations

    chosen = override(recipe.load(context.config["recipe"]), context.config.get("overrides", []))
    seen: list[str] = []

    def report(line: str) -> None:
        print(line, flush=True)
        seen.append(line.split(":")[0])
        # A corpus has about a dozen steps; how far along is told by how many have spoken.
        context.progress(min(0.95, len(set(seen)) / 14), line)

    evaluations = context.folder / "work" / "evaluations"
    build(against_evaluations(chosen, evaluations), context.folder, report)


def tokenize_data(context: Context) -> None:
    """Train the tokenizer and tokenize the data: the corpus, and worked conversations of every domain beside it.

    Mid-training includes instruction data (report section 2.3). The conversations are sound ones, of training prompts.
    """
    from glm45.corpus.tokenize import tokenize_folder
    from glm45.data.folder import MANIFEST
    from glm45.posttraining.coldstart import ColdStartConfig, cold_start
    from glm45.posttraining.conversations import write_conversations

    corpus = context.inputs["corpus"].resolve()
    described = json.loads((corpus / MANIFEST).read_text())
    documents = context.folder / "documents"
    documents.mkdir(exist_ok=True)
    for dataset in (corpus / described["documents"]).iterdir():
        link = documents / dataset.name
        link.unlink(missing_ok=True)
        link.symlink_to(dataset)
    sound = from_dict(ColdStartConfig, context.config["cold_start"])
    for domain, count in context.config["conversations"].items():
        context.progress(0.1, f"{count:,} conversations of {domain}")
        made = cold_start(domain, context.config["seed"], count, sound)
        write_conversations(documents / f"chat-{domain}.sound.jsonl", made)
    context.progress(0.3, "tokenizer and tokens")
    entries = tokenize_folder(documents, context.folder, vocab_size=context.config["vocab_size"], workers=2)
    update_manifest(context.folder, {**described, **entries})


def pretrain(context: Context) -> None:
    """Pre-train and mid-train the recipe `config["training"]` on the data, then export the last checkpoint."""
    from glm45.training.command import export, run_training
    from glm45.training.run import Run, TrainConfig

    config = from_dict(TrainConfig, {**context.config["training"], "data": str(context.inputs["data"])})
    recipe = context.folder / "recipe.json"
    recipe.write_text(json.dumps(to_dict(config), indent=1))
    run = Run.open(context.folder, config)
    with context.watching(run.fraction):
        status = run_training(run, ["train", str(recipe), "--run", str(context.folder)], context.config["processes"])
    if status:
        raise KeyboardInterrupt if status in (130, 143) else ValueError(f"training ended with status {status}")
    export(context.folder, context.folder / CHECKPOINT, "float32", None)


def evaluate(context: Context) -> None:
    """Evaluate every input on `config["suites"]`; results go to `MODEL/SUITE/` and `acceptance.json`."""
    from glm45.evaluation.command import run_any
    from glm45.evaluation.drafts import draft_acceptance
    from glm45.evaluation.runner import ACCEPTANCE, Suite
    from glm45.evaluation.suites import SuiteOptions, build_suite, expand, fitted
    from glm45.evaluation.targets import LocalTarget

    options = from_dict(SuiteOptions, context.config.get("options", {}))
    names = expand(context.config["suites"])
    total = len(context.inputs) * len(names)
    acceptance: dict[str, float | None] = {}
    built: dict[SuiteOptions, list[Suite]] = {}  # models of one context and tokenizer are asked the same
    for number, (name, folder) in enumerate(context.inputs.items()):
        target = LocalTarget.load(folder / CHECKPOINT)
        fitting = fitted(options, target, context.config["length"])
        if fitting not in built:
            built[fitting] = [build_suite(suite, fitting) for suite in names]
        suites = built[fitting]
        try:
            for index, suite in enumerate(suites):
                done = number * len(suites) + index
                context.progress(done / total, f"{name} on {suite.name}")
                result = run_any(target, suite, context.folder / name / suite.name)
                score = result.metrics.get("score")
                print(f"{name} {suite.name}: {score.mean:.3f}" if score else f"{name} {suite.name}: not judged")
        finally:
            target.close()
        asked = [task for suite in suites for task in suite.tasks[:DRAFTED_TASKS]]
        acceptance[name] = draft_acceptance(folder / CHECKPOINT, asked)
    (context.folder / ACCEPTANCE).write_text(json.dumps(acceptance, indent=1) + "\n")


def publish(context: Context) -> None:
    """Copy the final checkpoint to `RUN/model`, in the hub layout with its tokenizer."""
    from glm45.model import hub

    (source,) = context.inputs.values()
    names = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    files = [source / CHECKPOINT / name for name in names if (source / CHECKPOINT / name).exists()]
    hub.save(hub.load(source / CHECKPOINT), context.run / CHECKPOINT, companions=files)
