"""`/v1/rerank`: documents in the order in which they answer a query, as Jina's and Cohere's APIs have it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from sparing.reranking import Ranked
from sparing.serve.access import ServiceOf
from sparing.serve.events import Ranking
from sparing.serve.schemas import RerankBody
from sparing.serve.streams import gone, last_of

router = APIRouter()


@router.post("/v1/rerank", response_model=None)
async def rerank(body: RerankBody, request: Request, service: ServiceOf) -> Response:
    """Rank documents by the model's attention. The prompt is read in one step, so other requests wait for it."""
    service.check_model(body.model)
    texts = [document.text for document in body.documents]
    tokens = await service.tokenize(service.prompts.ranking, body.query, texts)
    job = service.start_ranking(body.query, texts, tokens)
    ranking = await service.answer(job, request.receive, last_of(job.events, Ranking))
    if ranking is None:
        return gone()
    results = [_result(each, texts if body.return_documents else None) for each in ranking.ranked[: body.top_n]]
    usage = {"prompt_tokens": tokens, "total_tokens": tokens}
    number = f"rerank-{uuid.uuid4().hex}"
    return JSONResponse({"id": number, "object": "list", "model": service.name, "results": results, "usage": usage})


def _result(each: Ranked, texts: Sequence[str] | None) -> dict[str, Any]:
    result: dict[str, Any] = {"index": each.document, "relevance_score": each.score}
    return result if texts is None else {**result, "document": {"text": texts[each.document]}}
