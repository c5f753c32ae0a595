"""Claims of the report's section 2.4, tried at laptop scale: Muon or AdamW, cosine or WSD, balance with or without.

Proofs: `pytest -m proof tests/training/test_studies.py -s`, half an hour of processor time. The demo corpus is taken
from GLM45_DATA or built first. Results go to docs/log.md and the plots to the folder that GLM45_FIGURES names.
"""

import dataclasses
import itertools
import os
import statistics
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from glm45.data.mixture import Mixture
from glm45.model.config import preset
from glm45.text.tokenizer import Tokenizer
from glm45.training.checkpoint import Retention
from glm45.training.evaluation import EvaluationConfig
from glm45.training.loop import train
from glm45.training.metrics import read_record
from glm45.training.optimizers import OptimizerConfig
from glm45.training.run import Run, TrainConfig
from glm45.training.schedule import LearningRate
from glm45.training.stages import Stage

SEEDS = (0, 1, 2)
STEPS, BATCH, LENGTH = 150, 1024, 128
SMALL = dataclasses.replace(
    preset("demo"), hidden_size=64, intermediate_size=192, moe_intermediate_size=48, num_hidden_layers=3,
    num_attention_heads=4, rope_theta=10_000.0,
)  # fmt: skip


def recipe(data, model=SMALL, peak=1e-2, shape="cosine", optimizer=None, seed=0, rate=0.01, steps=STEPS):
    stage = Stage(
        name="general", tokens=steps * BATCH, sequence_length=LENGTH, batch_tokens=BATCH, mixture=Mixture(),
        router_bias_rate=rate,
    )  # fmt: skip
    model = dataclasses.replace(model, vocab_size=Tokenizer.load(data / "tokenizer").padded_vocab_size)
    return TrainConfig(
        name="study", model=model, stages=(stage,), data=str(data), seed=seed,
        learning_rate=LearningRate(peak=peak, final=0.1 * peak, shape=shape, warmup_fraction=0.05),
        optimizer=optimizer or OptimizerConfig(adamw_ratio=0.5), micro_batch_tokens=BATCH,
        checkpoints=Retention(every=10_000), evaluation=EvaluationConfig(every=15, rows=6), log_every=200,
    )  # fmt: skip


def run_all(folder, configs):
    """Train every configuration, one a core; return each one's mean held-out losses by tokens, and its record."""
    runs = {name: Run.open(folder / str(number), config) for number, (name, config) in enumerate(configs.items())}
    with ProcessPoolExecutor(len(os.sched_getaffinity(0)), mp_context=get_context("spawn")) as pool:
        for future in [pool.submit(train, run) for run in runs.values()]:
            future.result()
    found = {}
    for name, run in runs.items():
        record = read_record(run.folder)
        found[name] = [(e["step"] * BATCH, e["mean"]) for e in record if e.get("event") == "evaluation"], record
    return found


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    if "GLM45_DATA" in os.environ:
        return Path(os.environ["GLM45_DATA"])
    folder = tmp_path_factory.mktemp("corpus")
    subprocess.run([sys.executable, "-m", "glm45", "data", "build", "demo", "--out", folder], check=True)
    return folder


def plot(name, curves):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    colours = {label: f"C{index}" for index, label in enumerate(dict.fromkeys(label for label, _ in curves))}
    for (label, seed), curve in curves.items():
        axes.plot(*zip(*curve, strict=True), color=colours[label], label=label if seed == 0 else None, alpha=0.7)
    second = max(curve[1][1] for curve in curves.values())  # the first evaluation would flatten the rest
    axes.set(xlabel="tokens", ylabel="held-out loss (nats)", ylim=(None, second))
    axes.legend()
    figure.savefig(Path(os.environ.get("GLM45_FIGURES", ".")) / f"{name}.png", dpi=120)


