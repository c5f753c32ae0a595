"""The engine: requests in, tokens out, from any thread or event loop.

One thread owns the core. Callers hand over closures, which it runs between steps; it sleeps when there is nothing
to do.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from collections.abc import Sequence as Many
from concurrent.futures import Future
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from glm45.config import configuration
from glm45.engine import native
from glm45.engine.backend import Backend, ModelBackend
from glm45.engine.blocks import BlockManager
from glm45.engine.constraints import Grammars
from glm45.engine.core import Core, Job, Result
from glm45.engine.detokenizer import Detokenizer
from glm45.engine.request import Completion, Constraint, Delta, Request, SamplingParams, Sequence
from glm45.engine.runner import Runner
from glm45.engine.sampling import sample_seed
from glm45.engine.scheduler import Scheduler
from glm45.engine.speculative import Drafter
from glm45.model import hub
from glm45.model.transformer import Glm45
from glm45.seeds import derive_seed

InFlight = Literal["finish", "abort", "recompute", "continue"]
Weights = Mapping[str, torch.Tensor] | str | Path | None


@configuration
class EngineConfig:
    """Capacity and policy of an engine. Not in the report."""

    backend: Literal["auto", "model", "native"] = "auto"
    """`native`: fused CPU kernels over a packed copy of the weights; `model`: the training forward itself, anywhere;
    `auto`: native where it can run."""
    num_threads: int | None = None
    """Threads of the native backend; None takes PyTorch's number."""
    block_size: int = 16
    """Tokens that a cache block holds."""
    cache_tokens: int = 65_536
    """Tokens that the paged cache holds in all."""
    max_num_seqs: int = 256
    """Most sequences that decode together."""
    max_num_batched_tokens: int = 1024
    """Most tokens of one step: decoding sequences first, then prompts in chunks."""
    max_length: int | None = None
    """Most tokens of prompt and output together; None takes the model's `max_position_embeddings`."""
    prefix_cache: bool = True
    """Whether equal prefixes are computed once."""
    num_drafts: int = 0
    """Tokens that the MTP layer drafts for each sequence and step; 0 turns speculative decoding off."""
    seed: int = 0
    """Root of the seeds of requests that bring none."""


