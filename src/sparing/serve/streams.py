"""From a job's events to a response, for as long as the client is there."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from sparing.serve.events import Ended, Event, Piece

T = TypeVar("T")
E = TypeVar("E", bound=Event)

# Seconds in which a client has to take the next part of a stream, once its buffers are full.
SEND_SECONDS = 60.0


async def events_of(queue: asyncio.Queue[Event]) -> AsyncIterator[Event]:
    """Everything that happens to a job until it ends; text that has piled up comes as one piece.

    Raises:
        Refusal: it failed.
    """
    ended = False
    while not ended:
        pending = [await queue.get()]
        while not queue.empty():
            pending.append(queue.get_nowait())
        text = ""
        for event in pending:
            if isinstance(event, Piece):
                text += event.text
                continue
            if text:
                yield Piece(text)
                text = ""
            if isinstance(event, Ended):
                ended = True
                if event.failure is not None:
                    raise event.failure
            else:
                yield event
        if text:
            yield Piece(text)


async def last_of(queue: asyncio.Queue[Event], kind: type[E]) -> E:
    """The last event of one kind, once a job has ended well; there is one.

    Raises:
        Refusal: it failed.
    """
    found = None
    async for happened in events_of(queue):
        if isinstance(happened, kind):
            found = happened
    assert found is not None
    return found


async def while_connected(receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
    """The result of some work; None, and the work is cancelled, if the client goes away before."""
    worker, watcher = asyncio.create_task(work), asyncio.create_task(_until_gone(receive))
    try:
        await asyncio.wait((worker, watcher), return_when=asyncio.FIRST_COMPLETED)
        return worker.result() if worker.done() else None
    finally:
        for task in (worker, watcher):
            task.cancel()
        await asyncio.gather(worker, watcher, return_exceptions=True)


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def gone() -> Response:
    """The response to a client that is not there any more: nobody reads it."""
    return Response(status_code=499)


class EventStream(Response):
    """Server-sent events.

    Args:
        chunks: the events, encoded. on_close: called at the end, also when the client goes away or does not read.
    """

    media_type = "text/event-stream"

    def __init__(self, chunks: AsyncIterator[bytes], on_close: Callable[[], None]) -> None:
        super().__init__(headers={"Cache-Control": "no-store"})
        del self.headers["content-length"]
        self._chunks, self._on_close = chunks, on_close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await while_connected(receive, self._send(send))
        finally:
            self._on_close()

    async def _send(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        try:
            async for chunk in self._chunks:
                async with asyncio.timeout(SEND_SECONDS):
                    await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b""})
        except TimeoutError:
            return  # it does not read: nothing can be said to it
