"""What a client is told when a request cannot be served: the error body of the OpenAI API."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

from sparing.errors import SparingError

_TYPES = {
    HTTPStatus.UNAUTHORIZED: "authentication_error",
    HTTPStatus.FORBIDDEN: "permission_error",
    HTTPStatus.NOT_FOUND: "not_found_error",
    HTTPStatus.TOO_MANY_REQUESTS: "rate_limit_error",
}


class Refusal(SparingError):
    """A request that is not served.

    Attributes:
        status: of the HTTP response. message: what happened and what to do.
        param: the field of the body that is at fault. code: for programs.
        retry_after: seconds after which to try again, of requests that came too early.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.code, self.param = status, message, code, param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """As the OpenAI API words it: `{"error": {"message", "type", "param", "code"}}`."""
        kind = "server_error" if self.status >= 500 else _TYPES.get(HTTPStatus(self.status), "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    @property
    def headers(self) -> dict[str, str]:
        """Of the response, beside the usual ones."""
        if self.retry_after is not None:
            return {"Retry-After": str(self.retry_after)}
        return {"WWW-Authenticate": "Bearer"} if self.status == HTTPStatus.UNAUTHORIZED else {}


def invalid(param: str, message: str, code: str = "invalid_value") -> Refusal:
    """A field of the body is at fault."""
    return Refusal(400, message, code, param)


def internal() -> Refusal:
    """Our own mistake; what happened is in the server's log only."""
    return Refusal(500, "the server failed on this request; its log says why", "internal_error")


def shutting_down() -> Refusal:
    """Somebody has stopped the server."""
    return Refusal(503, "the server is shutting down", "shutting_down")
