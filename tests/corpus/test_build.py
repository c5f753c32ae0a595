"""Whole builds of a small folder: what comes out, going on after a kill, bad input, the report page."""

import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import time
from functools import partial
from itertools import pairwise

import pytest

from glm45.config import override, to_dict
from glm45.corpus.build import CorpusRecipe, build, corpus_key, not_installed
from glm45.corpus.decontaminate import Decontamination
from glm45.corpus.document import DropLog, Tally, reader
from glm45.corpus.pipeline import corpus_chain
from glm45.corpus.quality import Quality
from glm45.corpus.read import RequireDocuments
from glm45.corpus.recipe import load
from glm45.corpus.report import write_report
from glm45.corpus.semantic import SemDedup
from glm45.corpus.sources import Source
from glm45.corpus.steps import Executor
from glm45.data.splits import is_held_out
from glm45.text.tokenizer import Tokenizer


def words(source):
    """Thirty made-up words: every document has its own subject, or SemDedup would rightly remove it."""
    return ["".join(source.choices("bdfgklmnprstaeiou", k=source.randint(4, 8))) for _ in range(30)]


FRAMES = (
    "The {} of a {} changes with time, as anybody who has kept one for long will tell you.",
    "If you have never seen a {}, think of a {} that somebody left out in the rain.",
    "Nobody knows why {} should be better than {}; most people simply prefer it.",
    "To make {} you need {}, some patience and a place where it can stay warm.",
    "Before the invention of {}, every village had its own {} and was proud of it.",
    "It is said that {} came from the south, while {} has always been known here.",
    "That does not mean {} can be had without {}: both belong together.",
    "When it gets cold, {} shrinks and the {} inside begins to show.",
    "Children learn about {} at school, but hardly ever do they touch {}.",
    "In the end, what remains of {} is very little, and {} soon covers it.",
)


