"""The training loop, the same for pre-training, mid-training and SFT.

`train` reads top to bottom as what happens. A run is a folder; where there are checkpoints it goes on from the newest
intact one, and what it then computes and writes to `metrics.jsonl` is bit for bit what it would have without the stop.
"""

import signal
import threading
from contextlib import closing, nullcontext
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch

from glm45.data.folder import DataFolder, tokenizer_fingerprint
from glm45.data.loader import Batch
from glm45.model.census import training_flops_per_token
from glm45.model.transformer import Glm45
from glm45.text.tokenizer import Tokenizer
from glm45.training.batches import Batches, Rows, open_data
from glm45.training.checkpoint import Checkpoints
from glm45.training.estimate import measure_peak_flops
from glm45.training.gradients import BatchLoss, clip_gradients, forward_backward, gradient_squares
from glm45.training.health import UpdateNorms, norms_by_group
from glm45.training.launch import orphaned
from glm45.training.losses import MicroBatch
from glm45.training.metrics import Metrics
from glm45.training.observers import Observers
from glm45.training.optimizers import set_learning_rate
from glm45.training.parallel import World
from glm45.training.progress import Display, StepClock
from glm45.training.run import Run, TrainConfig
from glm45.training.schedule import Step
from glm45.training.stages import Stage
from glm45.training.state import TrainingState, settle_facts


