"""Listening, and stopping."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

import uvicorn

from sparing.core.method import Method
from sparing.core.ranker import Ranker
from sparing.errors import InvalidInputError
from sparing.loading import LoadedModel
from sparing.serve.app import build_app
from sparing.serve.service import Service
from sparing.serve.settings import Settings

# Seconds that requests have to end once the server is told to stop, and that clients then have to take what is left.
DRAIN_SECONDS, LEAVE_SECONDS = 10, 5


def bind(settings: Settings) -> socket.socket:
    """A socket at the address; nobody can connect until it listens.

    Raises:
        InvalidInputError: the address is not this machine's, or in use.
    """
    with _named(settings):
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, protocol, _, address = found[0]
        # With the protocol named, asyncio sends small packets at once; without, each response waits 40 ms.
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError:
            bound.close()
            raise
        return bound


@contextmanager
def _named(settings: Settings) -> Iterator[None]:
    """Turn what the system says of an address into an error that names it."""
    try:
        yield
    except OSError as error:
        place = f"{settings.host}:{settings.port}"
        raise InvalidInputError("host and port", place, f"a free address of this machine ({error.strerror})") from error


def url_of(bound: socket.socket) -> str:
    """Where a bound socket is reached."""
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class Server(uvicorn.Server):
    """Answers on a socket. Told to stop, it lets requests end; told twice, or after a while, it ends them itself."""

    def __init__(self, service: Service) -> None:
        config = uvicorn.Config(
            build_app(service), log_level="warning", access_log=False, server_header=False, lifespan="on", http="h11",
            loop="asyncio", ws="none", timeout_graceful_shutdown=DRAIN_SECONDS + LEAVE_SECONDS,
        )  # fmt: skip
        super().__init__(config)
        self._service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal has come."""
        if self.should_exit:
            # Not here, in the midst of anything: a request that is just being let in would never end.
            asyncio.get_running_loop().call_soon_threadsafe(self._service.worker.end)
        else:
            super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Wait for what still runs."""
        asyncio.get_running_loop().call_later(DRAIN_SECONDS, self._service.worker.end)
        await super().shutdown(sockets)


def serve(
    loaded: LoadedModel,
    method: Method,
    settings: Settings,
    bound: socket.socket,
    on_start: Callable[[], None],
    ranker: Ranker,
) -> None:
    """Serve until Ctrl-C, then let running requests end.

    Args:
        bound: see `bind`. on_start: called once clients can connect. ranker: see `Service`.

    Raises:
        SparingError: the method cannot work on this model. InvalidInputError: another server has come to listen at
            the address meanwhile.
    """
    service = Service(loaded, method, settings, ranker)
    try:
        with _named(settings):
            bound.listen()
        on_start()
        Server(service).run(sockets=[bound])
    except KeyboardInterrupt:
        pass  # uvicorn raises it again once it has stopped
    finally:
        service.close()
