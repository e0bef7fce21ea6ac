"""How routes get at the server."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request

from sparing.serve.service import Service


async def service_of(request: Request) -> Service:
    """The server that a request has come to. (A plain function would go through a pool of threads.)"""
    service: Service = request.app.state.service
    return service


ServiceOf = Annotated[Service, Depends(service_of)]
