"""Bytes: what is promised covers what is held, and documents give way in order."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from live import load

from sparing.core.parsing import parse_method
from sparing.loading import LoadedModel
from sparing.serve.documents import Document, Documents, kept_shares, key_of
from sparing.serve.events import DocumentRead, Event, Read
from sparing.serve.memory import Costs, MemoryBudget
from sparing.serve.refusals import Refusal
from sparing.serve.runner import Completion, Runner, complete, compress
from sparing.serve.sampling import Sampling
from sparing.serve.usage import Usage
from sparing.session import use

METHODS = (
    "snapkv",
    "adakv(bits=4)",
    "h2o",
    "tova",
    "quest",
    "kvzip",
    "cam",
    "compactor",
    "spatten",
    "xattention & snapkv",
)


def greedy(token_ids: list[int], max_tokens: int, document: Document | None = None) -> Completion:
    return Completion(token_ids, document, max_tokens, [], Sampling(0.0, 1.0, None))


def held_by(steps: Any) -> int:
    """Bytes of the cache that a suspended request holds."""
    frame = steps.gi_frame
    while steps.gi_yieldfrom is not None:
        steps = steps.gi_yieldfrom
        frame = steps.gi_frame
    return int(frame.f_locals["cache"].bytes_kept)


def watched(steps: Any, events: list[Event], costs: Costs, promised: int) -> None:
    """Run one answer of 40 tokens, its promise renewed as the service does."""
    for _ in steps:
        if events and isinstance(events[0], Read):
            usage = events[0].usage
            promised = usage.bytes_kept + costs.growing(usage.bytes_kept, 40)
            events.clear()
        assert held_by(steps) <= promised


@pytest.mark.parametrize("text", METHODS)
def test_the_promise_covers_what_is_held_at_every_step(loaded: LoadedModel, text: str) -> None:
    method = parse_method(text, 0.5)
    prompt = torch.randint(5, 2000, (600,), generator=torch.Generator().manual_seed(1)).tolist()
    events: list[Event] = []
    with use(loaded.model, method) as session, torch.inference_mode():
        runner = Runner(loaded, session)
        costs = runner.measure()
        promised = costs.reading(600) + costs.growing(costs.reading(600), 40)
        assert promised < 3 * 640 * 2048  # no wild guess: a token of this model takes 2048 bytes
        watched(complete(runner, greedy(prompt, 40), events.append), events, costs, promised)

        events.clear()
        for _ in compress(runner, "key", prompt, events.append):
            pass
        [read] = events
        assert isinstance(read, DocumentRead)
        kept = read.document.usage.bytes_kept
        assert kept == read.document.cache.bytes_kept <= costs.reading(600)
        events.clear()
        promised = kept + costs.growing(kept, 30 + 40)
        answer = complete(runner, greedy(prompt[:30], 40, read.document), events.append)
        watched(answer, events, costs, promised)


def test_a_promise_that_forgets_the_answer_is_broken(loaded: LoadedModel) -> None:
    """The specimen: what a compressed prompt holds does not cover the tokens written after it."""
    method = parse_method("snapkv", 0.5)
    with use(loaded.model, method) as session, torch.inference_mode():
        runner, events = Runner(loaded, session), []
        assert runner.measure().lanes == 8
        steps, held = complete(runner, greedy(list(range(5, 205)), 30), events.append), []
        for _ in steps:
            held.append(held_by(steps))
    read = next(event for event in events if isinstance(event, Read)).usage.bytes_kept
    assert held[0] == read < held[-1]


def test_costs_are_the_line_through_two_measurements() -> None:
    costs = Costs.fitted((100, 1500), (200, 2501), 10, 8)
    assert costs == Costs(fixed=400, per_token=11, full=10, lanes=8)  # 10.01 bytes a token, rounded up
    assert costs.reading(200) == 400 + 11 * 204 + 11 * 204 // 64 >= 2501


def test_what_is_no_line_costs_the_worse_of_the_two() -> None:
    """As Compactor, which notes the queries of the last 256 tokens or none: 4132 and 2080 bytes a token."""
    costs = Costs.fitted((128, 528_928), (256, 532_512), 2048, 8)
    assert costs == Costs(0, 4133, 2048, 8)


def test_what_is_written_is_held_whole_whatever_became_of_the_prompt() -> None:
    """As SpAtten's: most tokens of a prompt never reach the upper layers, but every decoded one does."""
    costs = Costs.fitted((128, 67_099), (256, 132_635), 2048, 8)
    assert costs.per_token == 525
    assert costs.growing(0, 1000) >= 1000 * 2048