def tokens_to_reach(curve, loss):
    """Tokens at which a curve first is at or under a loss, between evaluations by interpolation."""
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (after - before) * min(max((high - loss) / (high - low), 0), 1)
    return float("inf")


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_muon_against_adamw(data, tmp_path):
    """Each at its best of three rates on seed 0, then three seeds; the report: Muon converges faster."""
    peaks = {"muon": (5e-3, 1e-2, 2e-2), "adamw": (2.5e-3, 5e-3, 1e-2)}

    def config(kind, peak, seed):
        if kind == "muon":
            return recipe(data, peak=peak, seed=seed)
        return recipe(data, peak=peak, seed=seed, optimizer=OptimizerConfig(matrices="adamw", head="adamw"))

    tuning = {(kind, peak): config(kind, peak, 0) for kind in peaks for peak in peaks[kind]}
    tuned = run_all(tmp_path / "tuning", tuning)
    finals = {key: curve[-1][1] for key, (curve, _) in tuned.items()}
    print("\nfinal held-out loss by peak rate, seed 0:", {key: round(loss, 4) for key, loss in finals.items()})
    best = {kind: min(peaks[kind], key=lambda peak, kind=kind: finals[kind, peak]) for kind in peaks}
    rest = {(kind, seed): config(kind, best[kind], seed) for kind in peaks for seed in SEEDS[1:]}
    runs = run_all(tmp_path / "seeds", rest) | {(kind, 0): tuned[kind, best[kind]] for kind in peaks}
    curves = {key: curve for key, (curve, _) in sorted(runs.items())}
    plot("muon_adamw", curves)
    for seed in SEEDS:
        muon, adamw = curves["muon", seed], curves["adamw", seed]
        share = tokens_to_reach(muon, adamw[-1][1]) / adamw[-1][0]
        print(f"seed {seed}: muon {muon[-1][1]:.4f}, adamw {adamw[-1][1]:.4f}; muon needs {share:.0%} of the tokens")


@pytest.mark.proof
@pytest.mark.timeout(7200)
def test_cosine_against_wsd(data, tmp_path):
    """Same peak, end and warm-up, three seeds; the report: WSD under-fits."""
    configs = {
        (shape, seed): recipe(data, shape=shape, seed=seed, steps=300) for shape in ("cosine", "wsd") for seed in SEEDS
    }
    curves = {key: curve for key, (curve, _) in run_all(tmp_path, configs).items()}
    plot("cosine_wsd", curves)
    for seed in SEEDS:
        print(
            f"\nseed {seed}: cosine {curves['cosine', seed][-1][1]:.4f}, wsd {curves['wsd', seed][-1][1]:.4f}", end=""
        )
    difference = [curves["wsd", seed][-1][1] - curves["cosine", seed][-1][1] for seed in SEEDS]
    print(f"\nwsd - cosine: {statistics.mean(difference):+.4f} +- {statistics.stdev(difference):.4f}")


@pytest.mark.proof
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("seed", SEEDS)
def test_balance_with_and_without_the_bias_update(data, tmp_path, seed):
    """The demo's model: with rate 0.01 MaxVio over 50 steps falls under 0.5 in every layer, with 0 it does not."""
    model = dataclasses.replace(preset("demo"), rope_theta=10_000.0)
    configs = {}
    for rate in (0.01, 0.0):
        config = recipe(data, model=model, rate=rate, steps=200, seed=seed)
        health = dataclasses.replace(config.health, max_violation=1.0)
        configs[rate] = dataclasses.replace(config, health=health, evaluation=EvaluationConfig(every=200, rows=6))
    worst, alarms = {}, {}
    for rate, (curve, record) in run_all(tmp_path, configs).items():
        worst[rate] = [max(line["max_violation"]) for line in record if line.get("event") == "health"]
        alarms[rate] = [line["step"] for line in record if line.get("event") == "alarm"]
        print(f"\nseed {seed}, rate {rate}: worst layer's MaxVio over 50 steps {[round(v, 2) for v in worst[rate]]}, "
              f"{len(alarms[rate])} alarms, held-out loss {curve[-1][1]:.3f}", end="")  # fmt: skip
    assert worst[0.01][-1] < 0.5
    assert worst[0.0][-1] > 0.5
    assert alarms[0.0]
