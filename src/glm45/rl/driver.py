"""The RL driver: generate, judge, learn, hand over the weights, again.

A run is a folder: `config.json`, `metrics.jsonl` (the log of record: nothing in it depends on the clock),
`timings.jsonl`, `tensorboard/`, `samples/` (held-out answers to read), `checkpoints/`, `policy/` (the trained one, hub
layout).
Killed at any moment, the same command goes on from the newest checkpoint and writes the same metrics.
"""

import asyncio
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from glm45.engine.clients import EngineClient, InProcessClient
from glm45.engine.engine import Engine, EngineConfig
from glm45.environments.verify import RewardWorkers
from glm45.model import hub
from glm45.rl.config import RLConfig
from glm45.rl.evaluation import HeldOut
from glm45.rl.health import alarms
from glm45.rl.metrics import require_judgement, rollout_metrics
from glm45.rl.rollout import Rollout, Sampling
from glm45.rl.state import RLState, open_run
from glm45.seeds import derive_seed
from glm45.training.checkpoint import Checkpoints, Retention
from glm45.training.metrics import Metrics, read_record
from glm45.training.run import exclusive

Say = Callable[[str], None]


def run_rl(config: RLConfig, folder: str | Path, say: Say = print) -> Path:
    """Train a policy from where the run stands to its end; return the folder of the trained policy.

    Raises ValueError or OSError for what a user can mend; another process at work in the folder is an OSError.
    """
    folder = Path(folder)
    with exclusive(folder):
        open_run(folder, config)
        state = RLState(config)
        checkpoints = Checkpoints(folder / "checkpoints", Retention(every=config.checkpoint_every, keep_best=False))
        for problem in state.load(checkpoints):
            say(f"passed over: {problem}")
        metrics = Metrics(folder, state.metrics_length, state.step, config=config, log_every=1, tracker=config.tracker)
        state.rows = read_record(folder)
        engine_config = EngineConfig(seed=derive_seed(config.seed, "engine"))
        try:
            with (
                RewardWorkers(config.rewards) as rewards,
                Engine(state.trainer.model, state.tokenizer, engine_config) as engine,
            ):
                rewards.prove(task.verifier for task in [*state.train_tasks, *state.held_out_tasks])
                client = InProcessClient(engine)
                rollout = Rollout(client, state.tokenizer, rewards, config.rollout, config.loss)
                asyncio.run(_run(state, client, rollout, checkpoints, metrics, folder, say))
            checkpoints.wait()
            hub.save(state.trainer.model, folder / "policy")
            state.tokenizer.save(folder / "policy")
        finally:
            metrics.close()
            checkpoints.close()
        return folder / "policy"


async def _run(
    state: RLState,
    client: EngineClient,
    rollout: Rollout,
    checkpoints: Checkpoints,
    metrics: Metrics,
    folder: Path,
    say: Say,
) -> None:
    config = state.config
    held_out = HeldOut(rollout, state.held_out_tasks, config.evaluation, config.seed)
    await client.update_weights(None, version=state.step)
    if not state.rows:
        state.rows.append({"step": 0, **await held_out.evaluate(config.lengths.full, config.lengths.cap(0))})
        metrics.step(state.rows[0], {})
        _write_examples(folder, 0, held_out)
    while state.step < config.steps:
        stage, cap = state.curriculum.stage, config.lengths.cap(state.step)
        started = time.perf_counter()
        sampling = Sampling(stage.samples_per_prompt, cap, state.temperature.value, derive_seed(config.seed, "rollout"))
        state.pool.expire(state.step)  # or groups too many of the last step would count as there
        made = await rollout.fill(state.pool, stage.prompts_per_step, sampling)
        require_judgement(made)
        groups = state.pool.take(stage.prompts_per_step, weight_version=state.step)
        record: dict[str, Any] = {"step": state.step + 1, "stage": state.curriculum.index, "cap": cap}
        record |= {"temperature": sampling.temperature, "groups": len(groups)}
        record |= rollout_metrics(made, weight_version=state.step)
        record |= {f"pool/{fate}": count for fate, count in sorted(state.pool.counts.items())}
        generated = time.perf_counter()

        record |= state.trainer.update(groups, max_tokens=cap)
        trained = time.perf_counter()
        await client.update_weights(None, version=state.step + 1)

        if (state.step + 1) % config.evaluation.every == 0 or state.step + 1 == config.steps:
            record |= await held_out.evaluate(config.lengths.full, cap)
            _write_examples(folder, state.step + 1, held_out)
        state.advance(record)
        await _choose_temperature(state, held_out, record)
        record["alarms"] = alarms(state.rows, config.health)
        metrics.step(record, _timing(record, started, generated, trained))
        say(_line(record, time.perf_counter() - started))
        if state.step % config.checkpoint_every == 0 or state.step == config.steps:
            state.save(checkpoints, metrics.length)


async def _choose_temperature(state: RLState, held_out: HeldOut, record: dict[str, Any]) -> None:
    """On a plateau of the reward, take the highest temperature that costs at most a share of the best accuracy.

    Accuracy is under the full cap, as in every evaluation.
    """
    if state.temperature.due(record.get("reward")):
        full = state.config.lengths.full
        tried = {value: await held_out.at_temperature(value, full) for value in state.temperature.candidates}
        state.temperature.choose({value: accuracy for value, (accuracy, _) in tried.items()})
        record["temperature_choice"] = {str(value): accuracy for value, (accuracy, _) in tried.items()}
        record["temperature_choice_tokens"] = sum(tokens for _, tokens in tried.values())


def _write_examples(folder: Path, step: int, held_out: HeldOut) -> None:
    (folder / "samples").mkdir(exist_ok=True)
    lines = [json.dumps(example, ensure_ascii=False) + "\n" for example in held_out.examples]
    (folder / "samples" / f"step-{step:08d}.jsonl").write_text("".join(lines))


def _timing(record: dict[str, Any], started: float, generated: float, trained: float) -> dict[str, float]:
    return {
        "generation_seconds": generated - started,
        "training_seconds": trained - generated,
        "generated_tokens_per_second": record.get("generated_tokens", 0.0) / (generated - started),
        "learnt_tokens_per_second": record["learnt_tokens"] / max(trained - generated, 1e-9),
    }


def _line(record: dict[str, Any], seconds: float) -> str:
    reward = f"{record['reward']:.3f}" if "reward" in record else "not measured"
    shown = f"step {record['step']}: reward {reward}, {record['groups']} groups, "
    shown += (
        f"length {record.get('response_length', 0.0):.1f}, entropy {record.get('entropy', 0.0):.3f}, {seconds:.1f} s"
    )
    if "held_out_greedy" in record:
        shown += f"; held out: greedy {record['held_out_greedy']:.3f}, sampled {record['held_out_full_cap']:.3f}"
    return "; ".join([shown, *record["alarms"]])
