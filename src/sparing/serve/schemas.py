"""The bodies of requests: the OpenAI API's fields that mean something here, and `cache_key`.

A field that would change the answer and is not offered is refused by name; one that cannot change it is ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from sparing.serve.refusals import invalid

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False,),
    "top_logprobs": (),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": (),
    "web_search_options": (),
}
_WITHOUT_EFFECT = {
    "user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key", "prompt_cache_retention",
    "parallel_tool_calls",
}  # fmt: skip
_LEFT_OUT = _NEUTRAL.keys() | _WITHOUT_EFFECT


def _listed(given: Any) -> Any:
    """One string is a list of one. (A union would be told apart by names that mean nothing to users.)"""
    return [given] if isinstance(given, str) else given


def _in_parts(given: Any) -> Any:
    """Likewise of a message's content."""
    return [{"type": "text", "text": given}] if isinstance(given, str) else given


Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], BeforeValidator(_listed, json_schema_input_type=str | list[str])]
Whole = Annotated[int, Field(ge=1, le=2**31 - 1)]


class _Body(BaseModel):
    """No surprises: "5" is no number, and an unknown field is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _leave_out(cls, given: Any) -> Any:
        """Null is as good as nothing."""
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class StreamOptions(_Body):
    """Of a stream."""

    include_usage: bool = False
    include_obfuscation: bool = False


class TextPart(_Body):
    """A part of a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A message. `name` is ignored."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], BeforeValidator(_in_parts, json_schema_input_type=str | list[dict[str, str]])]
    name: str | None = None

    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": "".join(part.text for part in self.content)}


class _Asked(_Body):
    """What chats and completions share."""

    model: str
    cache_key: Text | None = None
    max_tokens: Whole | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] = 1.0
    top_p: Annotated[float, Field(ge=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: Annotated[Texts, Field(max_length=4)] = Field(default_factory=list)
    stream: bool = False
    stream_options: StreamOptions = Field(default_factory=StreamOptions)

    @model_validator(mode="before")
    @classmethod
    def _refuse_by_name(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        for name, neutral in _NEUTRAL.items():
            if given.get(name) is not None and not any(_same(given[name], value) for value in neutral):
                raise invalid(name, f"{name} is not offered by this server; leave it out", "unsupported_parameter")
        return {name: value for name, value in given.items() if name not in _LEFT_OUT}


class ChatBody(_Asked):
    """`/v1/chat/completions`."""

    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    max_completion_tokens: Whole | None = None

    @property
    def limit(self) -> int | None:
        """Tokens that may be written; the newer name goes before."""
        return self.max_completion_tokens or self.max_tokens


class CompletionBody(_Asked):
    """`/v1/completions`."""

    prompt: Text


class DocumentBody(_Body):
    """`/v1/documents`."""

    text: Text


class RankedText(_Body):
    """A document that is to be ranked."""

    text: Text


def _as_texts(given: Any) -> Any:
    """A document may be its text alone."""
    return [{"text": each} if isinstance(each, str) else each for each in given] if isinstance(given, list) else given


class RerankBody(_Body):
    """`/v1/rerank`."""

    model: str
    query: Text
    documents: Annotated[
        list[RankedText],
        BeforeValidator(_as_texts, json_schema_input_type=list[str | dict[str, str]]),
        Field(min_length=1),
    ]
    top_n: Whole | None = None
    return_documents: bool = False


def _same(one: Any, other: Any) -> bool:
    """Equal, and of the same kind: 1 is not true."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)
