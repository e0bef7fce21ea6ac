"""`/v1/chat/completions` and `/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response

from sparing.serve.access import ServiceOf
from sparing.serve.events import Done, Piece, Read
from sparing.serve.refusals import Refusal
from sparing.serve.replies import Json, Reply, event, usage_body
from sparing.serve.sampling import Sampling
from sparing.serve.schemas import ChatBody, CompletionBody
from sparing.serve.service import Service
from sparing.serve.streams import EventStream, events_of, gone
from sparing.serve.worker import Job

router = APIRouter()

# Tokens that are written at most if a request does not say: of a chat, and of a completion (as the OpenAI API has it).
CHAT_TOKENS, COMPLETION_TOKENS = 256, 16


@router.post("/v1/chat/completions", response_model=None)
async def chat(body: ChatBody, request: Request, service: ServiceOf) -> Response:
    """Answer a chat."""
    service.check_model(body.model)
    prompts = service.prompts
    encode = prompts.chat if body.cache_key is None else prompts.rest_of_chat
    token_ids = await service.tokenize(encode, [message.plain() for message in body.messages])
    return await _respond(body, request, service, token_ids, body.limit, CHAT_TOKENS)


@router.post("/v1/completions", response_model=None)
async def completion(body: CompletionBody, request: Request, service: ServiceOf) -> Response:
    """Continue a text."""
    service.check_model(body.model)
    encode = service.prompts.text if body.cache_key is None else service.prompts.rest_of_text
    token_ids = await service.tokenize(encode, body.prompt)
    return await _respond(body, request, service, token_ids, body.max_tokens, COMPLETION_TOKENS)


async def _respond(
    body: ChatBody | CompletionBody,
    request: Request,
    service: Service,
    token_ids: Sequence[int],
    limit: int | None,
    default: int,
) -> Response:
    """Let the request in, and answer it whole or as a stream."""
    sampling = Sampling(body.temperature, body.top_p, body.seed)
    job = service.start_completion(token_ids, body.cache_key, limit, default, body.stop, sampling)
    counts_usage = body.stream_options.include_usage
    reply = Reply(service.name, service.loaded.fingerprint, isinstance(body, ChatBody), counts_usage)
    if body.stream:
        return EventStream(_streamed(job, reply), lambda: service.cancel(job))
    whole = await service.answer(job, request.receive, _whole(job, reply))
    return gone() if whole is None else JSONResponse(whole)


async def _whole(job: Job, reply: Reply) -> Json:
    """The answer at once.

    Raises:
        Refusal: it failed.
    """
    text, usage, done = "", None, None
    async for happened in events_of(job.events):
        match happened:
            case Read():
                usage = happened.usage
            case Piece():
                text += happened.text
            case Done():
                done = happened
    assert usage is not None
    assert done is not None
    return reply.whole(text, done.reason, usage_body(usage, done.tokens))


async def _streamed(job: Job, reply: Reply) -> AsyncIterator[bytes]:
    """The answer as server-sent events; one that fails on the way ends with its error."""
    for chunk in reply.opening():
        yield event(chunk)
    usage = None
    try:
        async for happened in events_of(job.events):
            match happened:
                case Read():
                    usage = happened.usage
                case Piece():
                    yield event(reply.piece(happened.text))
                case Done():
                    assert usage is not None
                    for chunk in reply.ending(happened.reason, usage_body(usage, happened.tokens)):
                        yield event(chunk)
    except Refusal as refusal:
        yield event(refusal.body)
        return
    yield event("[DONE]")
