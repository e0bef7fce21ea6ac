"""The web application: routes, guards, and how errors are worded."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException

import sparing
from sparing.serve.guards import Guard, Observed, refusal_response
from sparing.serve.refusals import Refusal, internal
from sparing.serve.routes import ROUTERS
from sparing.serve.service import Service

_CODES = {"json_invalid": "invalid_json", "missing": "missing_parameter", "extra_forbidden": "unknown_parameter"}


def build_app(service: Service) -> FastAPI:
    """The application of a server. Its documentation is `/openapi.json`; the usual pages for it load from elsewhere."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        service.connect()
        yield

    app = FastAPI(title="sparing", version=sparing.__version__, lifespan=lifespan, docs_url=None, redoc_url=None)
    app.state.service = service
    for router in ROUTERS:
        app.include_router(router)
    app.add_exception_handler(Refusal, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _unknown)
    app.add_exception_handler(Exception, _failed)
    app.add_middleware(Guard, settings=service.settings)
    app.add_middleware(Observed, metrics=service.metrics)  # the last one added is the first one asked
    return app


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refusal)
    return refusal_response(error)


async def _invalid(request: Request, error: Exception) -> Response:
    """A body that is no JSON, or not what the route takes: the first thing that is wrong with it."""
    assert isinstance(error, RequestValidationError)
    first = error.errors()[0]
    where = _where(first["loc"])
    message = f"{where}: {first['msg']}" if where else str(first["msg"])
    if first["type"] == "json_invalid":
        where, message = None, f"the body is not JSON: {first['ctx']['error']} at character {first['loc'][-1]}"
    return refusal_response(Refusal(400, message, _CODES.get(first["type"], "invalid_value"), where))


def _where(location: Sequence[Any]) -> str | None:
    """The field: ("body", "messages", 0, "role") → "messages.0.role"."""
    return ".".join(str(part) for part in location[1:]) or None


async def _unknown(request: Request, error: Exception) -> Response:
    """No such route, no such verb, or a body that nobody can read."""
    assert isinstance(error, HTTPException)
    message = f"{error.detail}: {request.method} {request.url.path}"
    return refusal_response(Refusal(error.status_code, message, "invalid_request"))


async def _failed(request: Request, error: Exception) -> Response:
    """Our own mistake; uvicorn logs it."""
    return refusal_response(internal())
