"""The API as its official client uses it, against the engine's own answers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from live import FILLER, QUESTION, Live, load, needle, serving
from openai import OpenAI

from sparing.compare.engine import Compressed, Engine
from sparing.core.parsing import parse_method
from sparing.loading import LoadedModel
from sparing.serve.routes import completions
from sparing.session import use
from sparing.tasks.encoding import Encoder

PROMPT = needle("amber river", "71234") + "\n" + QUESTION.format(key="amber river")
GREEDY: dict[str, Any] = {"model": "bundled", "temperature": 0}


@pytest.fixture(scope="module")
def client(live: Live) -> OpenAI:
    return live.client()


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    """The same model and method, beside the server."""
    loaded, method = load(), parse_method("snapkv", 0.5)
    with use(loaded.model, method) as session:
        yield Engine(loaded, session)


def engine_answer(engine: Engine, prompt: str, max_tokens: int) -> str:
    method = engine.session.method
    reading = engine.read(Encoder(engine.tokenizer).start(prompt), [method])
    return engine.text(engine.answer(engine.compress(reading, method), [], max_tokens, reading.next_logits))


def text_of(chunks: Any) -> str:
    return "".join(chunk.choices[0].text for chunk in chunks if chunk.choices)


# -- answers --------------------------------------------------------------------------------------------------------


def test_a_completion_is_the_engines_answer(client: OpenAI, engine: Engine) -> None:
    done = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=12)
    assert done.choices[0].text == engine_answer(engine, PROMPT, 12)
    assert done.choices[0].finish_reason == "length"
    assert (done.object, done.model) == ("text_completion", "bundled")
    assert done.choices[0].text.startswith(" 7")


def test_a_long_prompt_is_read_in_chunks_and_answered_all_the_same(client: OpenAI, engine: Engine) -> None:
    prompt = needle("amber river", "71234", 16) + "\n" + QUESTION.format(key="amber river")
    done = client.completions.create(**GREEDY, prompt=prompt, max_tokens=12)
    assert done.usage is not None
    assert done.usage.prompt_tokens > 512  # one chunk
    assert done.choices[0].text == engine_answer(engine, prompt, 12)


def test_a_chat_reads_the_contents_line_by_line(client: OpenAI, engine: Engine) -> None:
    parts = [{"type": "text", "text": "What is the special magic number for amber river?"},
             {"type": "text", "text": " The special magic number for amber river is:"}]  # fmt: skip
    text = needle("amber river", "71234")
    messages: Any = [{"role": "developer", "content": text}, {"role": "user", "content": parts}]
    done = client.chat.completions.create(**GREEDY, messages=messages, max_completion_tokens=6)
    assert done.choices[0].message.content == engine_answer(engine, PROMPT, 6)
    assert done.choices[0].message.role == "assistant"
    assert done.object == "chat.completion"


def test_streams_are_the_same_text_piece_by_piece(client: OpenAI, live: Live) -> None:
    whole = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=20)
    chunks = list(client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=20, stream=True))
    assert text_of(chunks) == whole.choices[0].text
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1
    assert all(chunk.usage is None for chunk in chunks)

    messages: Any = [{"role": "user", "content": PROMPT}]
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    parts = list(client.chat.completions.create(**GREEDY, messages=messages, max_tokens=20, **options))
    assert parts[0].choices[0].delta.role == "assistant"
    assert "".join(part.choices[0].delta.content or "" for part in parts[:-1]) == whole.choices[0].text
    assert parts[-1].choices == []
    assert parts[-1].usage == whole.usage

    body = {"model": "bundled", "prompt": PROMPT, "temperature": 0, "max_tokens": 3, "stream": True}
    raw = live.post("/v1/completions", json=body)
    assert raw.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert raw.text.endswith("\n\ndata: [DONE]\n\n")


def test_usage_counts_what_was_kept(client: OpenAI, engine: Engine) -> None:
    usage: Any = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=5).usage
    token_ids = Encoder(engine.tokenizer).start(PROMPT)
    assert (usage.prompt_tokens, usage.completion_tokens) == (len(token_ids), 5)
    assert usage.total_tokens == len(token_ids) + 5
    method = engine.session.method
    report = engine.compress(engine.read(token_ids, [method]), method).cache.report()
    plan, kept = report.plan, usage.sparing
    assert plan is not None
    assert kept["kept_tokens"] == round(plan.tokens_kept / 8, 2)  # 4 layers of 2 KV heads
    assert kept["kept_tokens"] + kept["dropped_tokens"] == len(token_ids)
    assert (kept["bytes_kept"], kept["bytes_full"]) == (report.bytes_kept, report.bytes_full)


def test_the_end_token_ends_an_answer(client: OpenAI) -> None:
    """The bundled model writes no end here by itself, so a token that it does write is made one."""
    loaded = load()
    whole = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=12).choices[0].text
    token_ids = loaded.tokenizer.encode(whole, add_special_tokens=False)
    place = next(place for place in range(2, 12) if token_ids[place] not in token_ids[:place])
    loaded.model.generation_config.eos_token_id = [1, token_ids[place]]
    with serving(loaded, parse_method("snapkv", 0.5)) as other:
        done = other.client().completions.create(**GREEDY, prompt=PROMPT, max_tokens=12)
    assert done.choices[0].finish_reason == "stop"
    assert done.choices[0].text == loaded.tokenizer.decode(token_ids[:place])
    assert done.usage is not None
    assert done.usage.completion_tokens == place + 1


# -- parameters -----------------------------------------------------------------------------------------------------


def test_stop_strings_are_cut_exactly(client: OpenAI) -> None:
    whole = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=30).choices[0].text
    stop = whole[9:13]  # begins and ends within tokens, or spans several
    expected = whole[: whole.index(stop)]
    for stops in (stop, [stop], ["never there", stop, "nor this"]):
        done = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=30, stop=stops)
        assert (done.choices[0].text, done.choices[0].finish_reason) == (expected, "stop")
        chunks = list(client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=30, stop=stops, stream=True))
        assert text_of(chunks) == expected
        assert chunks[-1].choices[0].finish_reason == "stop"


def test_a_seed_repeats_an_answer_and_temperature_changes_it(client: OpenAI) -> None:
    def drawn(**options: Any) -> str:
        return client.completions.create(model="bundled", prompt=FILLER, max_tokens=12, **options).choices[0].text

    assert drawn(seed=1) == drawn(seed=1) != drawn(seed=2)
    assert drawn(seed=1, top_p=1e-9) == drawn(temperature=0) == drawn(seed=3, temperature=1e-9)
    assert drawn(temperature=2) != drawn(temperature=2)


def test_answers_in_any_script_come_as_whole_characters(
    client: OpenAI, live: Live, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundled model writes English only, so its tokens are dictated: of most characters here, two to four."""
    text = "日本 🎉👩‍👩‍👧 Ünïcödé é 語 done"
    token_ids = live.service.loaded.tokenizer.encode(text, add_special_tokens=False)
    assert len(token_ids) > 1.5 * len(text)

    class Dictated:
        def __init__(self, sampling: Any) -> None:
            self.left = iter(token_ids)

        def draw(self, logits: Any) -> int:
            return next(self.left)

    monkeypatch.setattr("sparing.serve.runner.Sampler", Dictated)
    options: Any = {**GREEDY, "prompt": "x", "max_tokens": len(token_ids)}
    assert client.completions.create(**options).choices[0].text == text
    chunks = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(chunks) == text
    assert all("\N{REPLACEMENT CHARACTER}" not in chunk for chunk in chunks)
    for stop in ("語", "👧", "é 語", "ö"):
        stopped = client.completions.create(**options, stop=[stop])
        assert stopped.choices[0].text == text[: text.index(stop)]
        assert stopped.choices[0].finish_reason == "stop"


