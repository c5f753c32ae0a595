"""Tokenizing, packing and loading: speed against named peers, fill, and memory against the size of the corpus.

Speeds and ratios are of CPU time, measured alternately in one process. Run with `make bench`, or

    python benchmarks/data.py [--rounds 5] [--memory 100,1000] [--folder DATA] [--json FILE]

`--folder` prints how full best-fit packing makes the rows of an epoch of a data folder, for several mixtures.
`--memory` tokenizes and loads so many megabytes of text in a process of its own and prints its peak memory. With
Megatron-LM importable (`megatron.core`), its GPTDataset reads the same shard as ours.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # figures are for one core

import numpy as np

TARGETS = {"tokenize": 5.0, "loader": 3.0}  # MB/s a core; million tokens/s a process
ROWS, LENGTH = 32, 2048


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory", default="", help="megabytes of text, for example 100,1000")
    parser.add_argument("--folder", type=Path, help="a data folder")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure-memory", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure_memory:
        step, megabytes, folder = options.measure_memory
        print(json.dumps(MEMORY_STEPS[step](int(megabytes), Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        results = {
            "tokenize": benchmark_tokenize(Path(folder), options.rounds),
            "packing": benchmark_packing(options.rounds),
            "loader": benchmark_loader(Path(folder), options.rounds),
        }
        sizes = [int(size) for size in options.memory.split(",") if size]
        results["memory"] = [memory_of(size, Path(folder)) for size in sizes]
    if options.folder:
        results["fill"] = fill_of(options.folder)
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))


def alternate(contenders: dict[str, Callable[[int], Any]], rounds: int) -> dict[str, list[float]]:
    """Return the CPU seconds of every contender in every round, after one round that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(rounds + 1):
        for name, run in contenders.items():
            started = time.process_time()
            run(number)
            seconds[name].append(time.process_time() - started)
    return {name: values[1:] for name, values in seconds.items()}


def ratio(seconds: dict[str, list[float]], ours: str, peer: str) -> float:
    """Return how many times faster we are: the median over rounds."""
    return statistics.median(theirs / mine for theirs, mine in zip(seconds[peer], seconds[ours], strict=True))


def real_texts(megabytes: float) -> Iterator[str]:
    """Yield Python source files of the interpreter and its packages until there are enough, in a mixed-up order."""
    roots = [Path(os.__file__).parent, *(Path(path) for path in sys.path if path.endswith("site-packages"))]
    paths = sorted({path for root in roots for path in root.rglob("*.py")}, key=lambda path: hash_of(str(path)))
    left, turn = megabytes * 1e6, 0
    while left > 0:
        for path in paths:
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                continue
            if text and left > 0:
                left -= len(text)
                yield text if not turn else f"# {turn}\n{text}"
        turn += 1


def hash_of(text: str) -> str:
    import hashlib

    return hashlib.sha256(text.encode()).hexdigest()


