"""What stands in front of the routes: who may ask, how large a request may be, and how long it may take to arrive."""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Mapping

from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sparing.serve.metrics import Metrics
from sparing.serve.refusals import Refusal
from sparing.serve.settings import Settings, is_loopback

# Seconds in which a request's body has to arrive.
ARRIVAL_SECONDS = 30.0
# Bytes that are thrown away of a body that is not read, so that its sender gets to read why.
_THROWN_AWAY = 64 * 2**20

# Answered without a token: they tell nothing of anybody's texts.
_OPEN = {"/", "/page.css", "/page.js", "/health"}


def refusal_response(refusal: Refusal) -> JSONResponse:
    """The response that says why."""
    return JSONResponse(refusal.body, refusal.status, headers=refusal.headers)


class Guard:
    """Refuses requests before any route sees them, and hands the others their whole body.

    Without a token a server listens to its own machine only, so two things remain: a page of another site, open in a
    browser there. It can send forms but no JSON without being asked first (so bodies have to say that they are JSON),
    and it can point a name of its own at this address (so the name has to be this machine's).
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app, self._settings = app, settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        try:
            headers = Headers(scope=scope)
            self._check_sender(scope, headers)
            body = await self._body(headers, receive) if scope["method"] == "POST" else b""
        except Refusal as refusal:
            await _throw_away(receive)
            response = refusal_response(refusal)
            response.headers["Connection"] = "close"  # what is left of the body must not be taken for a request
            await response(scope, receive, send)
            return
        except _Gone:
            return
        is_read = scope["method"] != "POST"

        async def replay() -> Message:
            nonlocal is_read
            if is_read:
                return await receive()
            is_read = True
            return {"type": "http.request", "body": body, "more_body": False}

        await self._app(scope, replay, send)

    def _check_sender(self, scope: Scope, headers: Mapping[str, str]) -> None:
        token = self._settings.token
        if token is None:
            host = headers.get("host", "").rpartition("@")[2]
            name = host[: host.rindex("]") + 1] if "]" in host else host.partition(":")[0]
            if not is_loopback(name):
                raise Refusal(403, f"this server knows itself as localhost only, not {name!r}", "unknown_host")
        elif scope["path"] not in _OPEN:
            scheme, _, given = headers.get("authorization", "").partition(" ")
            is_right = hmac.compare_digest(given.strip().encode(), token.encode())
            if scheme.lower() != "bearer" or not is_right:
                raise Refusal(401, "send the server's token as `Authorization: Bearer TOKEN`", "invalid_api_key")

    async def _body(self, headers: Mapping[str, str], receive: Receive) -> bytes:
        """The whole body, read no further than is allowed, whatever its header says of its length."""
        if headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refusal(415, "send the body as application/json", "unsupported_media_type")
        most = self._settings.max_request_bytes
        too_large = Refusal(413, f"the body has more than the {most:,} bytes that are allowed", "request_too_large")
        said = headers.get("content-length", "0")
        if said.isdigit() and int(said) > most:
            raise too_large
        body = bytearray()
        try:
            async with asyncio.timeout(ARRIVAL_SECONDS):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    body += message.get("body", b"")
                    if len(body) > most:
                        raise too_large
                    if not message.get("more_body", False):
                        return bytes(body)
        except TimeoutError:
            seconds = f"{ARRIVAL_SECONDS:g} seconds"
            raise Refusal(408, f"the body did not arrive within {seconds}", "request_timeout") from None


class _Gone(Exception):
    """The client left before its request was complete."""


async def _throw_away(receive: Receive) -> None:
    """Read what is left of a body, up to a limit: a client that is still sending would not read a response."""
    left = _THROWN_AWAY
    try:
        async with asyncio.timeout(1):
            while left > 0:
                message = await receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


class Observed:
    """Counts responses and their time, by the route that gave them."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app, self._metrics = app, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status = time.monotonic(), 499  # the client left before there was a response

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except asyncio.CancelledError:
            pass  # by uvicorn, which has waited long enough for this client, and would log a traceback
        except Exception:
            status = 500  # the response is made further out
            raise
        finally:
            route = getattr(scope.get("route"), "path", "other")
            self._metrics.responded(route, status, time.monotonic() - began)
