"""The application: every endpoint behind one door, and the process that serves it."""

import logging
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import FileResponse
from starlette.exceptions import HTTPException

from glm45 import __version__
from glm45.serving import admin, anthropic, openai, sglang, vllm
from glm45.serving.door import Door
from glm45.serving.errors import ApiError, ErrorResponse, is_anthropic
from glm45.serving.exchange import CLIENT_LEFT, ClientLeftError
from glm45.serving.service import Service

logger = logging.getLogger("glm45.serving")
PAGE_TYPES = {".css": "text/css", ".js": "text/javascript"}
PAGE_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""The page runs its own code only and talks to its own server only."""


def build_app(service: Service, allowed_hosts: Iterable[str] = ()) -> FastAPI:
    """Return the ASGI application."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        service.stop.set()

    app = FastAPI(
        title="glm45", version=__version__, lifespan=lifespan, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    for endpoints in (openai, anthropic, sglang, vllm, admin):
        app.include_router(endpoints.router(service))
    _add_page(app)
    _add_error_handlers(app)
    app.openapi = lambda: _openapi(app)  # type: ignore[method-assign]
    app.add_middleware(Door, service=service, allowed_hosts=tuple(allowed_hosts))
    return app


def _add_page(app: FastAPI) -> None:
    folder = Path(str(resources.files("glm45.serving").joinpath("page")))
    files = {path.name: path for path in folder.iterdir() if path.suffix in PAGE_TYPES}
    headers = {"Content-Security-Policy": PAGE_POLICY, "X-Content-Type-Options": "nosniff", "Cache-Control": "no-cache"}

    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        return FileResponse(folder / "index.html", media_type="text/html", headers=headers)

    @app.get("/page/{name}", include_in_schema=False)
    async def page_file(name: str) -> Response:
        if name not in files:
            raise ApiError(404, f"the page has no file {name!r}", code="not_found")
        return FileResponse(files[name], media_type=PAGE_TYPES[files[name].suffix], headers=headers)


def _add_error_handlers(app: FastAPI) -> None:
    """Every failure is one error object; what nobody foresaw becomes one at the door."""

    @app.exception_handler(ApiError)
    async def api_error(request: Request, error: ApiError) -> Response:
        return ErrorResponse(error, is_anthropic(request.url.path))

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return ErrorResponse(_validation_error(error), is_anthropic(request.url.path))

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        told = ApiError(error.status_code, str(error.detail), headers=error.headers)
        if error.status_code == 404:
            told = ApiError(404, f"there is nothing at {request.method} {request.url.path}", code="not_found")
        return ErrorResponse(told, is_anthropic(request.url.path))

    @app.exception_handler(ClientLeftError)
    async def client_left(request: Request, error: ClientLeftError) -> Response:
        return Response(status_code=CLIENT_LEFT)


def _validation_error(error: RequestValidationError) -> ApiError:
    """Return the first thing that is wrong with a body, with the name of the field."""
    first: dict[str, Any] = dict(error.errors()[0])
    path = [str(part) for part in first["loc"] if part != "body"]
    name = ".".join(path)
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'cannot be read')}")
    if first["type"] == "extra_forbidden":
        return ApiError(400, f"unrecognized field {name!r}", code="unknown_field", param=name)
    return ApiError(400, f"{name or 'the body'}: {first['msg']}", param=name or None)


def _openapi(app: FastAPI) -> dict[str, Any]:
    """Return the OpenAPI document, with our error object in place of FastAPI's."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        schemas = document.setdefault("components", {}).setdefault("schemas", {})
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        schemas["Error"] = ERROR_SCHEMA
        app.openapi_schema = document
    return app.openapi_schema


ERROR_SCHEMA = {
    "type": "object",
    "required": ["error"],
    "properties": {
        "error": {
            "type": "object",
            "required": ["message", "type"],
            "properties": {
                "message": {"type": "string"},
                "type": {"type": "string"},
                "param": {"type": ["string", "null"]},
                "code": {"type": ["string", "null"]},
            },
        }
    },
}