def test_a_budget_promises_no_more_than_it_has() -> None:
    memory, one, two = MemoryBudget(100), object(), object()
    assert memory.reserve(one, 60)
    assert not memory.reserve(two, 41)
    assert memory.reserve(two, 40)
    assert (memory.free, memory.reserved, memory.of(two)) == (0, 100, 40)
    memory.resize(one, 10)
    assert memory.free == 50
    memory.hand_over(two, "document", 5)
    assert (memory.of(two), memory.of("document"), memory.free) == (0, 5, 85)
    memory.release(one)
    memory.release(one)
    memory.resize(one, 99)  # what has ended holds nothing, whatever comes late
    assert memory.free == 95


def test_prompts_of_which_a_method_reads_as_many_tokens_whatever_their_length(loaded: LoadedModel) -> None:
    """So both that costs are measured on are as long, and what transformers would hold is of all tokens."""
    method, events = parse_method("specpc(draft=bundled)", 64, lambda name: load().model), []
    with use(loaded.model, method) as session, torch.inference_mode():
        runner = Runner(loaded, session)
        costs = runner.measure()
        assert costs.full == 2048
        promised = costs.reading(600) + costs.growing(costs.reading(600), 40)
        watched(complete(runner, greedy(list(range(5, 605)), 40), events.append), events, costs, promised)


def document(name: str, size: int) -> Document:
    return Document(name, [1], None, Usage(1, 0, 0.0, size, size), [1.0])  # type: ignore[arg-type]


def store(limit: int = 100) -> tuple[MemoryBudget, Documents]:
    memory = MemoryBudget(limit)
    documents = Documents(memory)
    for name in "abc":
        documents.add(object(), document(name, 30))
    return memory, documents


def test_documents_give_way_least_recently_used_first() -> None:
    memory, documents = store()
    documents.get("a")
    documents.make_room(40)
    assert [each.key for each in documents.all()] == ["c", "a"]
    documents.make_room(100)
    assert not documents.all()
    assert memory.free == 100


def test_nothing_gives_way_if_that_is_not_enough() -> None:
    memory, documents = store()
    memory.reserve("request", 10)
    documents.make_room(91)
    assert len(documents) == 3
    documents.make_room(0)
    assert len(documents) == 3


def test_a_document_that_is_waited_for_stays_and_its_bytes_count_until_it_is_not() -> None:
    memory, documents = store()
    a = documents.get("a")
    documents.pin(a)
    documents.make_room(70)
    assert [each.key for each in documents.all()] == ["a"]
    documents.delete(a)
    with pytest.raises(Refusal, match="no document has the key 'a'"):
        documents.get("a")
    assert (memory.free, documents.held) == (70, 30)
    documents.unpin(a)
    assert (memory.free, documents.held) == (100, 0)


def test_a_key_tells_tokens_and_methods_apart() -> None:
    assert key_of("m", [1, 23]) == key_of("m", [1, 23])
    assert len({key_of("m", [1, 23]), key_of("m", [12, 3]), key_of("n", [1, 23])}) == 3


@pytest.mark.parametrize("text", ["snapkv", "streaming_llm", "quest", "full"])
def test_shares_and_usage_are_those_of_the_plan(loaded: LoadedModel, text: str) -> None:
    method = parse_method("snapkv" if text == "full" else text, 1.0 if text == "full" else 0.25)
    token_ids, events = list(range(5, 205)), []
    with use(loaded.model, method) as session, torch.inference_mode():
        for _ in compress(Runner(loaded, session), "key", token_ids, events.append):
            pass
    [read] = events
    assert isinstance(read, DocumentRead)
    found = read.document
    if text in ("quest", "full"):  # nothing is dropped
        assert found.shares == [1.0] * 200
        assert found.usage.dropped_tokens == 0
        return
    plan = found.cache.plan
    assert plan is not None
    for position in (0, 60, 130, 199):
        keeps = [position in head.tolist() for layer in plan.layers for head in layer.kept[0]]
        assert found.shares[position] == pytest.approx(sum(keeps) / len(keeps))
    assert found.usage.kept_tokens == pytest.approx(sum(found.shares), abs=1e-3) == 50
    assert found.usage.prompt_tokens == 200
    assert found.usage.bytes_kept == found.cache.bytes_kept < found.usage.bytes_full == 200 * 2048


def test_tokens_that_were_never_read_have_no_share(loaded: LoadedModel) -> None:
    """A method that shortens the prompt before it is read: shares are of the whole prompt."""
    method = parse_method("specpc(draft=bundled,keep=0.5) & snapkv", 0.25, lambda name: load().model)
    token_ids, events = list(range(5, 205)), []
    with use(loaded.model, method) as session, torch.inference_mode():
        for _ in compress(Runner(loaded, session), "key", token_ids, events.append):
            pass
    found = events[0].document
    columns = set(found.cache.shortening.columns[0].tolist())
    assert 0 < len(columns) < 200
    assert {place for place, share in enumerate(found.shares) if share} <= columns
    assert found.usage.kept_tokens == pytest.approx(sum(found.shares), abs=1e-3)
    assert kept_shares(found.cache, 200) == found.shares
