"""vLLM's endpoints for trainers: pause, resume, reload weights. Generation is `/v1/completions` with token ids."""

import asyncio
from typing import Any, Literal

from fastapi import APIRouter

from glm45.serving.errors import as_client_errors
from glm45.serving.schemas import Strict
from glm45.serving.service import Service, error_responses


class ReloadWeights(Strict):
    """Which checkpoint folder to load."""

    weights_path: str


class CollectiveRpc(Strict):
    """`POST /collective_rpc`: of vLLM's calls to its workers, the one that loads weights."""

    method: Literal["reload_weights"]
    kwargs: ReloadWeights


def router(service: Service) -> APIRouter:
    """Return the endpoints; all of them need `admin=true`."""
    routes = APIRouter(tags=["vLLM"], responses=error_responses())

    @routes.post("/pause")
    async def pause(mode: Literal["keep", "abort"] = "abort") -> dict[str, str]:
        """Stop computing; with mode `abort` requests under way end."""
        service.check_admin()
        await asyncio.to_thread(service.engine.pause)
        if mode == "abort":
            await service.forget("abort")
        return {"status": "paused"}

    @routes.post("/resume")
    async def resume() -> dict[str, str]:
        """Go on after a pause."""
        service.check_admin()
        await asyncio.to_thread(service.engine.resume)
        return {"status": "running"}

    @routes.get("/is_paused")
    async def is_paused() -> dict[str, bool]:
        """Say whether the engine is paused."""
        return {"is_paused": bool(service.engine.stats().get("paused"))}

    @routes.post("/collective_rpc")
    async def collective_rpc(body: CollectiveRpc) -> dict[str, Any]:
        """Serve the weights of a checkpoint folder on this machine."""
        service.check_admin()
        with as_client_errors("kwargs.weights_path"):
            await service.new_weights(body.kwargs.weights_path)
        return {"results": [None]}

    @routes.post("/reset_prefix_cache")
    async def reset_prefix_cache() -> dict[str, str]:
        """Forget every cached prefix."""
        service.check_admin()
        await service.forget("continue")
        return {"status": "ok"}

    return routes
