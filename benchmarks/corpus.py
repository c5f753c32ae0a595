"""Building a corpus: speed of each step on real text, and memory against the size of the corpus.

Speeds are megabytes of characters a second of CPU time on one core. Run with `make bench`, or

    python benchmarks/corpus.py [--rounds 3] [--memory 100,1000] [--build demo]

`--memory` builds corpora of so many megabytes, each in a process of its own, and prints their peak memory. `--build`
builds a named recipe from nothing, downloads included, and prints wall time and CPU time.
"""

import argparse
import dataclasses
import json
import keyword
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

MINHASH_TARGET = 2.0  # MB/s a core


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--memory", default="", help="megabytes, for example 100,1000")
    parser.add_argument("--build", default="", help="name of a recipe")
    parser.add_argument("--measure", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        measure_build(int(options.measure[0]), Path(options.measure[1]))
        return
    benchmark_steps(options.rounds)
    for size in filter(None, options.memory.split(",")):
        with tempfile.TemporaryDirectory() as folder:
            subprocess.run([sys.executable, __file__, "--measure", size, folder], check=True)
    if options.build:
        benchmark_build(options.build)


def real_texts(megabytes: float, suffix: str = ".py") -> Iterator[str]:
    """Yield files of the interpreter and its packages until there are enough, in a mixed-up order.

    Where they run out they come again with other words, so that no search for duplicates takes them for the same.
    """
    roots = [Path(os.__file__).parent, *(Path(path) for path in sys.path if path.endswith("site-packages"))]
    paths = sorted({path for root in roots for path in root.rglob(f"*{suffix}")}, key=lambda path: hash_of(str(path)))
    left, turn = megabytes * 1e6, 0
    while left > 0 and paths:
        for path in paths:
            text = path.read_text(encoding="utf-8", errors="ignore")
            if 200 < len(text) < 400_000 and left > 0:
                left -= len(text)
                yield reworded(text, turn) if turn else text
        turn += 1


def reworded(text: str, turn: int) -> str:
    """Return code with every word of five letters or more another one, keywords excepted."""
    return re.sub(r"\b[a-z]{5,}\b", lambda word: word[0] if keyword.iskeyword(word[0]) else f"{word[0]}q{turn}", text)


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def benchmark_steps(rounds: int) -> None:
    """Print the speed of what every document goes through; MinHash also against datatrove's own signature."""
    from datatrove.data import Document
    from datatrove.pipeline.dedup import MinhashDedupSignature
    from datatrove.utils.hashing import HashConfig

    from glm45.corpus.dedup import FastMinhashSignature, MinHash
    from glm45.corpus.document import WORDS, DropLog
    from glm45.corpus.extract import docstrings, html_text
    from glm45.corpus.quality import Quality, input_line, labelled_seeds, score, train
    from glm45.corpus.rules import RuleFilter, Rules
    from glm45.corpus.semantic import TfidfEmbedder

    code = list(real_texts(4))
    prose = [text for text in map(docstrings_or_nothing(docstrings), real_texts(12)) if len(text) > 2000]
    pages = [f"<html><body><article><p>{text}</p><pre>{text[:500]}</pre></article></body></html>" for text in prose]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        rules = RuleFilter(Rules(), DropLog(path))
        config = MinHash().to_datatrove()
        ours = FastMinhashSignature(folder, config, language=WORDS)
        theirs_config = dataclasses.replace(config, hash_config=HashConfig(hash_fc="sha1"))
        theirs = MinhashDedupSignature(folder, theirs_config, language=WORDS)
        model = train(list(labelled_seeds("prose", Quality())), path / "prose.bin", Quality(), seed=0)
        embedder = TfidfEmbedder.fit([text[:4000] for text in code], 128)

        def judge(texts: list[str], kind: str) -> None:
            for text in texts:
                rules.filter(Document(text, "x", metadata={"kind": kind, "language": "python"}))

        steps: dict[str, tuple[list[str], Callable[[list[str]], Any]]] = {
            "HTML extraction": (pages, lambda texts: [html_text(text) for text in texts]),
            "rules, prose": (prose, lambda texts: judge(texts, "prose")),
            "rules, code": (code, lambda texts: judge(texts, "code")),
            "MinHash signature": (code, lambda texts: [ours.get_signature(ours.get_shingles(t)) for t in texts]),
            "quality score": (prose, lambda texts: score(model, [input_line("prose", text) for text in texts])),
            "embedding": (code, lambda texts: embedder([text[:4000] for text in texts])),
        }
        speeds = {name: speed(texts, run, rounds) for name, (texts, run) in steps.items()}
        few = code[:60]
        peer = speed(few, lambda texts: [theirs.get_signature(theirs.get_shingles(text)) for text in texts], 1)
    for name, value in speeds.items():
        print(f"{name}: {value:.1f} MB/s a core")
    times = speeds["MinHash signature"] / peer
    print(f"MinHash signature is {times:.0f} times datatrove's (SHA-1 words); target {MINHASH_TARGET:.0f} MB/s")


def docstrings_or_nothing(docstrings: Callable[[str, str], str]) -> Callable[[str], str]:
    from glm45.corpus.extract import Skip

    def read(text: str) -> str:
        try:
            return docstrings(text, "module.py")
        except Skip:
            return ""

    return read


def speed(texts: list[str], run: Callable[[list[str]], Any], rounds: int) -> float:
    """Return the median megabytes a second of CPU time, after one round that does not count."""
    seconds = []
    for _ in range(rounds + 1):
        started = time.process_time()
        run(texts)
        seconds.append(time.process_time() - started)
    return sum(map(len, texts)) / 1e6 / statistics.median(seconds[1:])


def measure_build(megabytes: int, folder: Path) -> None:
    """Build a corpus of so many megabytes in this process and print its peak memory and CPU time."""
    from glm45.corpus.build import CorpusRecipe, build
    from glm45.corpus.sources import Source
    from glm45.corpus.steps import Executor

    with (folder / "texts.jsonl").open("w") as stream:
        for text in real_texts(megabytes):
            stream.write(json.dumps({"text": text, "kind": "code", "language": "python"}) + "\n")
    recipe = CorpusRecipe(
        sources=(Source(name="texts", reader="jsonl", path=str(folder / "texts.jsonl")),),
        executor=Executor(workers=1),
        num_tasks=8,
    )
    started = time.process_time()
    build(recipe, folder / "out", report=lambda line: None)
    seconds = time.process_time() - started
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) / 1024
    print(f"memory: {megabytes} MB of text, peak {peak:.0f} MB, {megabytes / seconds:.2f} MB/s from source to shards")


def benchmark_build(name: str) -> None:
    """Build a named recipe from nothing and print what its steps took."""
    with tempfile.TemporaryDirectory() as folder:
        started = time.monotonic()
        command = [sys.executable, "-m", "glm45", "data", "build", name, "--out", folder]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall = time.monotonic() - started
        cpu = sum(float(path.read_text()) for path in Path(folder).glob("work/*/logs/cpu/*"))
        characters = json.loads((Path(folder) / "manifest.json").read_text())["steps"][0]["out"]
        size = sum(row["characters"] for row in characters) / 1e6
        print(f"{name}: {size:.0f} MB read, {wall:.0f} s, of them {cpu:.0f} s of CPU in steps, {os.cpu_count()} cores")


if __name__ == "__main__":
    main()
