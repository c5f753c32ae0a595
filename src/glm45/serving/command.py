"""What `glm45 serve` does: load, listen, and stop without cutting anyone off."""

import asyncio
import os
import resource
import signal
import socket
from pathlib import Path
from typing import Any, Literal

import torch
import uvicorn

from glm45.config import configuration
from glm45.engine.engine import Engine, EngineConfig
from glm45.model.hub import best_device
from glm45.serving.app import build_app
from glm45.serving.limits import Keys, Limits
from glm45.serving.service import Service
from glm45.serving.source import Source, load_source
from glm45.text.chat import DialectName

KEYS_VARIABLE = "GLM45_API_KEYS"
LOOPBACK = ("127.0.0.1", "localhost", "::1", "[::1]")


@configuration
class ServeConfig:
    """One server. Not in the report."""

    host: str = "127.0.0.1"
    """Address to listen on. Only this machine reaches the default; 0.0.0.0 is everyone."""
    port: int = 8000
    """0 takes a free one."""
    name: str = ""
    """What clients call the model; empty takes the folder's name."""
    api_keys: tuple[str, ...] = ()
    """Keys that clients must send; also taken from the environment variable GLM45_API_KEYS, separated by commas."""
    allow_hosts: tuple[str, ...] = ()
    """Host headers to accept besides the loopback names; `*` accepts all. Only asked where `host` is loopback."""
    admin: bool = False
    """Whether weights may be changed and the engine paused over HTTP."""
    dialect: DialectName = "glm-4.5"
    """Chat format."""
    enable_thinking: bool | None = None
    """Whether to think where a request does not say; None leaves it to the model."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of parameters and products; auto takes the checkpoint's."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Auto takes a GPU where there is one."""
    limits: Limits = Limits()
    """Bounds on body, prompt, output, queue and time."""
    engine: EngineConfig = EngineConfig()
    """Capacity of the engine."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 2**16:
            raise ValueError(f"port is {self.port}: give 1 to 65535, or 0 for a free one")


def load_engine(path: str, config: ServeConfig) -> tuple[Source, Engine]:
    """Load a checkpoint or run and start an engine on it."""
    device = best_device().type if config.device == "auto" else config.device
    dtype = None if config.precision == "auto" else getattr(torch, config.precision)
    source = load_source(path, dtype, device)
    return source, Engine(source.model, source.tokenizer, config.engine)


def build_service(path: str, config: ServeConfig) -> Service:
    """Load what is served, with an engine and its settings."""
    source, engine = load_engine(path, config)
    given = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    return Service(
        engine=engine,
        tokenizer=source.tokenizer,
        model_name=config.name or source.name,
        limits=config.limits,
        defaults=source.defaults.with_thinking(config.enable_thinking),
        dialect=config.dialect,
        keys=Keys((*config.api_keys, *given)),
        is_admin=config.admin,
    )


def serve(path: str, config: ServeConfig) -> None:
    """Serve until SIGTERM or Ctrl-C; streams under way are finished. Raises OSError if the address is taken."""
    listener = _listen(config.host, config.port)  # first: a taken port should not cost a model's loading
    service = build_service(Path(path).as_posix(), config)
    hosts = [] if config.host not in LOOPBACK or "*" in config.allow_hosts else [*LOOPBACK, *config.allow_hosts]
    _raise_file_limit()
    host, port = listener.getsockname()[:2]
    print(f"serving {service.model_name} at http://{f'[{host}]' if ':' in host else host}:{port}", flush=True)
    try:
        run_server(service, listener, hosts)
    finally:
        service.engine.close()


def run_server(service: Service, listener: socket.socket, hosts: list[str]) -> None:
    """Run the event loop until a signal; the second signal ends it at once."""
    config = uvicorn.Config(
        build_app(service, hosts),
        log_level="warning",
        server_header=False,
        timeout_keep_alive=30,
        # Ours ends streams with an error event first; this is the last resort.
        timeout_graceful_shutdown=int(service.limits.shutdown_seconds) + 10,
    )
    # uvicorn raises the signal again once it has stopped; it has then done its work.
    signal.signal(signal.SIGTERM, lambda number, frame: None)
    DrainingServer(config, service).run(sockets=[listener])


class DrainingServer(uvicorn.Server):
    """Stops in order: no new requests, streams finish, those that take too long are told so."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """See the class."""
        self.service.gate.draining = True
        asyncio.get_running_loop().call_later(self.service.limits.shutdown_seconds, self.service.stop.set)
        await super().shutdown(sockets)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family: Any = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family, backlog=2048)
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}; choose another --port") from None


def _raise_file_limit() -> None:
    """Every connection is an open file: take as many as the system allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
