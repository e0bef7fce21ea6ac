"""What is refused: every malformed request gets one named error, and the server goes on as if nothing had been."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Iterator
from typing import Any

import openai
import pytest
from live import FILLER, Live, load, serving

from sparing.core.budget import parse_bytes
from sparing.core.parsing import parse_method
from sparing.errors import InvalidInputError
from sparing.serve import guards
from sparing.serve.server import bind
from sparing.serve.settings import Settings, is_loopback

CHAT, TEXT, DOCUMENTS = "/v1/chat/completions", "/v1/completions", "/v1/documents"
MESSAGES = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def strict() -> Iterator[Live]:
    """A server that asks for a token."""
    with serving(load(), parse_method("snapkv", 0.5), token="open-sesame") as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_stays(live: Live) -> Iterator[None]:
    yield
    health = live.get("/health").json()
    assert health["requests"] == {"live": 0, "waiting": 0}
    assert health["bytes"]["reserved"] == health["bytes"]["documents"]


def refused(response: Any, status: int, code: str, param: str | None = None) -> str:
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json")
    body = response.json()
    assert list(body) == ["error"]
    assert sorted(body["error"]) == ["code", "message", "param", "type"]
    assert (body["error"]["code"], body["error"]["param"]) == (code, param)
    assert body["error"]["message"]
    message: str = body["error"]["message"]
    return message


CHAT_BODY = {"model": "bundled", "messages": MESSAGES}
TEXT_BODY = {"model": "bundled", "prompt": "Hello"}
BAD_FIELDS: list[tuple[str, dict[str, Any], str, str]] = [
    (CHAT, {"model": "other"}, "model_not_found", "model"),
    (CHAT, {"model": None}, "missing_parameter", "model"),
    (CHAT, {"model": 7}, "invalid_value", "model"),
    (CHAT, {"messages": None}, "missing_parameter", "messages"),
    (CHAT, {"messages": []}, "invalid_value", "messages"),
    (CHAT, {"messages": "Hello"}, "invalid_value", "messages"),
    (CHAT, {"messages": ["Hello"]}, "invalid_value", "messages.0"),
    (CHAT, {"messages": [{"role": "user"}]}, "missing_parameter", "messages.0.content"),
    (CHAT, {"messages": [{"role": "tool", "content": "x"}]}, "invalid_value", "messages.0.role"),
    (CHAT, {"messages": [{"role": "user", "content": ""}]}, "invalid_value", "messages"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
        "invalid_value",
        "messages.0.content.0.type",
    ),
    (CHAT, {"messages": [{"role": "user", "content": 5}]}, "invalid_value", "messages.0.content"),
    (CHAT, {"max_tokens": 0}, "invalid_value", "max_tokens"),
    (CHAT, {"max_tokens": "5"}, "invalid_value", "max_tokens"),
    (CHAT, {"max_tokens": True}, "invalid_value", "max_tokens"),
    (CHAT, {"max_tokens": 1.5}, "invalid_value", "max_tokens"),
    (CHAT, {"max_completion_tokens": -1}, "invalid_value", "max_completion_tokens"),
    (CHAT, {"max_tokens": 10**9}, "context_length_exceeded", "max_tokens"),
    (CHAT, {"temperature": 2.1}, "invalid_value", "temperature"),
    (CHAT, {"temperature": -0.1}, "invalid_value", "temperature"),
    (CHAT, {"top_p": 1.01}, "invalid_value", "top_p"),
    (CHAT, {"seed": 2**63}, "invalid_value", "seed"),
    (CHAT, {"stop": ["a", "b", "c", "d", "e"]}, "invalid_value", "stop"),
    (CHAT, {"stop": ""}, "invalid_value", "stop.0"),
    (CHAT, {"stop": ["a", ""]}, "invalid_value", "stop.1"),
    (CHAT, {"stop": 5}, "invalid_value", "stop"),
    (CHAT, {"stream": "yes"}, "invalid_value", "stream"),
    (CHAT, {"stream_options": {"include_use": True}}, "unknown_parameter", "stream_options.include_use"),
    (CHAT, {"cache_key": "nothing"}, "document_not_found", "cache_key"),
    (CHAT, {"cache_key": ""}, "invalid_value", "cache_key"),
    (CHAT, {"temprature": 0}, "unknown_parameter", "temprature"),
    (CHAT, {"n": 2}, "unsupported_parameter", "n"),
    (CHAT, {"n": True}, "unsupported_parameter", "n"),
    (CHAT, {"logprobs": True}, "unsupported_parameter", "logprobs"),
    (CHAT, {"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
    (CHAT, {"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
    (CHAT, {"presence_penalty": 0.5}, "unsupported_parameter", "presence_penalty"),
    (CHAT, {"logit_bias": {"5": 1}}, "unsupported_parameter", "logit_bias"),
    (TEXT, {"prompt": None}, "missing_parameter", "prompt"),
    (TEXT, {"prompt": ""}, "invalid_value", "prompt"),
    (TEXT, {"prompt": ["one", "two"]}, "invalid_value", "prompt"),
    (TEXT, {"prompt": [1, 2, 3]}, "invalid_value", "prompt"),
    (TEXT, {"logprobs": 0}, "unsupported_parameter", "logprobs"),
    (TEXT, {"echo": True}, "unsupported_parameter", "echo"),
    (TEXT, {"suffix": "end"}, "unsupported_parameter", "suffix"),
    (TEXT, {"best_of": 3}, "unsupported_parameter", "best_of"),
    (TEXT, {"max_completion_tokens": 5}, "unknown_parameter", "max_completion_tokens"),
    (TEXT, {"prompt": FILLER * 500}, "context_length_exceeded", "max_tokens"),
]


@pytest.mark.parametrize(
    ("path", "change", "code", "param"),
    BAD_FIELDS,
    ids=[f"{path[4:8]}-{json.dumps(change)[:50]}" for path, change, _, _ in BAD_FIELDS],
)
def test_a_field_is_refused_by_name(live: Live, path: str, change: dict[str, Any], code: str, param: str) -> None:
    body = {**(CHAT_BODY if path == CHAT else TEXT_BODY), **change}
    response = live.post(path, json=body)
    message = refused(response, 404 if code.endswith("not_found") else 400, code, param)
    assert param.split(".")[0] in message or code in (
        "model_not_found",
        "document_not_found",
        "context_length_exceeded",
    )


BAD_BODIES: list[tuple[bytes, str]] = [
    (b"", "missing_parameter"),
    (b"{", "invalid_json"),
    (b"nonsense", "invalid_json"),
    (b'{"model": "bundled",}', "invalid_json"),
    (b'"text"', "invalid_value"),
    (b"[]", "invalid_value"),
    (b"null", "missing_parameter, invalid_value"),  # FastAPI has changed its mind
    (b"12", "invalid_value"),
    (b'{"model": "bundled", "prompt": "\xff\xfe"}', "invalid_request"),
    (b'{"model": "bundled", "prompt": "x", "temperature": NaN}', "invalid_value"),
    (b'{"model": "bundled", "prompt": "x", "temperature": Infinity}', "invalid_value"),
    (b'{"model": "bundled", "prompt": "\\ud800"}', "invalid_value"),
    (b'{"model": "bundled", "prompt": "x", "max_tokens": ' + b"9" * 4000 + b"}", "invalid_value"),
    (b"[" * 50_000, "invalid_request"),
    (b'{"a":' * 20_000, "invalid_request"),
    (b'{"model": "bundled", "prompt": "x", "\\u0000": 1}', "unknown_parameter"),
]


@pytest.mark.parametrize(("body", "code"), BAD_BODIES, ids=[repr(body[:40]) for body, _ in BAD_BODIES])
def test_a_malformed_body_is_refused(live: Live, body: bytes, code: str) -> None:
    response = live.post(TEXT, content=body, headers={"Content-Type": "application/json"})
    error = response.json()["error"]
    assert response.status_code == 400
    assert error["code"] in code, error
    assert error["message"]


def test_random_bytes_and_random_bodies_never_break_the_server(live: Live) -> None:
    import random

    rng = random.Random(0)
    values: list[Any] = [None, True, 0, -1, 2.5, "", "x", [], {}, [None], {"a": None}, "bundled", MESSAGES, 10**30]
    names = ["model", "messages", "prompt", "max_tokens", "stop", "stream", "n", "cache_key", "text", "seed", "role"]
    for _ in range(150):
        if rng.random() < 0.3:
            body = rng.randbytes(rng.randrange(200))
        else:
            chosen = {"max_tokens": 2} | {name: rng.choice(values) for name in rng.sample(names, rng.randrange(6))}
            body = json.dumps({"model": "bundled", **chosen}).encode()
            if rng.random() < 0.3:
                body = body[: rng.randrange(len(body))]
        path = rng.choice([CHAT, TEXT, DOCUMENTS])
        response = live.post(path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code in (200, 400, 404), (body, response.text)
    for entry in live.get("/v1/documents").json()["data"]:
        live.service.documents.delete(live.service.documents.get(entry["cache_key"]))


@pytest.mark.parametrize("is_stream", [True, False])
def test_a_prompt_without_a_token_is_refused_behind_a_document_too(
    live: Live, monkeypatch: pytest.MonkeyPatch, is_stream: bool
) -> None:
    """There are tokenizers that leave some characters out; this one is told to leave out all."""
    key = live.post(DOCUMENTS, json={"text": "A text"}).json()["cache_key"]
    monkeypatch.setattr(live.service.prompts, "rest_of_text", lambda text: [])
    response = live.post(TEXT, json={**TEXT_BODY, "cache_key": key, "stream": is_stream})
    assert refused(response, 400, "invalid_value", "max_tokens") == "there is no token in it"


def test_our_own_mistakes_are_counted_as_what_they_are(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(status: int) -> float:
        lines = [line for line in live.get("/metrics").text.splitlines() if f'{TEXT}",status="{status}"' in line]
        return sum(float(line.rpartition(" ")[2]) for line in lines if "requests_total" in line)

    before = counted(500), counted(499)
    monkeypatch.setattr(live.service, "check_model", lambda name: 1 / 0)
    refused(live.post(TEXT, json=TEXT_BODY, headers={"Connection": "close"}), 500, "internal_error")
    assert (counted(500), counted(499)) == (before[0] + 1, before[1])


def test_the_client_gets_typed_errors(live: Live) -> None:
    client = live.client()
    with pytest.raises(openai.BadRequestError, match="n is not offered") as told:
        client.completions.create(model="bundled", prompt="x", n=3)
    assert (told.value.code, told.value.param, told.value.type) == (
        "unsupported_parameter", "n", "invalid_request_error",
    )  # fmt: skip
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="other", prompt="x")


@pytest.mark.parametrize(
    ("verb", "path", "status"),
    [("GET", "/nothing", 404), ("GET", CHAT, 405), ("PUT", TEXT, 405), ("GET", "/docs", 404)],
)
def test_unknown_routes_and_verbs(live: Live, verb: str, path: str, status: int) -> None:
    assert path in refused(live.http.request(verb, path), status, "invalid_request")


# -- size and time --------------------------------------------------------------------------------------------------


def test_a_body_over_the_limit_is_refused_whatever_its_header_says(live: Live) -> None:
    limit = live.service.settings.max_request_bytes
    large = json.dumps({**TEXT_BODY, "prompt": "x" * limit}).encode()
    headers = {"Content-Type": "application/json"}
    assert f"{limit:,}" in refused(live.post(TEXT, content=large, headers=headers), 413, "request_too_large")

    def unannounced() -> Iterator[bytes]:
        for start in range(0, len(large), 5000):
            yield large[start : start + 5000]

    refused(live.post(TEXT, content=unannounced(), headers=headers), 413, "request_too_large")
    with pytest.raises(openai.APIStatusError) as told:
        live.client().completions.create(model="bundled", prompt="x" * limit)
    assert (told.value.status_code, told.value.code) == (413, "request_too_large")
    fits = json.dumps({**TEXT_BODY, "user": "x" * (limit - 500), "max_tokens": 1})
    assert live.post(TEXT, content=fits, headers=headers).status_code == 200


def exchange(live: Live, sent: bytes, wait: float = 5) -> bytes:
    """What the server says to these bytes, until it closes or falls silent."""
    host, port = live.url.removeprefix("http://").split(":")
    got = b""
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        connection.sendall(sent)
        try:
            while part := connection.recv(65536):
                got += part
        except TimeoutError:
            pass
    return got


def test_a_body_that_never_arrives_is_given_up(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(guards, "ARRIVAL_SECONDS", 0.2)
    began = time.monotonic()
    head = f"POST {TEXT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
    said = exchange(live, head.encode() + b'{"model":')
    assert said.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in said
    assert time.monotonic() - began < 4


def test_what_is_no_http_is_refused(live: Live) -> None:
    assert exchange(live, b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n").startswith(b"HTTP/1.1 400")
    assert exchange(live, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"x" * 70_000).startswith(b"HTTP/1.1 400")


# -- who may ask ----------------------------------------------------------------------------------------------------


def test_with_a_token_everything_that_tells_of_texts_needs_it(strict: Live) -> None:
    paths = [("GET", "/v1/models"), ("GET", "/v1/documents"), ("GET", "/metrics"), ("GET", "/openapi.json")]
    for verb, path in [*paths, ("POST", CHAT), ("POST", DOCUMENTS), ("DELETE", f"{DOCUMENTS}/x"), ("GET", "/nothing")]:
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "Basic open-sesame"},
                        {"Authorization": "Bearer open-sesame2"}, {"Authorization": "Bearer"}):  # fmt: skip
            response = strict.http.request(verb, path, headers=headers)
            refused(response, 401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
    for path in ("/", "/page.css", "/page.js", "/health"):
        assert strict.get(path).status_code == 200
    assert strict.get("/health").json()["token_required"] is True
    assert strict.get("/metrics", headers={"Authorization": "bearer open-sesame"}).status_code == 200


def test_the_client_sends_its_key(strict: Live) -> None:
    done = strict.client("open-sesame").completions.create(model="bundled", prompt="x", max_tokens=1)
    assert done.choices[0].finish_reason == "length"
    with pytest.raises(openai.AuthenticationError):
        strict.client("wrong").completions.create(model="bundled", prompt="x", max_tokens=1)


def test_a_name_of_another_site_is_refused_without_a_token(live: Live, strict: Live) -> None:
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "localhost@evil.example", ""):
        assert "localhost" in refused(live.get("/health", headers={"Host": host}), 403, "unknown_host")
    for host in ("localhost", "LOCALHOST:1", "127.0.0.1:99", "[::1]:8000", "127.8.8.8"):
        assert live.get("/health", headers={"Host": host}).status_code == 200
    assert strict.get("/health", headers={"Host": "my.server.example"}).status_code == 200


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "", "application/jsonp"])
def test_a_form_of_another_site_is_refused(live: Live, kind: str) -> None:
    response = live.post(TEXT, content=json.dumps(TEXT_BODY), headers={"Content-Type": kind})
    refused(response, 415, "unsupported_media_type")


def test_no_other_site_may_read(live: Live) -> None:
    response = live.get("/health", headers={"Origin": "https://evil.example"})
    assert not [name for name in response.headers if name.startswith("access-control")]


# -- settings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.5", "my.machine", ""])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(InvalidInputError, match="SPARING_API_KEY"):
        Settings(host=host)
    assert Settings(host=host, token="t").host == host


def test_loopback_is_told_apart() -> None:
    assert all(map(is_loopback, ["127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost", "Localhost"]))
    assert not any(map(is_loopback, ["0.0.0.0", "::", "10.0.0.1", "localhost.example", "", "127.0.0.1.example"]))


@pytest.mark.parametrize(
    "wrong",
    [{"port": -1}, {"port": 70000}, {"memory": 0}, {"max_concurrent": 0}, {"max_queue": -1}, {"max_request_bytes": 0},
     {"token": ""}, {"token": "two words"}, {"token": "schlüssel"}],
)  # fmt: skip
def test_impossible_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError) as told:
        Settings(**wrong)
    assert next(iter(wrong)) in str(told.value)
    assert "two words" not in str(told.value)


def test_small_packets_are_sent_at_once() -> None:
    """asyncio switches Nagle's algorithm off only where the socket names its protocol: 40 ms for every response."""
    with bind(Settings(port=0)) as bound:
        assert bound.proto == socket.IPPROTO_TCP


def test_a_token_is_never_shown() -> None:
    assert "secret" not in repr(Settings(token="secret"))


def test_sizes() -> None:
    assert (parse_bytes("2GiB"), parse_bytes("500 kB")) == (2**31, 500_000)
    for wrong in ("2", "lots", "-1GiB", "0B"):
        with pytest.raises(InvalidInputError, match="memory"):
            parse_bytes(wrong, "memory")
