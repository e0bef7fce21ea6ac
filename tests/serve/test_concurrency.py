"""Many at once: nobody lost or mixed up, nobody held up, nothing left behind."""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import socket
import time
import traceback
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from live import FILLER, LONG, QUESTION, Live, caches_alive, needle, small, wait_for
from openai import AsyncOpenAI

from sparing.compare.engine import Engine
from sparing.core.parsing import parse_method
from sparing.loading import LoadedModel
from sparing.serve import worker
from sparing.serve.events import Piece
from sparing.serve.runner import Runner
from sparing.serve.service import Service
from sparing.serve.worker import Worker
from sparing.session import use
from sparing.tasks.encoding import Encoder

REQUESTS, AT_ONCE = 300, 16


@pytest.fixture
def live(live: Live) -> Iterator[Live]:
    """The shared server, which every test here leaves empty."""
    yield live
    wait_for(lambda: live.metric("sparing_memory_reserved_bytes") == live.metric("sparing_document_bytes"))
    assert live.get("/health").json()["requests"] == {"live": 0, "waiting": 0}


# -- load -----------------------------------------------------------------------------------------------------------


def facts(count: int) -> tuple[list[str], list[str]]:
    """Prompts with a number each, all different, and the answers."""
    values = [str(value) for value in random.Random(0).sample(range(10_000, 100_000), count)]
    prompts = [needle(f"key {value}", value, 1) + "\n" + QUESTION.format(key=f"key {value}") for value in values]
    return prompts, [f" {value}" for value in values]


def engine_answers(loaded: LoadedModel, prompts: list[str]) -> list[str]:
    method = parse_method("snapkv", 0.5)
    with use(loaded.model, method) as session:
        engine, answers = Engine(loaded, session), []
        for prompt in prompts:
            reading = engine.read(Encoder(loaded.tokenizer).start(prompt), [method])
            output = engine.answer(engine.compress(reading, method), [], 5, reading.next_logits)
            answers.append(engine.text(output))
    return answers


async def ask_all(url: str, prompts: list[str]) -> list[str]:
    """Everybody's answer, `AT_ONCE` requests at a time, every other one as a stream."""
    client, places = AsyncOpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0), asyncio.Semaphore(AT_ONCE)
    options: dict[str, Any] = {"model": "bundled", "temperature": 0, "max_tokens": 5}

    async def ask(number: int, prompt: str) -> str:
        async with places:
            if number % 2:
                stream = await client.completions.create(prompt=prompt, stream=True, **options)
                return "".join([chunk.choices[0].text async for chunk in stream])
            return (await client.completions.create(prompt=prompt, **options)).choices[0].text

    async with client:
        return await asyncio.gather(*(ask(number, prompt) for number, prompt in enumerate(prompts)))


@pytest.mark.slow
def test_hundreds_of_requests_sixteen_at_a_time(live: Live, loaded: LoadedModel) -> None:
    prompts, values = facts(REQUESTS)
    answers = asyncio.run(ask_all(live.url, prompts))
    assert len(answers) == REQUESTS
    # Where compression has cost the model its answer, the engine's is as wrong.
    others = [number for number in range(REQUESTS) if answers[number] != values[number]]
    assert len(others) < 0.05 * REQUESTS
    assert [answers[number] for number in others] == engine_answers(loaded, [prompts[number] for number in others])


