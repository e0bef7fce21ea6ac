"""`/`: a page to try the server with. It asks nothing but this server."""

from __future__ import annotations

from importlib.resources import files

from fastapi import APIRouter
from fastapi.responses import Response

router = APIRouter()

_POLICY = (
    "default-src 'none'; style-src 'self'; script-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}


@router.get("/", response_model=None)
async def page() -> Response:
    """The page."""
    return _response("text/html", _own("page.html"))


@router.get("/page.css", response_model=None)
async def style() -> Response:
    """Its look: that of all pages, and its own."""
    return _response("text/css", _shared("style.css") + _own("page.css"))


@router.get("/page.js", response_model=None)
async def script() -> Response:
    """What it does: what all pages do, and its own."""
    return _response("text/javascript", _shared("points.js") + _own("page.js"))


def _response(kind: str, text: str) -> Response:
    return Response(text, media_type=kind, headers=_HEADERS)


def _own(name: str) -> str:
    return files("sparing.serve").joinpath("page", name).read_text(encoding="utf-8")


def _shared(name: str) -> str:
    return files("sparing.compare.html").joinpath(name).read_text(encoding="utf-8")