class RunStoppedError(Exception):
    """The run was asked to stop, and has saved everything; `signal` says by what."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.signal = number


def train(run: Run, data: DataFolder | None = None, tokenizer: Tokenizer | None = None) -> Glm45:
    """Train a run from where it stands to its end, and return the model.

    `data` and `tokenizer` stand in for the recipe's data folder. Raises ValueError or OSError for what a user can
    mend, a loss that stays bad after every rollback among it, and `RunStoppedError` after SIGTERM or Ctrl-C.
    """
    config = run.config
    data = open_data(config) if data is None else data
    tokenizer = tokenizer or load_tokenizer(config)
    world = World.start(config.layout)
    with closing(world), run.exclusive() if world.rank == 0 else nullcontext(), StopRequests() as stop:
        fingerprint = tokenizer.fingerprint if tokenizer else "none"
        facts = settle_facts(config, world, run.checkpoints, fingerprint)
        state = TrainingState.begin(config, world, facts)
        batches = Batches(config, state.plan, data, world, tokenizer)
        if world.rank == 0:
            run.write()
        checkpoints = Checkpoints(run.checkpoints, config.checkpoints)
        observers = Observers(config, data, tokenizer, run.folder)
        _train(run, state, batches, checkpoints, observers, stop)
    return state.model


def _train(
    run: Run,
    state: TrainingState,
    batches: Batches,
    checkpoints: Checkpoints,
    observers: Observers,
    stop: "StopRequests",
) -> None:
    config, plan, world = run.config, state.plan, state.world
    problems = resume(state, checkpoints)
    first = world.rank == 0
    metrics = Metrics(
        run.folder if first else None,
        state.metrics_length,
        state.step,
        config=config,
        log_every=config.log_every,
        tracker=config.tracker,
    )
    display = Display(first, plan.num_steps, state.step, config.log_every)
    with closing(checkpoints), closing(metrics), closing(display):
        for problem in problems:
            display.say(f"passed over: {problem}")
        greet(display, run, state)
        dry_run_shapes(state)
        if state.step == 0 and not checkpoints.steps():
            state.save(checkpoints, metrics.length)
        peak_flops = measure_peak_flops(world.device, state.model.compute_dtype) * (world.layout.world_size())
        rows = batches.ahead(state.step)
        clock = StepClock()
        while state.step < plan.num_steps:
            batch = next(rows)
            clock.begin()
            record = train_step(state, batch)
            clock.end()
            timing = _timing(state, plan.step(state.step - 1), clock, peak_flops)
            metrics.step(record, timing)
            display.step(record, timing)
            observers.look(state, metrics, display)
            stopping = stop.seen(world)
            if state.guard.must_go_back:
                go_back(state, checkpoints, metrics, display)
                rows = batches.ahead(state.step)
            elif stopping or state.save_is_due:
                state.save(checkpoints, metrics.length)
            if stopping and state.step < plan.num_steps:
                checkpoints.wait()
                raise RunStoppedError(stop.requested, _farewell(run, state, stop.requested))
        checkpoints.wait()
        checkpoints.prune(state.best[0] if state.best else None)
        between = f"{clock.share_between():.1%} of the time between steps (looking, saving, data)"
        display.say(f"done: {plan.num_steps} steps, {plan.tokens:,} tokens, {between}; {run.folder}")


def train_step(state: TrainingState, rows: Rows) -> dict[str, Any]:
    """Do one optimiser step, or skip it if its batch is bad, and return its line in the log of record."""
    step, config, world = rows.step, state.config, state.world
    stage = step.segment.stage
    if step.first_row == 0:
        state.guard.begin_stage()
    state.enter_stage(step)
    rate = config.learning_rate.at(step.tokens_after / state.plan.tokens)
    record: dict[str, Any] = {"step": step.index + 1, "tokens": step.tokens_after, "stage": stage.name}
    micro_rows = max(1, config.micro_batch_tokens // stage.sequence_length)
    loss = forward_backward(
        state.model,
        MicroBatch.of(rows.batch, world.device),
        world,
        micro_rows,
        stage.mtp_weight,
        config.balance_weight,
        config.activation_checkpointing,
        state.pipeline,
    )
    squares = gradient_squares(state.model, world)
    norm = sum(squares.values()) ** 0.5
    looking = (step.index + 1) % config.health.every == 0
    problem = "its batch made the run go back" if step.index in state.guard.banned else None
    problem = problem or state.guard.verdict(step.index, loss.total, norm)
    record |= _loss_record(loss, rate, norm)
    if problem is None:
        before = UpdateNorms(state.model) if looking else None
        clip_gradients(state.model, norm, config.optimizer.clip_norm)
        set_learning_rate(state.optimizers, rate, config.optimizer)
        for optimizer in state.optimizers:
            optimizer.step()
        state.update_router_bias(loss.loads_LE, stage.router_bias_rate)
        state.router.add(loss.loads_LE)
        if before is not None:
            record |= {"gradient_norms": norms_by_group(squares), "relative_updates": before.look(state.model, world)}
    else:
        record["skipped"] = problem
    state.model.zero_grad(set_to_none=True)
    state.step += 1
    return record


def resume(state: TrainingState, checkpoints: Checkpoints) -> list[str]:
    """Go to the newest intact checkpoint, if any, and return what was wrong with those passed over."""
    if not checkpoints.steps():
        return []
    step, problems = checkpoints.newest()
    checkpoints.discard_after(step)
    state.load(checkpoints, step)
    return problems


def go_back(state: TrainingState, checkpoints: Checkpoints, metrics: Metrics, display: Display) -> None:
    """Return to the last scheduled checkpoint; the bad batches will be passed over.

    The log of record is cut there too, so that it tells one story; the rollback is a line of it.
    """
    bad, came_from, rollbacks = state.guard.skips_in_row, state.step, state.guard.rollbacks + 1
    checkpoints.wait()
    step, _ = checkpoints.newest(only_every=state.config.checkpoints.every)
    checkpoints.discard_after(step)
    state.load(checkpoints, step)
    state.guard.go_back(rollbacks, bad)
    metrics.cut(state.metrics_length)
    metrics.event({"event": "rollback", "step": step, "from_step": came_from, "bad_steps": [b + 1 for b in bad]})
    display.say(f"{len(bad)} bad batches in a row: back from step {came_from} to {step}, and past them")


def dry_run_shapes(state: TrainingState) -> None:
    """Run one made-up micro-batch of every shape still to come, forward and backward, and forget it.

    Raises MemoryError, with what to change, for a stage that does not fit.
    """
    config, by_shape = state.config, _shapes(state)
    for (rows, length), stage in by_shape.items():
        shape = (rows * config.layout.pipeline, length)  # a pipeline needs as many micro-batches as ranks
        zeros_BT = torch.zeros(shape, dtype=torch.int64)
        positions_BT = torch.arange(length).expand(shape)
        made_up = Batch(zeros_BT, zeros_BT, positions_BT, torch.ones(shape, dtype=torch.bool))
        batch = MicroBatch.of(made_up, state.world.device)
        weights = (stage.mtp_weight, 0.0, config.activation_checkpointing)
        try:
            forward_backward(state.model, batch, state.world, rows, *weights, state.pipeline)
        except (torch.OutOfMemoryError, RuntimeError) as error:
            if "memory" not in str(error):
                raise
            raise MemoryError(
                f"stage {stage.name!r}: {rows} rows of {length} tokens do not fit ({str(error).splitlines()[0]}). "
                "Lower micro_batch_tokens, set activation_checkpointing=true, or shard over more ranks"
            ) from error
    state.model.zero_grad(set_to_none=True)


def _shapes(state: TrainingState) -> dict[tuple[int, int], Stage]:
    """Return the rows and length of the largest micro-batch of each stage still to come, and such a stage."""
    config, plan = state.config, state.plan
    largest: dict[int, int] = {}  # stage -> rows of one rank
    for segment in plan.segments[plan.segments.index(plan.step(min(state.step, plan.num_steps - 1)).segment) :]:
        rows = segment.rows // state.world.num_data_ranks // config.layout.pipeline
        largest[segment.stage_index] = max(rows, largest.get(segment.stage_index, 1))
    shapes = {}
    for index, most in reversed(largest.items()):
        stage = config.stages[index]
        rows = min(max(1, config.micro_batch_tokens // stage.sequence_length), most)
        shapes[rows, stage.sequence_length] = stage
    return shapes


class StopRequests:
    """SIGTERM and Ctrl-C, remembered instead of obeyed at once; a second Ctrl-C is obeyed."""

    def __init__(self) -> None:
        self.requested = 0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequests":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def seen(self, world: World) -> bool:
        """Return whether any rank was asked to stop, so that all stop after the same step."""
        if orphaned():
            self.requested = signal.SIGTERM
        self.requested = int(world.largest(self.requested))
        return bool(self.requested)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            raise KeyboardInterrupt
        self.requested = number


def load_tokenizer(config: TrainConfig) -> Tokenizer | None:
    """Load the data folder's tokenizer.

    Raises ValueError if the model's vocabulary is too small for it, or the data or the initial weights have another's.
    """
    tokenizer = Tokenizer.load(f"{config.data}/tokenizer")
    fingerprint = tokenizer_fingerprint(config.data)
    if fingerprint not in (None, tokenizer.fingerprint):
        raise ValueError(
            f"{config.data} was tokenized with a tokenizer {fingerprint}, its tokenizer/ is {tokenizer.fingerprint}: "
            "restore that, or build the data again"
        )
    initial = Path(config.initial_weights) / "tokenizer.json"
    if config.initial_weights and initial.exists():
        fingerprint = Tokenizer.load(initial.parent).fingerprint
        if fingerprint != tokenizer.fingerprint:
            raise ValueError(
                f"initial_weights {config.initial_weights} were trained with a tokenizer {fingerprint}, {config.data} "
                f"has {tokenizer.fingerprint}: tokenize the data with theirs"
            )
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"{config.data} was tokenized with a vocabulary of {tokenizer.vocab_size}, model.vocab_size is "
            f"{config.model.vocab_size}: set model.vocab_size={tokenizer.padded_vocab_size} or build the data again"
        )
    return tokenizer


def greet(display: Display, run: Run, state: TrainingState) -> None:
    """Say what will run."""
    parameters = sum(parameter.numel() for parameter in state.model.parameters())
    begun = f"going on at step {state.step:,}" if state.step else "beginning"
    display.say(
        f"{run.config.name}: {parameters:,} parameters, {state.plan.num_steps:,} steps, {state.plan.tokens:,} tokens, "
        f"{state.facts['precision']}, {state.world.layout.world_size()} processes; {begun} in {run.folder}"
    )


def _loss_record(loss: BatchLoss, rate: float, norm: float) -> dict[str, Any]:
    record = {
        "learning_rate": rate,
        "loss": loss.total,
        "next_token_loss": loss.next_token,
        "mtp_loss": loss.mtp,
        "balance_loss": loss.balance,
        "grad_norm": norm,
        "num_targets": loss.num_targets,
    }
    if loss.loads_LE.numel():
        shares_LE = loss.loads_LE / loss.loads_LE.sum(-1, keepdim=True).clamp(min=1)
        record["max_violation"] = round(float(shares_LE.max()) * shares_LE.shape[1] - 1, 6)
    return record


def _timing(state: TrainingState, step: Step, clock: StepClock, peak_flops: float) -> dict[str, float]:
    stage = step.segment.stage
    speed = step.segment.step_tokens / clock.step
    flops = training_flops_per_token(state.model.config, stage.sequence_length, mtp=stage.mtp_weight > 0)
    share = speed * flops / peak_flops
    return {
        "seconds": clock.step,
        "seconds_before": clock.before,
        "tokens_per_second": speed,
        "peak_share": share,
    }


def _farewell(run: Run, state: TrainingState, number: int) -> str:
    return (
        f"stopped at step {state.step} of {state.plan.num_steps} by {signal.Signals(number).name}; everything is "
        f"saved. Go on with: glm45 train {run.folder}"
    )
