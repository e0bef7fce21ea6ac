"""Where a server listens and how much it may use."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from sparing.errors import InvalidInputError, require


@dataclass(frozen=True)
class Settings:
    """Limits of a server.

    Attributes:
        host, port: where it listens; port 0 takes a free one.
        memory: bytes that all live caches and documents may hold together.
        max_concurrent: requests that are worked on at a time; their tokens take turns.
        max_queue: accepted requests that wait beside those.
        max_request_bytes: of a request's body.
        token: what clients have to send as `Authorization: Bearer ...`; None to let everybody in.

    Raises:
        InvalidInputError: a limit below 1, an impossible port, or an open door: other machines and no token.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    memory: int = 2 * 2**30
    max_concurrent: int = 8
    max_queue: int = 64
    max_request_bytes: int = 4 * 2**20
    token: str | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        require(0 <= self.port <= 65535, "port", self.port, "0 to 65535")
        require(self.memory >= 1, "memory", self.memory, "a number of bytes >= 1")
        require(self.max_concurrent >= 1, "max_concurrent", self.max_concurrent, "a number of requests >= 1")
        require(self.max_queue >= 0, "max_queue", self.max_queue, "a number of requests >= 0")
        require(self.max_request_bytes >= 1, "max_request_bytes", self.max_request_bytes, "a number of bytes >= 1")
        sendable = self.token is None or (self.token.isascii() and self.token.isprintable() and " " not in self.token)
        require(bool(sendable) and self.token != "", "token", "(not shown)", "printable ASCII without spaces")
        if self.token is None and not is_loopback(self.host):
            allowed = "a loopback address such as 127.0.0.1, as long as no token is asked for"
            raise InvalidInputError("host", self.host, allowed, "put a token into the variable SPARING_API_KEY")


def is_loopback(host: str) -> bool:
    """True if an address, or "localhost", can be reached from this machine only."""
    if host.lower() == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False
