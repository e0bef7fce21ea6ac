"""`/v1/documents`: texts that are read and compressed once, and asked many times by their `cache_key`."""

from __future__ import annotations

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from sparing.serve.access import ServiceOf
from sparing.serve.events import DocumentRead
from sparing.serve.replies import document_body
from sparing.serve.schemas import DocumentBody
from sparing.serve.streams import gone, last_of
from sparing.serve.text import token_texts

router = APIRouter()


@router.post("/v1/documents", response_model=None)
async def create(body: DocumentBody, request: Request, service: ServiceOf) -> Response:
    """Read and compress a text before any question is known; one that is held already is not read again."""
    token_ids = await service.tokenize(service.prompts.document, body.text)
    key = service.key_of(token_ids)
    document = service.documents.find(key)
    if document is None:
        job = service.start_document(key, token_ids)
        read = await service.answer(job, request.receive, last_of(job.events, DocumentRead))
        if read is None:
            return gone()
        document = read.document
    return JSONResponse(document_body(document))


@router.get("/v1/documents", response_model=None)
async def documents(service: ServiceOf) -> Response:
    """All documents, the one that was used last at the end."""
    return JSONResponse({"object": "list", "data": [document_body(each) for each in service.documents.all()]})


@router.get("/v1/documents/{cache_key}", response_model=None)
async def document(cache_key: str, service: ServiceOf) -> Response:
    """One document."""
    return JSONResponse(document_body(service.documents.get(cache_key)))


@router.get("/v1/documents/{cache_key}/tokens", response_model=None)
async def tokens(cache_key: str, service: ServiceOf) -> Response:
    """The text of every token of a document, and the share of the compressed layers' KV heads that keep it."""
    found = service.documents.get(cache_key)
    texts = await service.tokenize(token_texts, service.prompts.tokenizer, found.token_ids)
    return JSONResponse({"tokens": texts, "kept": [round(share, 4) for share in found.shares]})


@router.delete("/v1/documents/{cache_key}", response_model=None)
async def delete(cache_key: str, service: ServiceOf) -> Response:
    """Forget a document; requests that were accepted before still get their answers."""
    service.documents.delete(service.documents.get(cache_key))
    return JSONResponse({"cache_key": cache_key, "object": "document.deleted", "deleted": True})