def test_mixed_up_answers_would_be_seen(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """The specimen: a server that gives some of a text to whoever came last."""
    note, (prompts, values) = Service._note, facts(12)

    def mixed_up(service: Service, job: Any, event: Any) -> None:
        if isinstance(event, Piece):
            job = list(service._accepted)[-1]
        note(service, job, event)

    monkeypatch.setattr(Service, "_note", mixed_up)
    answers = asyncio.run(ask_all(live.url, prompts))
    assert sum(answer != value for answer, value in zip(answers, values, strict=True)) > 6


# -- fairness -------------------------------------------------------------------------------------------------------


def test_a_short_request_does_not_wait_for_a_long_one(live: Live) -> None:
    client = live.client()
    stream = client.completions.create(prompt=FILLER, stream=True, **LONG)
    next(iter(stream))
    done = client.completions.create(prompt=FILLER, model="bundled", temperature=0, max_tokens=3)
    assert done.choices[0].finish_reason == "length"
    assert live.get("/health").json()["requests"]["live"] == 1  # the long one, still at work
    stream.close()


def test_tokens_take_turns(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two that write at the same time, neither gets two steps while the other waits for one."""
    order: list[Any] = []
    step = Worker._step

    def noted(self: Worker, job: Any, runner: Any) -> bool:
        order.append(job)
        return step(self, job, runner)

    options: dict[str, Any] = {"model": "bundled", "prompt": FILLER, "temperature": 0, "max_tokens": 12}
    with ThreadPoolExecutor(2) as pool:
        with live.held_up():
            asked = [pool.submit(live.client().completions.create, **options) for _ in range(2)]
            wait_for(lambda: live.service.waiting == 2)
            monkeypatch.setattr(Worker, "_step", noted)
        assert len({each.result().choices[0].text for each in asked}) == 1
    jobs = [job for job in order if order.count(job) == 12]
    assert (len(jobs), len(set(jobs))) == (24, 2)
    assert all(one is not other for one, other in itertools.pairwise(jobs))


# -- clients that leave, or do not read -----------------------------------------------------------------------------


def raw(
    live: Live, body: dict[str, Any], path: str = "/v1/completions", receive_buffer: int | None = None
) -> socket.socket:
    """A connection on which something was asked for; nothing is read."""
    host, port = live.url.removeprefix("http://").split(":")
    connection = socket.socket()
    if receive_buffer is not None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect((host, int(port)))
    text = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    connection.sendall(f"{head}Content-Length: {len(text)}\r\n\r\n".encode() + text)
    return connection


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_client_that_leaves_frees_its_cache(live: Live, is_stream: bool) -> None:
    before = caches_alive()
    connection = raw(live, {**LONG, "prompt": FILLER, "stream": is_stream})
    wait_for(lambda: live.metric("sparing_requests_live") == 1)
    wait_for(lambda: caches_alive() == before + 1)
    assert live.metric("sparing_memory_reserved_bytes") > live.metric("sparing_document_bytes")
    connection.close()
    began = time.monotonic()
    wait_for(lambda: live.metric("sparing_requests_live") == 0, 2)
    assert live.metric("sparing_memory_reserved_bytes") == live.metric("sparing_document_bytes")
    assert caches_alive() == before
    assert time.monotonic() - began < 2  # 4000 tokens take many times as long


def test_a_client_that_leaves_the_queue_is_never_worked_on(live: Live) -> None:
    tokens = live.metric("sparing_tokens_total")
    with live.held_up():
        connection = raw(live, {**LONG, "prompt": FILLER})
        wait_for(lambda: live.service.waiting == 1)
        connection.close()
        wait_for(lambda: any(job.cancelled for job in live.service._accepted))
    wait_for(lambda: not live.service._accepted)
    assert live.metric("sparing_tokens_total") == tokens


def test_a_client_that_leaves_while_its_document_is_read(live: Live) -> None:
    count = len(live.service.documents)
    with live.held_up():
        with raw(live, {"text": "left alone " + FILLER}, "/v1/documents"):
            wait_for(lambda: live.service.waiting == 1)
        wait_for(lambda: any(job.cancelled for job in live.service._accepted))
    wait_for(lambda: not live.service._accepted)
    assert len(live.service.documents) == count


def test_a_deleted_document_is_not_held_by_the_answer_that_goes_on_from_it(live: Live) -> None:
    before = caches_alive()
    key = live.post("/v1/documents", json={"text": "deleted " + FILLER}).json()["cache_key"]
    with raw(live, {**LONG, "prompt": FILLER, "cache_key": key}):
        wait_for(lambda: caches_alive() == before + 2)
        live.http.delete(f"/v1/documents/{key}")
        wait_for(lambda: caches_alive() == before + 1)
        assert live.metric("sparing_requests_live") == 1


def test_a_client_that_does_not_read_holds_nobody_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answer is far larger than all buffers between; it is finished, or given up, and its cache freed."""
    monkeypatch.setattr("sparing.serve.streams.SEND_SECONDS", 1.0)
    # Every piece of text swells, so that a short answer fills the buffers.
    monkeypatch.setattr("sparing.serve.text.Detokenizer.push", lambda stream, token: "x" * 200_000)
    connection = raw(live, {**LONG, "prompt": FILLER, "stream": True, "max_tokens": 60}, receive_buffer=4096)
    wait_for(lambda: live.metric("sparing_requests_live") == 1)
    monkeypatch.undo()
    monkeypatch.setattr("sparing.serve.streams.SEND_SECONDS", 1.0)
    began = time.monotonic()
    done = live.client().completions.create(model="bundled", prompt=FILLER, temperature=0, max_tokens=3)
    assert time.monotonic() - began < 5
    assert done.usage is not None
    assert done.usage.completion_tokens == 3
    wait_for(lambda: live.metric("sparing_requests_live") == 0)
    connection.close()


def test_the_same_document_twice_at_once_is_held_once(live: Live) -> None:
    with ThreadPoolExecutor(2) as pool:
        with live.held_up():
            asked = [pool.submit(live.post, "/v1/documents", json={"text": "twice " + FILLER}) for _ in range(2)]
            wait_for(lambda: live.service.waiting == 2)
        first, second = (each.result().json() for each in asked)
    assert first["cache_key"] == second["cache_key"]
    keys = [entry["cache_key"] for entry in live.get("/v1/documents").json()["data"]]
    assert keys.count(first["cache_key"]) == 1
    wait_for(lambda: live.metric("sparing_memory_reserved_bytes") == live.metric("sparing_document_bytes"))


# -- failures, and the end ------------------------------------------------------------------------------------------


def test_a_request_that_fails_is_told_and_others_go_on(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    before, forward = caches_alive(), Runner.forward

    def breaks(runner: Runner, token_ids: Any, cache: Any) -> Any:
        if token_ids.shape[1] == 1 and cache.evicting[0].seen % 7 == 0:
            raise RuntimeError("out of memory, say")
        return forward(runner, token_ids, cache)

    logged: list[str] = []  # as text: pytest's own log would hold the traceback, and the cache with it
    monkeypatch.setattr(worker.log, "exception", lambda message: logged.append(traceback.format_exc()))
    monkeypatch.setattr(Runner, "forward", breaks)
    options: dict[str, Any] = {"model": "bundled", "prompt": FILLER, "max_tokens": 20, "temperature": 0}
    with pytest.raises(openai.InternalServerError) as told:
        live.client().completions.create(**options)
    assert told.value.code == "internal_error"
    assert "out of memory, say" not in str(told.value)
    assert "out of memory, say" in logged[0]
    with pytest.raises(openai.APIError, match="its log says why"):
        list(live.client().completions.create(stream=True, **options))
    monkeypatch.undo()
    wait_for(lambda: live.metric("sparing_requests_live") == 0)
    assert caches_alive() == before
    assert live.client().completions.create(**options).choices[0].finish_reason == "length"


def test_after_the_server_the_model_is_as_it_was(loaded: LoadedModel) -> None:
    import torch

    ids = torch.arange(5, 50)[None]
    before = loaded.model(ids).logits
    with small(loaded) as live:
        live.client().completions.create(model="bundled", prompt=FILLER, max_tokens=2)
        key = live.post("/v1/documents", json={"text": FILLER}).json()["cache_key"]
        assert key
    assert "generate" not in vars(loaded.model)
    assert not loaded.model._forward_pre_hooks
    assert torch.equal(loaded.model(ids).logits, before)


def test_stopping_ends_what_still_runs(loaded: LoadedModel) -> None:
    """Without waiting for it: what drains it is in the test of the command."""
    with small(loaded) as live:
        stream = live.client().completions.create(prompt=FILLER, stream=True, **LONG)
        chunks = iter(stream)
        next(chunks)
        live.service.close()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(chunks)
        assert live.get("/health").status_code == 503