def test_without_a_number_answers_are_as_long_as_documented(client: OpenAI, monkeypatch: pytest.MonkeyPatch) -> None:
    assert (completions.CHAT_TOKENS, completions.COMPLETION_TOKENS) == (256, 16)
    monkeypatch.setattr(completions, "CHAT_TOKENS", 20)  # the test need not take so long
    messages: Any = [{"role": "user", "content": FILLER}]
    chat = client.chat.completions.create(**GREEDY, messages=messages).usage
    text = client.completions.create(**GREEDY, prompt=FILLER).usage
    assert chat is not None
    assert text is not None
    assert (chat.completion_tokens, text.completion_tokens) == (20, 16)


def test_fields_without_effect_and_neutral_ones_are_taken(client: OpenAI) -> None:
    done = client.completions.create(
        **GREEDY, prompt=FILLER, max_tokens=1, n=1, user="me", presence_penalty=0, frequency_penalty=0.0, echo=False,
        best_of=1, logit_bias={}, suffix=None,
    )  # fmt: skip
    assert done.choices[0].finish_reason == "length"


# -- documents ------------------------------------------------------------------------------------------------------


def document(client: OpenAI, text: str) -> Any:
    return client.post("/documents", body={"text": text}, cast_to=object)


def compressed(engine: Engine, text: str) -> Compressed:
    method = engine.session.method
    return engine.compress(engine.read(Encoder(engine.tokenizer).start(text), [method]), method)


