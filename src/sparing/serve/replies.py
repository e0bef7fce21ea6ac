"""The bodies of responses, as the OpenAI API has them, with what was kept under `usage.sparing`."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from sparing.serve.documents import Document
from sparing.serve.text import FinishReason
from sparing.serve.usage import Usage

Json = dict[str, Any]


@dataclass(frozen=True)
class Reply:
    """One answer, whole or in pieces.

    Attributes:
        model: its name. fingerprint: of its weights. is_chat: whether it was asked for as a chat.
        counts_usage: whether its stream ends with the usage.
    """

    model: str
    fingerprint: str
    is_chat: bool
    counts_usage: bool = False
    number: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, text: str, reason: FinishReason, usage: Json) -> Json:
        """The response of a request that does not stream."""
        content = {"message": {"role": "assistant", "content": text}} if self.is_chat else {"text": text}
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        return {**self._head("chat.completion"), "choices": [choice], "usage": usage}

    def opening(self) -> list[Json]:
        """What a stream begins with."""
        return [self._chunk({"delta": {"role": "assistant", "content": ""}})] if self.is_chat else []

    def piece(self, text: str) -> Json:
        """Some more text."""
        return self._chunk({"delta": {"content": text}} if self.is_chat else {"text": text})

    def ending(self, reason: FinishReason, usage: Json) -> list[Json]:
        """What a stream ends with."""
        last = self._chunk({"delta": {}} if self.is_chat else {"text": ""}, reason)
        if not self.counts_usage:
            return [last]
        return [last, {**self._head("chat.completion.chunk"), "choices": [], "usage": usage}]

    def _chunk(self, content: Json, reason: FinishReason | None = None) -> Json:
        choice = {"index": 0, **content, "logprobs": None, "finish_reason": reason}
        usage = {"usage": None} if self.counts_usage else {}
        return {**self._head("chat.completion.chunk"), "choices": [choice], **usage}

    def _head(self, kind: str) -> Json:
        start, kind = ("chatcmpl", kind) if self.is_chat else ("cmpl", "text_completion")
        return {
            "id": f"{start}-{self.number}", "object": kind, "created": self.created, "model": self.model,
            "system_fingerprint": self.fingerprint,
        }  # fmt: skip


def usage_body(usage: Usage, completion_tokens: int) -> Json:
    """Tokens as the OpenAI API counts them, and what was kept of the prompt."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": usage.prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
        "sparing": {
            "kept_tokens": round(usage.kept_tokens, 2),
            "dropped_tokens": round(usage.dropped_tokens, 2),
            "bytes_kept": usage.bytes_kept,
            "bytes_full": usage.bytes_full,
        },
    }


def document_body(document: Document) -> Json:
    """A document without its text."""
    return {
        "cache_key": document.key,
        "object": "document",
        "created": document.created,
        "usage": usage_body(document.usage, 0),
    }


def event(body: Json | str) -> bytes:
    """One server-sent event."""
    text = body if isinstance(body, str) else json.dumps(body, ensure_ascii=False, separators=(",", ":"))
    return f"data: {text}\n\n".encode()