class Engine:
    """Generates from a model. Close it, or use it as a context manager, to end its thread."""

    def __init__(self, model: Glm45, tokenizer: Any = None, config: EngineConfig | None = None) -> None:
        """`tokenizer` (`glm45.text.tokenizer.Tokenizer`) is needed for text: stop strings, string prompts, grammars.

        Raises ValueError for a configuration that this model or machine cannot serve.
        """
        self.config = config = config or EngineConfig()
        self.model = model
        self.tokenizer = tokenizer
        self.max_length = min(config.max_length or 2**31, model.config.max_position_embeddings)
        self.eos_token_ids = frozenset(model.config.eos_token_id or getattr(tokenizer, "eos_token_ids", ()))
        self._core = _build_core(model, config, self.max_length)
        self._commands: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._thread: threading.Thread | None = None
        self._paused = self._closed = False
        self._at_boundary: Callable[[], None] | None = None  # runs once nothing is running any more
        self._outbox: dict[asyncio.AbstractEventLoop, list[Callable[[], None]]] = {}
        self._compiled: Grammars | None = None  # made when the first constraint comes
        self._compiling = threading.Lock()
        self._num_requests = 0
        self._ids: set[str] = set()  # of requests handed over and not ended

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def generate(
        self, prompts: Many[Many[int] | str], params: SamplingParams | Many[SamplingParams] | None = None
    ) -> list[list[Completion]]:
        """Return the `n` completions of each prompt (token ids or plain text), in order.

        One `params` serves all prompts, or one each. Raises ValueError for a request that cannot be served, before
        anything is generated. Ctrl-C aborts what is under way.
        """
        if params is None or isinstance(params, SamplingParams):
            params = [params or SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise ValueError(f"{len(params)} sampling parameters for {len(prompts)} prompts: give one, or one each")
        futures: list[Future[list[Completion]]] = [Future() for _ in prompts]
        jobs = [
            self._job(prompt, one, partial(_resolve, future))
            for prompt, one, future in zip(prompts, params, futures, strict=True)
        ]
        self._submit(jobs)
        try:
            return [future.result() for future in futures]
        except BaseException:
            for job in jobs:
                self.abort(job.request.id)
            raise

    async def generate_async(
        self, prompt: Many[int] | str, params: SamplingParams, *, request_id: str | None = None, owner: str = ""
    ) -> list[Completion]:
        """Return the completions of one prompt without blocking the event loop; cancellation aborts the request."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[list[Completion]] = loop.create_future()
        job = self._job(prompt, params, lambda result: self._post(loop, _resolve, future, result))
        self._name(job, request_id, owner)
        self._submit([job])
        try:
            return await future
        finally:
            self.abort(job.request.id)

    async def stream(
        self,
        prompt: Many[int] | str,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        owner: str = "",
    ) -> AsyncIterator[Delta]:
        """Yield pieces of the samples as they are generated; each sample's last piece has a `finish_reason`.

        `owner` is whom the request is counted for: owners share the engine fairly. Leaving the loop early, or
        cancellation, aborts the request. Raises ValueError for a request that cannot be served.
        """
        loop = asyncio.get_running_loop()
        queue: asyncio.Queue[Delta | Result] = asyncio.Queue()
        job = self._job(prompt, params or SamplingParams(), lambda result: self._post(loop, queue.put_nowait, result))
        job.deltas = lambda delta: self._post(loop, queue.put_nowait, delta)
        self._name(job, request_id, owner)
        self._submit([job])
        try:
            while isinstance(item := await queue.get(), Delta):
                yield item
            if isinstance(item, BaseException):
                raise item
        finally:
            self.abort(job.request.id)

    def abort(self, request_id: str) -> None:
        """End a request: its samples finish with reason `abort`. Unknown and finished requests are ignored."""
        if request_id in self._ids and not self._closed:
            self._command(partial(self._core.abort, request_id))

    @property
    def weight_version(self) -> int:
        """Version of the weights in force."""
        return self._core.weight_version

    @property
    def longest_sample(self) -> int:
        """Most tokens of prompt and output together that fit into the context and the cache."""
        blocks = self._core.blocks
        return min(self.max_length, blocks.num_blocks * blocks.block_size - 2 * self.config.num_drafts - 1)

    @property
    def is_closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    def update_weights(
        self, weights: Weights = None, *, version: int | None = None, in_flight: InFlight = "finish"
    ) -> int:
        """Serve new weights and return their version; blocks until they are in force.

        `weights` is a state of the same model, a checkpoint folder in the hub layout, or None when the model's
        parameters were changed in place. The version (by default the next) drops the prefix cache. Requests in
        flight: `finish` lets what is running end on the old weights and starts nothing meanwhile, `abort` ends
        everything, `recompute` goes on with keys and values computed anew under the new weights, `continue` goes on
        with those of the old. In a paused engine nothing can finish first: `finish` is `recompute` there. Each token
        carries the version that produced it. Raises ValueError for a version below 0 or over 63 bits, what loading
        raises, with the old weights in force, and RuntimeError while another update waits.
        """
        if version is not None and not 0 <= version < 2**63:
            raise ValueError(f"weight version {version} is out of range: use 0 to 2**63 - 1")
        future: Future[int] = Future()

        def apply() -> None:
            try:
                self._load(weights)
                self._core.new_weights(self.weight_version + 1 if version is None else version)
                future.set_result(self.weight_version)
            except BaseException as error:
                future.set_exception(error)

        def start() -> None:
            if self._at_boundary is not None:
                future.set_exception(RuntimeError("another weight update is waiting for requests to finish"))
                return
            if in_flight == "finish":
                self._at_boundary = apply
                return
            if in_flight == "abort":
                for request_id in list(self._core.jobs):
                    self._core.abort(request_id)
            elif in_flight == "recompute":
                self._core.recompute()
            apply()

        self._command(start)
        return future.result()

    def pause(self) -> None:
        """Stop stepping; requests wait. Returns once the step under way is over."""
        self._call(partial(setattr, self, "_paused", True))

    def resume(self) -> None:
        """Go on after `pause`."""
        self._call(partial(setattr, self, "_paused", False))

    def stats(self) -> dict[str, Any]:
        """Return totals and gauges, for metrics pages and tests."""
        core = self._core
        totals = asdict(core.totals)
        drafted = totals["drafted_tokens"]
        return {
            **totals,
            "acceptance": totals["accepted_tokens"] / drafted if drafted else None,
            "running": len(core.scheduler.running),
            "waiting": core.scheduler.num_waiting,
            "preemptions": core.scheduler.num_preemptions,
            "blocks": core.blocks.num_blocks,
            "blocks_in_use": core.blocks.num_in_use,
            "blocks_cached": core.blocks.num_cached,
            "weight_version": core.weight_version,
            "backend": core.runner.backend.name,
            "paused": self._paused,
        }

    def close(self) -> None:
        """Abort everything and end the thread."""
        with self._wake:
            self._closed = True
            self._wake.notify()
        if self._thread is not None:
            self._thread.join()

    # From here to `_call`: on the caller's thread.

    def _job(self, prompt: Many[int] | str, params: SamplingParams, done: Callable[[Result], None]) -> Job:
        """Check a request and prepare it. Raises ValueError with what to change."""
        if isinstance(prompt, str):
            prompt = self._need_tokenizer("a prompt given as text").encode(prompt)
        prompt_ids = [int(token) for token in prompt]
        self._check(prompt_ids, params)
        with self._wake:
            self._num_requests += 1
            number = self._num_requests
        request = Request(
            id=f"request-{number}",
            prompt_ids=prompt_ids,
            params=params,
            seed=derive_seed(self.config.seed, "request", number) if params.seed is None else params.seed,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self.eos_token_ids),
        )
        sequences = [Sequence.of(request, i, sample_seed(request.seed, i) % 2**64) for i in range(params.n)]
        if params.wants_text:
            decoder = self._need_tokenizer("text (stop strings, detokenize)")
            for sequence in sequences:
                sequence.text = Detokenizer(decoder, params.stop)
        if params.constraint is not None:
            grammars = self._grammars()
            for sequence in sequences:
                sequence.matcher = grammars.matcher(params.constraint)
        return Job(request, sequences, done)

    @staticmethod
    def _name(job: Job, request_id: str | None, owner: str) -> None:
        job.request.id = request_id or job.request.id
        job.request.owner = owner

    def _check(self, prompt_ids: list[int], params: SamplingParams) -> None:
        vocab_size = self.model.config.vocab_size
        if not prompt_ids:
            raise ValueError("the prompt is empty: give at least one token")
        for name, tokens in {
            "prompt": prompt_ids,
            "logit_bias": list(params.logit_bias),
            "stop_token_ids": list(params.stop_token_ids),
        }.items():
            outside = [token for token in tokens if not 0 <= token < vocab_size]
            if outside:
                raise ValueError(f"{name} holds token {outside[0]}, outside the vocabulary of {vocab_size}")
        if len(prompt_ids) >= self.max_length:
            raise ValueError(
                f"the prompt has {len(prompt_ids)} tokens; with a context of {self.max_length} at most "
                f"{self.max_length - 1} leave room for an answer"
            )
        longest = min(len(prompt_ids) + params.max_tokens, self.max_length)
        if longest > self.longest_sample:
            raise ValueError(
                f"prompt and max_tokens come to {longest} tokens and the cache holds a sample of "
                f"{self.longest_sample}: raise cache_tokens or lower max_tokens"
            )

    def _need_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise ValueError(f"{what} needs a tokenizer, and this engine has none: pass token ids only")
        return self.tokenizer

    def compile(self, constraint: Constraint) -> None:
        """Compile a grammar beforehand, on the caller's thread: the first takes seconds, a known one no time.

        Raises ValueError for one that cannot be compiled.
        """
        self._grammars().matcher(constraint)

    def _grammars(self) -> Grammars:
        tokenizer = self._need_tokenizer("a constraint")
        with self._compiling:
            if self._compiled is None:
                self._compiled = Grammars(tokenizer, self.model.config.vocab_size)
        return self._compiled

    def _submit(self, jobs: list[Job]) -> None:
        """Hand over jobs together, so that they are scheduled together. Raises ValueError for an id in use."""
        for job in jobs:
            if job.request.id in self._ids:
                raise ValueError(f"request id {job.request.id!r} is in use")
            self._ids.add(job.request.id)
            job.done = partial(self._ended, job.request.id, job.done)

        def add() -> None:
            for job in jobs:
                self._core.add(job)

        self._command(add)

    def _ended(self, request_id: str, done: Callable[[Result], None], result: Result) -> None:
        self._ids.discard(request_id)
        done(result)

    def _command(self, command: Callable[[], None]) -> None:
        with self._wake:
            if self._closed:
                raise RuntimeError("the engine is closed")
            if self._thread is None:
                self._thread = threading.Thread(target=self._loop, name="glm45-engine", daemon=True)
                self._thread.start()
            self._commands.append(command)
            self._wake.notify()

    def _call(self, function: Callable[[], Any]) -> Any:
        future: Future[Any] = Future()
        self._command(lambda: future.set_result(function()))
        return future.result()

    # From here on: on the engine's thread.

    def _loop(self) -> None:
        while True:
            with self._wake:
                while not (self._commands or self._closed or self._can_step() or self._is_at_boundary()):
                    self._wake.wait()
                commands, self._commands = self._commands, deque()
                closed = self._closed
            for command in commands:
                command()
            if closed:
                for request_id in list(self._core.jobs):
                    self._core.abort(request_id)
            if self._is_at_boundary():
                apply, self._at_boundary = self._at_boundary, None
                assert apply is not None
                self._core.recompute()  # what is still running is paused
                apply()
            if self._can_step():
                self._core.step(admit=self._at_boundary is None)
            self._flush()
            if closed:
                return

    def _is_at_boundary(self) -> bool:
        return self._at_boundary is not None and (self._paused or not self._core.scheduler.running)

    def _can_step(self) -> bool:
        return not self._paused and self._core.scheduler.has_work

    def _post(self, loop: asyncio.AbstractEventLoop, function: Callable[..., Any], *arguments: Any) -> None:
        self._outbox.setdefault(loop, []).append(partial(function, *arguments))

    def _flush(self) -> None:
        """Deliver to each event loop at once what the step has produced for it."""
        outbox, self._outbox = self._outbox, {}
        for loop, calls in outbox.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(_run_all, calls)

    def _load(self, weights: Weights) -> None:
        if isinstance(weights, str | Path):
            weights = hub.load(Path(weights)).state_dict()
        if weights is not None:
            self.model.load_state_dict(weights)


def _build_core(model: Glm45, config: EngineConfig, max_length: int) -> Core:
    if config.num_drafts and model.mtp is None:
        raise ValueError(f"num_drafts is {config.num_drafts}, but this model has no MTP layer: set it to 0")
    num_blocks = max(1, config.cache_tokens // config.block_size)
    backend = _build_backend(model, config, num_blocks, max_length)
    drafter = None
    if config.num_drafts:
        sizes = {"num_blocks": num_blocks, "block_size": config.block_size, "hidden_size": model.config.hidden_size}
        drafter = Drafter(backend, config.num_drafts, **sizes)
    scheduler = Scheduler(
        BlockManager(num_blocks, config.block_size, config.prefix_cache),
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        lookahead=config.num_drafts,
    )
    return Core(scheduler, Runner(backend, drafter), max_length)


def _build_backend(model: Glm45, config: EngineConfig, num_blocks: int, max_length: int) -> Backend:
    if config.backend == "native" or (config.backend == "auto" and native.why_not(model, config.block_size) is None):
        num_threads = config.num_threads or torch.get_num_threads()
        return native.NativeBackend(model, num_blocks, config.block_size, num_threads, max_length)
    return ModelBackend(model, num_blocks, config.block_size)


def _run_all(calls: list[Callable[[], None]]) -> None:
    for call in calls:
        call()


def _resolve(future: Any, result: Result) -> None:
    if future.done():
        return  # cancelled meanwhile
    if isinstance(result, BaseException):
        future.set_exception(result)
    else:
        future.set_result(result)
