"""`/v1/models`, `/health` and `/metrics`."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import JSONResponse, Response

from sparing.serve.access import ServiceOf
from sparing.serve.replies import Json
from sparing.serve.service import Service

router = APIRouter()


@router.get("/v1/models", response_model=None)
async def models(service: ServiceOf) -> Response:
    """The one model."""
    return JSONResponse({"object": "list", "data": [_model(service)]})


@router.get("/v1/models/{name:path}", response_model=None)
async def model(name: str, service: ServiceOf) -> Response:
    """The one model, by its name."""
    service.check_model(name)
    return JSONResponse(_model(service))


@router.get("/health", response_model=None)
async def health(service: ServiceOf) -> Response:
    """Whether requests are served, by what, and what they hold."""
    memory = service.memory
    return JSONResponse(
        {
            "status": "shutting down" if service.worker.is_ending else "ok",
            "model": service.name,
            "method": service.method.label,
            "keep": service.method.keep,
            "chat_template": service.prompts.has_template,
            "token_required": service.settings.token is not None,
            "requests": {"live": service.live, "waiting": service.waiting},
            "documents": len(service.documents),
            "bytes": {"limit": memory.limit, "reserved": memory.reserved, "documents": service.documents.held},
        },
        503 if service.worker.is_ending else 200,
    )


@router.get("/metrics", response_model=None)
async def metrics(service: ServiceOf) -> Response:
    """Everything that is counted, for Prometheus."""
    return Response(service.metrics.text(), media_type=service.metrics.media_type)


def _model(service: Service) -> Json:
    return {
        "id": service.name,
        "object": "model",
        "created": service.created,
        "owned_by": "sparing",
        "sparing": {
            "method": service.method.label,
            "keep": service.method.keep,
            "max_length": service.loaded.max_length,
            "chat_template": service.prompts.has_template,
        },
    }
