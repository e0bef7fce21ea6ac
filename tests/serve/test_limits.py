"""What a server is given at most: requests that wait, and bytes."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import openai
import pytest
from live import FILLER, LONG, small, wait_for

from sparing.loading import LoadedModel
from sparing.serve.documents import Document
from sparing.serve.usage import Usage
from sparing.serve.worker import Job


def test_a_full_queue_says_when_to_come_back(loaded: LoadedModel) -> None:
    short: dict[str, Any] = {"model": "bundled", "prompt": FILLER, "max_tokens": 2, "temperature": 0}
    with small(loaded, max_concurrent=1, max_queue=2) as live, ThreadPoolExecutor(4) as pool:
        client = live.client()
        with live.held_up():
            waiting = [pool.submit(client.completions.create, **short) for _ in range(2)]
            wait_for(lambda: live.service.waiting == 2)
            with pytest.raises(openai.RateLimitError) as told:
                client.completions.create(**short)
            assert told.value.code == "queue_full"
            assert int(told.value.response.headers["retry-after"]) >= 1
            # The official client comes back by itself.
            patient = pool.submit(live.client(retries=5).completions.create, **short)
            time.sleep(0.2)
        assert len({each.result().choices[0].text for each in [*waiting, patient]}) == 1


def test_requests_that_wait_for_the_tokenizer_are_limited_too(loaded: LoadedModel) -> None:
    gate = threading.Event()
    with small(loaded, max_concurrent=1, max_queue=1) as live, ThreadPoolExecutor(2) as pool:
        held = live.service._tokenizing.submit(gate.wait, 20)
        waiting = [pool.submit(live.post, "/v1/documents", json={"text": text}) for text in "ab"]
        wait_for(lambda: live.service._tokenizing._work_queue.qsize() == 2)
        over = live.post("/v1/documents", json={"text": "c"})
        assert not held.done()
        gate.set()
        assert (over.status_code, over.json()["error"]["code"]) == (429, "queue_full")
        assert [each.result().status_code for each in waiting] == [200, 200]
        assert live.post("/v1/documents", json={"text": "c"}).status_code == 200


def test_when_to_come_back_follows_the_pace(loaded: LoadedModel) -> None:
    with small(loaded, max_concurrent=2) as live:
        service = live.service
        assert service._retry_after(1) == 1  # nothing is known yet
        service._seconds = 12.0
        assert service._retry_after(1) == 12
        assert service._retry_after(3) == 36
        assert service._retry_after(100) == 60


def test_who_has_to_end_before_memory_is_free(loaded: LoadedModel) -> None:
    with small(loaded, memory=100) as live:
        service = live.service
        for size in (20, 30, 40):
            job = Job(lambda runner, post: iter(()))
            service._accepted[job] = None
            assert service.memory.reserve(job, size)
        assert [service._ends_until(size) for size in (11, 30, 31, 60, 61, 100)] == [1, 1, 2, 2, 3, 3]
        # A document of 10 bytes, which would give way as soon as that is enough.
        document = Document("key", [1], None, Usage(1, 0, 0.0, 10, 10), [1.0])  # type: ignore[arg-type]
        service.documents.add(object(), document)
        assert [service._ends_until(size) for size in (30, 31, 60, 61, 100)] == [1, 2, 2, 3, 3]
        service._accepted.clear()


def test_memory_is_promised_before_work_begins_and_never_twice(loaded: LoadedModel) -> None:
    prompt: dict[str, Any] = {"model": "bundled", "prompt": FILLER * 3, "max_tokens": 20, "temperature": 0}
    with small(loaded) as probe, ThreadPoolExecutor(1) as pool:
        with probe.held_up():
            asked = pool.submit(probe.client().completions.create, **prompt)
            wait_for(lambda: probe.service.waiting == 1)
            promised = int(probe.metric("sparing_memory_reserved_bytes"))
        asked.result()
    with small(loaded, memory=2 * promised, max_queue=10) as live, ThreadPoolExecutor(2) as pool:
        client = live.client()
        with live.held_up():
            waiting = [pool.submit(client.completions.create, **prompt) for _ in range(2)]
            wait_for(lambda: live.service.waiting == 2)
            assert live.metric("sparing_memory_reserved_bytes") == 2 * promised
            with pytest.raises(openai.RateLimitError, match="0 are free") as told:
                client.completions.create(**prompt)
            assert told.value.code == "memory_full"
            assert int(told.value.response.headers["retry-after"]) >= 1
        assert len({each.result().choices[0].text for each in waiting}) == 1
        with pytest.raises(openai.APIStatusError, match="more than all") as told_never:
            client.completions.create(**{**prompt, "prompt": FILLER * 12})
        assert (told_never.value.status_code, told_never.value.code) == (413, "memory_budget_exceeded")
        wait_for(lambda: live.metric("sparing_memory_reserved_bytes") == 0)


def test_a_promise_shrinks_once_the_prompt_is_compressed(loaded: LoadedModel) -> None:
    with small(loaded) as live:
        prompt = FILLER * 12
        costs = live.service.costs
        tokens = len(loaded.tokenizer.encode(prompt))
        before = costs.reading(tokens) + costs.growing(costs.reading(tokens), LONG["max_tokens"])
        stream = live.client().completions.create(prompt=prompt, stream=True, **LONG)
        next(iter(stream))
        # Half of the tokens are dropped, which is far more than what the store adds.
        assert live.metric("sparing_memory_reserved_bytes") < before - 0.3 * costs.reading(tokens)
        stream.close()


def test_documents_give_way_to_requests_but_not_those_that_are_asked(loaded: LoadedModel) -> None:
    def made(client: Any, name: str) -> Any:
        return client.post("/documents", body={"text": f"{name}. {FILLER * 3}"}, cast_to=object)

    with small(loaded) as probe:
        size = made(probe.client(), "one")["usage"]["sparing"]["bytes_kept"]
        tokens = len(loaded.tokenizer.encode(f"three. {FILLER * 3}"))
        reading = probe.service.costs.reading(tokens + 1)
    with small(loaded, memory=5 * size // 2 + reading) as live, ThreadPoolExecutor(2) as pool:
        client = live.client()
        keys = [made(client, name)["cache_key"] for name in ("one", "two", "three", "four")]
        left = [entry["cache_key"] for entry in live.get("/v1/documents").json()["data"]]
        assert left == keys[-len(left) :]
        assert len(left) == 3  # two beside one that is read
        with pytest.raises(openai.NotFoundError, match="gave way"):
            client.completions.create(model="bundled", prompt="x", extra_body={"cache_key": keys[0]})
        # One that is asked for stays, and its answer comes, even if it is deleted while the request waits.
        options: dict[str, Any] = {"model": "bundled", "prompt": " x", "temperature": 0, "max_tokens": 4}
        extra = {"cache_key": left[-1]}
        answer = client.completions.create(**options, extra_body=extra).choices[0].text
        with live.held_up():
            asked = pool.submit(client.completions.create, **options, extra_body=extra)
            wait_for(lambda: live.service.waiting == 1)
            held = live.metric("sparing_document_bytes")
            client.delete(f"/documents/{left[-1]}", cast_to=object)
            assert live.metric("sparing_document_bytes") == held
        assert asked.result().choices[0].text == answer
        wait_for(lambda: live.metric("sparing_document_bytes") < held)
        for entry in live.get("/v1/documents").json()["data"]:
            client.delete(f"/documents/{entry['cache_key']}", cast_to=object)
        wait_for(lambda: live.metric("sparing_memory_reserved_bytes") == 0)
