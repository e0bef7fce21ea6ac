"""`/v1/rerank`: documents in the order in which they answer a query, as Jina's and Cohere's APIs have it."""

from __future__ import annotations

import uuid
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from sparing.reranking import Ranked
from sparing.serve.access import ServiceOf
from sparing.serve.events import Ranking
from sparing.serve.schemas import RerankBody
from sparing.serve.streams import events_of, while_connected
from sparing.serve.worker import Job

router = APIRouter()


@router.post("/v1/rerank", response_model=None)
async def rerank(body: RerankBody, request: Request, service: ServiceOf) -> Response:
    """Rank documents by the model's attention. The prompt is read in one step, so other requests wait for it."""
    service.check_model(body.model)
    tokens = await service.tokenize(service.prompts.count, [body.query, *body.texts])
    job = service.start_ranking(body.query, body.texts, tokens)
    try:
        ranked = await while_connected(request.receive, _ranking(job))
    finally:
        service.cancel(job)
    if ranked is None:
        return Response(status_code=499)  # nobody reads this
    results = [_result(each, body) for each in ranked[: body.top_n]]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    number = f"rerank-{uuid.uuid4().hex}"
    return JSONResponse({"id": number, "object": "list", "model": service.name, "results": results, "usage": usage})


def _result(each: Ranked, body: RerankBody) -> dict[str, Any]:
    result: dict[str, Any] = {"index": each.document, "relevance_score": each.score}
    return result | ({"document": {"text": body.texts[each.document]}} if body.return_documents else {})


async def _ranking(job: Job) -> list[Ranked] | None:
    """Wait for a ranking.

    Raises:
        Refusal: it failed.
    """
    ranked = None
    async for happened in events_of(job.events):
        if isinstance(happened, Ranking):
            ranked = happened.ranked
    return ranked
