"""A real server in this process: uvicorn in a thread, on a free port."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx
from openai import OpenAI

from sparing.adapters.cache import EvictingCache
from sparing.core.method import Method
from sparing.core.parsing import parse_method
from sparing.loading import LoadedModel, ModelSpec
from sparing.serve.server import Server, bind, url_of
from sparing.serve.service import Service
from sparing.serve.settings import Settings
from sparing.serve.worker import Job

FILLER = " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
QUESTION = "What is the special magic number for {key}? The special magic number for {key} is:"
LONG: dict[str, Any] = {"model": "bundled", "temperature": 0, "max_tokens": 4000}


@dataclass(frozen=True)
class Live:
    """A running server. `http`: a client for requests that the official one would not send."""

    url: str
    service: Service
    server: Any
    http: httpx.Client
    _clients: dict[tuple[str, int], OpenAI] = field(default_factory=dict)

    def client(self, token: str = "any", retries: int = 0) -> OpenAI:
        if (token, retries) not in self._clients:
            made = OpenAI(base_url=f"{self.url}/v1", api_key=token, max_retries=retries, timeout=60)
            self._clients[token, retries] = made
        return self._clients[token, retries]

    def close(self) -> None:
        for client in self._clients.values():
            client.close()

    def get(self, path: str, **options: Any) -> httpx.Response:
        return self.http.get(path, **options)

    def post(self, path: str, **options: Any) -> httpx.Response:
        return self.http.post(path, **options)

    def metric(self, name: str) -> float:
        """The value of a metric, all labels added up."""
        lines = [line for line in self.get("/metrics").text.splitlines() if not line.startswith("#")]
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.partition("{")[0].split()[0] == name)

    @contextmanager
    def held_up(self) -> Iterator[None]:
        """The worker does nothing else while the block runs."""
        begun, gate = threading.Event(), threading.Event()

        def steps(runner: Any, post: Any) -> Iterator[None]:
            begun.set()
            assert gate.wait(60)
            yield

        job = Job(steps)
        self.service._accepted[job] = None
        self.service.worker.submit(job)
        assert begun.wait(60)
        try:
            yield
        finally:
            gate.set()


@contextmanager
def serving(loaded: LoadedModel, method: Method, **settings: Any) -> Iterator[Live]:
    chosen = Settings(port=0, **settings)
    bound = bind(chosen)
    service = Service(loaded, method, chosen)
    server = Server(service)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
    thread.start()
    try:
        wait_for(lambda: server.started)
        with httpx.Client(base_url=url_of(bound), timeout=60) as http:
            live = Live(url_of(bound), service, server, http)
            yield live
            live.close()
    finally:
        server.should_exit = True
        thread.join(30)
        service.close()
        bound.close()
    assert not thread.is_alive()
    assert service.worker.is_ending


def small(loaded: LoadedModel, **limits: Any) -> AbstractContextManager[Live]:
    return serving(loaded, parse_method("snapkv", 0.5), **limits)


def load() -> LoadedModel:
    return ModelSpec("bundled", "float32", "cpu").load()


def wait_for(holds: Callable[[], bool], seconds: float = 20) -> None:
    until = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < until, "it never came true"
        time.sleep(0.01)


def caches_alive() -> int:
    """Caches of any request or document that still exist in this process."""
    gc.collect()
    return sum(type(each) is EvictingCache for each in gc.get_objects())


def needle(key: str, value: str, sentences: int = 3) -> str:
    """A text with one fact in its middle."""
    half = (FILLER * sentences).strip()
    return f"{half} The special magic number for {key} is: {value}. {half}"