def page(source):
    own = words(source)
    return "\n".join(frame.format(*source.choices(own, k=2)) for frame in source.sample(FRAMES, source.randint(5, 10)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two packages with prose, code, a page, an exact and a near duplicate, and files that cannot be read."""
    root = tmp_path_factory.mktemp("texts")
    for package in ("alpha", "beta"):
        (root / package).mkdir()
        for index in range(20):
            source = random.Random(f"{package}{index}")
            own = words(source)
            prose = page(source)
            (root / package / f"page{index}.md").write_text(prose)
            code = f'"""The {own[0]}."""\n' + "".join(
                f"\n\ndef {own[n]}({own[n + 5]}):\n    {own[n + 10]} = {own[n + 5]} * {n}\n    return {own[n + 10]}\n"
                for n in range(5)
            )
            (root / package / f"module{index}.py").write_text(code)
        for index in range(10):
            source = random.Random(f"web{package}{index}")
            paragraphs = "".join(f"<p>{line}</p>" for line in page(source).split("\n"))
            code = f"<pre>{' = '.join(words(source)[:5])}</pre>"
            (root / package / f"page{index}.html").write_text(
                f"<html><body><main>{paragraphs}{code}</main></body></html>"
            )
        for index in range(3):
            own = [word for seed in range(9) for word in words(random.Random(f"long{package}{index}{seed}"))]
            code = "".join(f"def {name}(x):\n    return x + {n}\n\n\n" for n, name in enumerate(own))
            (root / package / f"long{index}.py").write_text(code)
    first = (root / "alpha" / "page0.md").read_text()
    (root / "beta" / "copy.md").write_text(first)
    (root / "beta" / "nearly.md").write_text(first.replace("anybody", "everybody", 1))
    (root / "beta" / "data.bin").write_bytes(b"\0\1")
    (root / "beta" / "broken.txt").write_bytes(b"\xff\xff")
    return root


@pytest.fixture(scope="module")
def recipe(folder):
    return CorpusRecipe(
        sources=(
            Source(name="own", reader="folder", path=str(folder), license="CC0-1.0"),
            Source(name="sums", reader="generated", limit=200),
        ),
        num_tasks=2,
        vocab_size=400,
        semdedup=SemDedup(threshold=0.9999),  # pages from ten frames are what it is there to remove
        held_out_fraction=0.1,
        long_characters=4000,
        executor=Executor(workers=1),
    )


@pytest.fixture(scope="module")
def built(recipe, tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    manifest = json.loads(build(recipe, out, lambda line: None).read_text())
    return out, manifest


def documents(out, manifest):
    return list(reader(out / manifest["documents"]).run())


@pytest.mark.slow
def test_the_manifest_accounts_for_every_file_and_document(built, folder):
    _, manifest = built
    steps = {step["step"]: step for step in manifest["steps"]}
    count = {name: sum(row["documents"] for row in step["out"]) for name, step in steps.items()}
    dropped = {name: sum(entry["documents"] for entry in step["dropped"].values()) for name, step in steps.items()}
    files = sum(1 for path in folder.rglob("*") if path.is_file())
    assert count["read"] + dropped["read"] == files + sum(
        r["documents"] for r in steps["read"]["out"] if r["source"] == "sums"
    )
    names = list(steps)
    for before, after in pairwise(names[:-1]):
        assert count[before] == count[after] + dropped[after]
    made = sum(row["documents"] for row in steps[names[-1]]["out"] if row["kind"] == "repository")
    assert count[names[-2]] == count[names[-1]] - made + dropped[names[-1]]
    assert steps["exact duplicates"]["dropped"]["exact duplicate"]["documents"] == 1
    assert steps["MinHash"]["dropped"]["near duplicate (MinHash)"]["documents"] >= 1
    assert {unit["license"] for unit in manifest["units"]} >= {"CC0-1.0"}


@pytest.mark.slow
def test_datasets_hold_what_their_names_say(built):
    out, manifest = built
    names = set(manifest["datasets"])
    assert {
        "own-prose.high",
        "own-prose.medium",
        "own-code.high",
        "own-repository.medium",
        "sums-reasoning.medium",
    } <= names
    assert {"own-prose.heldout", "sums-reasoning.heldout"} & names
    for kind in ("code-long", "codeweb"):
        assert {f"own-{kind}.high", f"own-{kind}.medium"} & names
    assert not any(name.endswith(".low") for name in names)
    for document in documents(out, manifest):
        long = document.metadata["kind"] == "code" and len(document.text) > 5000  # some are cut for fill-in-the-middle
        assert not long or "-long." in document.metadata["dataset"] or document.metadata["bucket"] == "heldout"
    assert sum(entry["documents"] for entry in manifest["datasets"].values()) == len(documents(out, manifest))


@pytest.mark.slow
def test_a_held_out_prompt_is_in_no_trained_dataset(built):
    out, manifest = built
    for document in documents(out, manifest):
        if document.metadata["kind"] == "reasoning":
            assert is_held_out(document.metadata["question"]) == (document.metadata["bucket"] == "heldout")


@pytest.mark.slow
def test_the_report_shows_buckets_reasons_and_texts(built):
    out, manifest = built
    page = write_report(out).read_text()
    for word in ("own-prose.high", "exact duplicate", "undecodable bytes", "CC0-1.0", "AUC"):
        assert word in page
    assert page.count("<pre>") > len(manifest["datasets"])
    assert "{{" not in page


@pytest.mark.slow
def test_a_corpus_that_is_to_be_tokenized_later_has_a_report(built, tmp_path):
    out, manifest = built
    untokenized = {key: value for key, value in manifest.items() if key != "tokenizer"}
    place = {"datasets": {}, "documents": os.path.relpath(out / manifest["documents"], tmp_path)}
    (tmp_path / "manifest.json").write_text(json.dumps(untokenized | place))
    assert "own-prose.high" in write_report(tmp_path).read_text()


def first_changed_step(recipe, work, change):
    """The first step that runs again when an input changes while the recipe stays."""
    before = corpus_chain(recipe, work, work).chain.steps
    change()
    after = corpus_chain(recipe, work, work).chain.steps
    return next((step.name for (step, old), (_, new) in zip(before, after, strict=True) if old != new), None)


def test_a_changed_input_runs_what_depends_on_it_again(tmp_path, monkeypatch):
    texts, exam, seeds = tmp_path / "texts", tmp_path / "exam.jsonl", tmp_path / "seeds.jsonl"
    texts.mkdir()
    for path in (texts / "a.txt", exam, seeds):
        path.write_text("{}\n")
    recipe = CorpusRecipe(
        sources=(
            Source(name="own", reader="folder", path=str(texts)),
            Source(name="there", reader="installed", packages=("numpy", "no-such-package")),
        ),
        decontamination=Decontamination(files=(str(tmp_path / "*.jsonl"),)),
        quality=Quality(seeds=str(seeds)),
    )
    again = partial(first_changed_step, recipe, tmp_path)
    assert again(lambda: None) is None
    assert again(lambda: (texts / "b.txt").write_text("more")) == "plan"
    assert again(lambda: os.utime(texts / "a.txt", (1, 1))) == "plan"
    assert again(lambda: exam.write_text('{"question": "?"}\n')) == "unique"
    assert again(lambda: monkeypatch.setattr("importlib.metadata.version", lambda name: "9.9")) == "plan"
    recipe = dataclasses.replace(recipe, decontamination=Decontamination())
    assert first_changed_step(recipe, tmp_path, lambda: seeds.write_text("\n")) == "fit"
    assert not list(tmp_path.glob("*-plan-*"))


def test_another_tokenizer_in_the_same_folder_makes_another_corpus(tmp_path):
    recipe = CorpusRecipe(sources=(Source(name="s", reader="generated"),), tokenizer=str(tmp_path))
    keys = set()
    for text in ("one one one two", "three three three four"):
        Tokenizer.train([text * 50], 300).save(tmp_path)
        keys.add(corpus_key(recipe, corpus_chain(recipe, tmp_path, tmp_path)))
    assert len(keys) == 2


def test_each_number_of_tasks_has_a_plan_of_its_own(recipe, tmp_path):
    plans = {corpus_chain(override(recipe, [f"num_tasks={n}"]), tmp_path, tmp_path).plan for n in (2, 3)}
    assert len(plans) == 2


def test_a_source_without_a_document_is_named_with_the_reasons(tmp_path, make_document):
    list(Tally(tmp_path / "in").run([make_document("x", source="good")]))
    with DropLog(tmp_path / "skipped") as log:
        log.add("bad", "undecodable bytes", "bad/1", "")
        log.add("bad", "undecodable bytes", "bad/2", "")
    sources = [Source(name=name, reader="stdlib") for name in ("good", "bad", "empty")]
    with pytest.raises(ValueError, match=r"source bad gave no document \(2 x undecodable bytes\)"):
        RequireDocuments(tuple(sources), tmp_path / "in", tmp_path / "skipped").run()
    with pytest.raises(ValueError, match=r"source empty gave no document \(no file is included\)"):
        RequireDocuments((sources[0], sources[2]), tmp_path / "in", tmp_path / "skipped").run()
    RequireDocuments(tuple(sources[:1]), tmp_path / "in", tmp_path / "skipped").run()


def test_packages_that_are_not_installed_are_listed():
    source = Source(name="there", reader="installed", packages=("numpy", "no-such-package"))
    assert not_installed(CorpusRecipe(sources=(source,))) == {"there": ["no-such-package"]}


def test_a_report_needs_a_built_corpus(tmp_path):
    with pytest.raises(FileNotFoundError, match="data build"):
        write_report(tmp_path)


def without_times(manifest):
    """Everything but how long it took, how many workers there were, what it was compared with and so its folders."""
    left_out = ("seconds", "recipe", "key", "documents", "decontamination")
    return {key: value for key, value in manifest.items() if key not in left_out}


@pytest.mark.slow
def test_a_killed_build_goes_on_and_ends_as_if_it_had_not_been(built, recipe, tmp_path):
    """SIGKILL in the middle; finished steps are not run again and the result is the same to the byte."""
    _, expected = built
    path = tmp_path / "recipe.json"
    path.write_text(json.dumps(to_dict(recipe)))
    out = tmp_path / "out"
    command = [sys.executable, "-m", "glm45", "data", "build", str(path), "--out", str(out), "--workers", "2"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    while not list((out / "work").glob("*-fit-*/logs/executor.json")) and process.poll() is None:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (out / "manifest.json").exists()
    [marker] = (out / "work").glob("*-read-*/logs/completions/00000")
    finished = marker.stat().st_mtime_ns
    subprocess.run(command, check=True, capture_output=True)
    assert marker.stat().st_mtime_ns == finished
    manifest = json.loads((out / "manifest.json").read_text())
    assert without_times(manifest) == without_times(expected)
    compared = manifest["decontamination"]  # by the command; nothing in these made-up texts is contaminated
    assert compared["compared"]["long.jsonl"] > 100
    assert "ifeval" in compared["not_compared"] or compared["compared"]["ifeval.jsonl"] == 541


@pytest.mark.slow
def test_a_changed_threshold_runs_only_what_comes_after_it(recipe, tmp_path):
    build(recipe, tmp_path, lambda line: None)
    said = []
    build(override(recipe, ["semdedup.threshold=0.9"]), tmp_path, said.append)
    again = {line.split(":")[0] for line in said if " tasks in " in line}
    assert again == {"semdedup", "finish"}
    said.clear()
    build(override(recipe, ["semdedup.threshold=0.9"]), tmp_path, said.append)
    assert said == [f"{tmp_path} is built already"]


def shards_of(out):
    return {path.name: path.stat().st_mtime_ns for path in (out / "shards").glob("*.*") if path.suffix != ".json"}


@pytest.mark.slow
def test_tokens_are_kept_when_a_build_is_stopped_after_them(recipe, tmp_path):
    """Killed before the manifest is there, or rebuilt with another dataset fewer: what is finished is not redone."""
    before = json.loads(build(recipe, tmp_path, lambda line: None).read_text())
    written = shards_of(tmp_path)
    (tmp_path / "manifest.json").unlink()
    after = json.loads(build(recipe, tmp_path, lambda line: None).read_text())
    assert shards_of(tmp_path) == written
    assert without_times(after) == without_times(before)
    fewer = json.loads(build(override(recipe, ["held_out_fraction=0"]), tmp_path, lambda line: None).read_text())
    assert "own-prose.heldout" not in fewer["datasets"]
    assert set(shards_of(tmp_path)) == {file for entry in fewer["datasets"].values() for file in entry["files"]}


def test_two_builds_at_once_are_refused(recipe, tmp_path):
    import fcntl

    (tmp_path / "work").mkdir()
    with (tmp_path / "work" / "lock").open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        with pytest.raises(ValueError, match="another process"):
            build(recipe, tmp_path)


def test_a_full_disk_is_told_before_anything_is_done(recipe, tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    with pytest.raises(OSError, match="MB free"):
        build(recipe, tmp_path)


def test_an_unknown_recipe_and_doubled_sources_are_refused():
    with pytest.raises(ValueError, match="no corpus recipe 'dmeo'"):
        load("dmeo")
    with pytest.raises(ValueError, match="must differ"):
        CorpusRecipe(sources=(Source(name="a", reader="stdlib"), Source(name="a", reader="stdlib")))


def test_every_named_recipe_can_be_read_back_from_json():
    from glm45.config import from_dict
    from glm45.corpus.recipe import RECIPES

    for name in RECIPES:
        assert from_dict(CorpusRecipe, json.loads(json.dumps(to_dict(load(name))))) == load(name)