def benchmark_tokenize(folder: Path, rounds: int) -> dict[str, float]:
    from glm45.corpus.words import WordEncoder
    from glm45.text.tokenizer import Tokenizer

    texts = list(real_texts(4 * (rounds + 3)))
    Tokenizer.train(texts[: len(texts) // 4], 8192).save(folder / "tokenizer")
    size = sum(len(text.encode()) for text in texts)
    parts = np.array_split(np.arange(len(texts)), rounds + 1)  # every round reads text that it has not seen
    part = {number: [texts[index] for index in indices] for number, indices in enumerate(parts)}
    encoder = WordEncoder(folder / "tokenizer", np.dtype(np.uint16))
    peer = Tokenizer.load(folder / "tokenizer")
    seconds = alternate(
        {"ours": lambda n: encoder.encode(part[n]), "tokenizers": lambda n: peer.encode_batch(part[n])}, rounds
    )
    speed = (size - sum(len(text.encode()) for text in part[0])) / sum(seconds["ours"]) / 1e6
    result = {"MB/s a core": speed, "times tokenizers": ratio(seconds, "ours", "tokenizers")}
    print(
        f"tokenize: {speed:.1f} MB/s a core of Python source, {result['times tokenizers']:.1f} times tokenizers' "
        f"encode_batch (target {TARGETS['tokenize']:.0f} MB/s)"
    )
    return result


def fill_of(folder: Path) -> dict[str, dict[int, float]]:
    """Print and return the share of an epoch's row places that hold tokens, by mixture and length of rows."""
    from glm45.data.loader import Loader
    from glm45.data.mixture import Mixture

    mixtures = {
        "natural rate": Mixture(),
        "top buckets 3.2 times": Mixture(repeats={"*.high": 3.2}),
        "70 % repository contexts": Mixture(weights={"*-repository.*": 0.7, "*": 0.3}),
    }
    results: dict[str, dict[int, float]] = {name: {} for name in mixtures}
    for name, mixture in mixtures.items():
        for length in (512, 2048, 4096, 32_768, 131_072):
            loader = Loader(folder, mixture, length, "best_fit")
            rows = max(1, sum(loader.folder.tokens[each] for each in loader.shares) // length)
            full = [(loader.rows(row, 1).document_ids_BT >= 0).float().mean().item() for row in range(rows)]
            results[name][length] = statistics.mean(full)
        print(f"fill, {name}: " + ", ".join(f"{length}: {fill:.2%}" for length, fill in results[name].items()))
    return results


def benchmark_packing(rounds: int) -> list[dict[str, float]]:
    from glm45.data.packing import assign_bins

    results = []
    for mean, capacity in ((100, 2048), (600, 4096), (2000, 32_768), (2000, 131_072)):
        rng = np.random.default_rng(0)
        lengths_N = np.clip(np.exp(rng.normal(np.log(mean), 1.2, 16_384)).astype(np.int64), 1, capacity)
        contenders: dict[str, Callable[[int], Any]] = {"ours": lambda _, n=lengths_N, c=capacity: assign_bins(n, c)}
        if importlib.util.find_spec("trl"):
            contenders["trl"] = trl_packer(lengths_N, capacity)
        seconds = alternate(contenders, rounds)
        _, num_bins = assign_bins(lengths_N, capacity)
        fill = float(lengths_N.sum() / (num_bins * capacity))
        micros = statistics.median(seconds["ours"]) / len(lengths_N) * 1e6
        result = {"capacity": capacity, "mean": float(lengths_N.mean()), "fill": fill, "us a document": micros}
        line = f"packing into {capacity}: {micros:.2f} us a document, {fill:.2%} full"
        if "trl" in seconds:
            result["times trl"] = ratio(seconds, "ours", "trl")
            line += f", {result['times trl']:.1f} times TRL's pack_dataset"
        print(line)
        results.append(result)
    return results


def trl_packer(lengths_N: np.ndarray, capacity: int) -> Callable[[int], Any]:
    """Return TRL's best-fit packing of the same lengths."""
    import datasets
    from trl.data_utils import pack_dataset

    datasets.disable_progress_bars()
    rows = datasets.Dataset.from_dict({"input_ids": [[1] * length for length in lengths_N.tolist()]})
    return lambda _: pack_dataset(rows.with_format("arrow"), capacity, "bfd", {"keep_in_memory": True})


def benchmark_loader(folder: Path, rounds: int) -> list[dict[str, Any]]:
    from glm45.data.loader import Loader
    from glm45.data.shards import Shard, ShardWriter

    rng = np.random.default_rng(0)
    lengths_N = np.exp(rng.normal(np.log(600), 1.2, 40_000)).astype(np.int64) + 1
    prefix = folder / "web.high"
    with ShardWriter(prefix, np.dtype(np.uint16)) as writer:
        writer.add_many(rng.integers(0, 60_000, lengths_N.sum()), lengths_N)
    results = []
    for packing in ("concatenate", "best_fit"):
        loader = Loader({"web.high": Shard(prefix)}, {"*": 1}, LENGTH, packing)
        contenders: dict[str, Callable[[int], Any]] = {
            "ours": lambda n, loader=loader: [loader.batch(10 * n + k, ROWS) for k in range(10)]
        }
        if packing == "concatenate" and importlib.util.find_spec("megatron"):
            contenders["megatron"] = megatron_reader(prefix, folder)
        seconds = alternate(contenders, rounds)
        batches = [loader.batch(index, ROWS) for index in range(20)]
        fill = float(np.mean([(batch.document_ids_BT >= 0).numpy().mean() for batch in batches]))
        speed = 10 * ROWS * LENGTH / statistics.median(seconds["ours"]) / 1e6
        result = {"packing": packing, "million tokens/s": speed, "fill": fill}
        line = f"loader, {packing}: {speed:.0f} million tokens/s, {fill:.2%} full (target {TARGETS['loader']:.0f})"
        if "megatron" in seconds:
            result["times megatron"] = ratio(seconds, "ours", "megatron")
            line += f", {result['times megatron']:.1f} times Megatron's GPTDataset"
        print(line)
        results.append(result)
    return results


def megatron_reader(prefix: Path, folder: Path) -> Callable[[int], Any]:
    """Return a reader of the same shard, rows and batch by Megatron-LM."""
    import torch
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
    from megatron.core.datasets.indexed_dataset import IndexedDataset
    from megatron.core.datasets.utils import Split

    class Ids:
        eod = pad = 0
        vocab_size = 60_000
        unique_identifiers: dict[str, str] = {}  # noqa: RUF012

    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=LENGTH,
        blend=([str(prefix)], None),
        split="1,0,0",
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        create_attention_mask=False,
        tokenizer=Ids(),
        mid_level_dataset_surplus=0.005,
        path_to_cache=str(folder / "megatron"),
    )
    shard = IndexedDataset(str(prefix))
    rows = GPTDataset(shard, str(prefix), np.arange(len(shard), dtype=np.int32), 20_000, Split.train, config)

    def read(number: int) -> None:
        for batch in range(10 * number, 10 * number + 10):
            torch.utils.data.default_collate([rows[row] for row in range(batch * ROWS, (batch + 1) * ROWS)])

    return read


def memory_of(megabytes: int, folder: Path) -> dict[str, float]:
    """Measure each step in a fresh process, and print."""
    result = {"MB": float(megabytes)}
    for step in MEMORY_STEPS:
        command = [sys.executable, __file__, "--measure-memory", step, str(megabytes), str(folder / str(megabytes))]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        result |= json.loads(done.stdout.splitlines()[-1])
    print(
        f"memory at {megabytes} MB of text: tokenizing {result['tokenize MB']:.0f} MB at {result['MB/s']:.1f} MB/s, "
        f"loading {result['load MB']:.0f} MB (with imports {result['import MB']:.0f} MB)"
    )
    return result


def measure_tokenizing(megabytes: int, folder: Path) -> dict[str, float]:
    """Tokenize so much text; the peak is this process's own memory, imports and all."""
    from glm45.corpus.tokenize import tokenize_folder
    from glm45.text.tokenizer import Tokenizer

    documents = folder / "documents"
    documents.mkdir(parents=True)
    with (documents / "code.high.jsonl").open("w") as file:
        for text in real_texts(megabytes):
            file.write(json.dumps({"text": text}) + "\n")
    Tokenizer.train(real_texts(2), 8192).save(folder / "tokenizer")
    with Peak() as peak:
        started = time.process_time()
        tokenize_folder(documents, folder / "data", vocab_size=8192, workers=1, tokenizer=folder / "tokenizer")
        seconds = time.process_time() - started
    return {"tokenize MB": peak.highest, "MB/s": megabytes / seconds}


def measure_loading(megabytes: int, folder: Path) -> dict[str, float]:
    """Read a fifth of the batches of an epoch, from one end to the other, both ways of packing."""
    from glm45.data.loader import Loader

    imported = own_memory()
    with Peak() as peak:
        for packing in ("concatenate", "best_fit"):
            loader = Loader(folder / "data", {"*": 1}, LENGTH, packing)
            rows = int(loader.folder.tokens["code.high"] / LENGTH)
            for index in range(0, rows // ROWS, 5):
                loader.batch(index, ROWS)
    return {"import MB": imported, "load MB": peak.highest}


MEMORY_STEPS = {"tokenize": measure_tokenizing, "load": measure_loading}


class Peak:
    """Samples this process's own memory (pages of mapped files do not count) while its block runs."""

    def __enter__(self) -> "Peak":
        self.highest, self._done = own_memory(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.02):
            self.highest = max(self.highest, own_memory())


def own_memory() -> float:
    status = Path("/proc/self/status").read_text()
    return int(status.split("RssAnon:")[1].split()[0]) / 1e3


if __name__ == "__main__":
    main()