@pytest.mark.parametrize("sentences", [3, 16])
def test_answers_about_a_document_are_the_engines(client: OpenAI, engine: Engine, sentences: int) -> None:
    text = needle("amber river", "71234", sentences)
    made, held = document(client, text), compressed(engine, text)
    for key in ("amber river", "quiet harbour", "amber river"):
        question = QUESTION.format(key=key)
        question_ids = Encoder(engine.tokenizer)("\n" + question)
        expected = engine.text(engine.answer(held, question_ids, 10))
        messages: Any = [{"role": "user", "content": question}]
        extra: Any = {"cache_key": made["cache_key"]}
        chat = client.chat.completions.create(**GREEDY, messages=messages, max_tokens=10, extra_body=extra)
        assert chat.choices[0].message.content == expected
        text_done = client.completions.create(**GREEDY, prompt="\n" + question, max_tokens=10, extra_body=extra)
        assert text_done.choices[0].text == expected
        usage: Any = chat.usage
        read = held.cache.evicting[0].seen
        assert usage.prompt_tokens == read + len(question_ids)
        assert usage.prompt_tokens_details.cached_tokens == read == made["usage"]["prompt_tokens"]
        assert usage.sparing["dropped_tokens"] == made["usage"]["sparing"]["dropped_tokens"] > 0


def test_a_document_is_read_once(client: OpenAI, live: Live) -> None:
    before = live.metric("sparing_tokens_total")
    first = document(client, needle("once", "11111"))
    between = live.metric("sparing_tokens_total")
    assert between - before == first["usage"]["prompt_tokens"]
    assert document(client, needle("once", "11111")) == first
    assert live.metric("sparing_tokens_total") == between


def test_documents_are_listed_shown_and_deleted(client: OpenAI, live: Live) -> None:
    made = document(client, needle("gone", "22222"))
    key = made["cache_key"]
    assert live.get(f"/v1/documents/{key}").json() == made
    assert made in live.get("/v1/documents").json()["data"]
    held = live.metric("sparing_document_bytes")
    gone: Any = client.delete(f"/documents/{key}", cast_to=object)
    assert gone == {"cache_key": key, "object": "document.deleted", "deleted": True}
    assert held - live.metric("sparing_document_bytes") == made["usage"]["sparing"]["bytes_kept"]
    with pytest.raises(openai.NotFoundError) as told:
        client.completions.create(**GREEDY, prompt="x", extra_body={"cache_key": key})
    assert (told.value.code, told.value.param) == ("document_not_found", "cache_key")


def test_the_tokens_of_a_document_say_who_keeps_them(client: OpenAI, live: Live, engine: Engine) -> None:
    text = needle("Ünïcödé 日本語", "33333")
    key = document(client, text)["cache_key"]
    found = live.get(f"/v1/documents/{key}/tokens").json()
    assert "".join(found["tokens"]) == text
    plan = compressed(engine, text).cache.plan
    assert plan is not None
    counts = torch.zeros(len(found["tokens"]))
    for layer in plan.layers:
        for head in layer.kept[0]:
            counts[head] += 1
    assert found["kept"] == pytest.approx((counts / 8).tolist(), abs=1e-4)
    assert 0.0 in found["kept"]


# -- what there is --------------------------------------------------------------------------------------------------


def test_models_health_and_metrics(client: OpenAI, live: Live) -> None:
    [model] = client.models.list().data
    assert model.id == "bundled"
    assert client.models.retrieve("bundled") == model
    with pytest.raises(openai.NotFoundError, match="'other' is not served here"):
        client.models.retrieve("other")
    health = live.get("/health").json()
    assert health["status"] == "ok"
    assert (health["model"], health["method"], health["keep"]) == ("bundled", "snapkv", 0.5)
    assert health["requests"] == {"live": 0, "waiting": 0}
    assert health["bytes"]["reserved"] == health["bytes"]["documents"]

    names = ("sparing_bytes_kept_total", "sparing_bytes_freed_total", "sparing_tokens_total")
    before = [live.metric(name) for name in names]
    usage: Any = client.completions.create(**GREEDY, prompt=PROMPT, max_tokens=4).usage
    kept = usage.sparing["bytes_kept"]
    grown = [live.metric(name) - value for name, value in zip(names, before, strict=True)]
    assert grown == [kept, usage.sparing["bytes_full"] - kept, usage.prompt_tokens + 4]
    text = live.get("/metrics").text
    assert 'sparing_requests_total{route="/v1/completions",status="200"}' in text
    assert 'sparing_request_seconds_count{route="/v1/completions"}' in text
    assert live.metric("sparing_memory_reserved_bytes") == live.metric("sparing_document_bytes")


def test_a_folder_is_called_by_its_name_and_not_by_its_place(
    loaded: LoadedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    for given in (".", "~/my-model", str(folder), "../my-model/"):
        named = replace(loaded, spec=replace(loaded.spec, name=given))
        with serving(named, parse_method("snapkv", 0.5)) as other:
            assert [model.id for model in other.client().models.list()] == ["my-model"]


def test_openapi_describes_the_bodies(live: Live) -> None:
    described = live.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/documents", "/health"} <= set(described["paths"])
    assert "cache_key" in described["components"]["schemas"]["ChatBody"]["properties"]
