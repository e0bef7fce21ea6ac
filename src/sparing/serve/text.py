"""Tokens to text as they come: never half a character, and cut exactly where a stop string begins."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

FinishReason = Literal["stop", "length"]

_INCOMPLETE = "\N{REPLACEMENT CHARACTER}"
# Tokens after which text is not waited for any more. No character takes as many.
_PATIENCE = 16


def decoder(tokenizer: Any) -> Callable[[list[int]], str]:
    """How a tokenizer makes text of tokens, special ones left out and nothing tidied up afterwards."""
    return partial(tokenizer.decode, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Detokenizer:
    """Text of tokens that come one by one; what it has given, joined, is the text of all of them.

    A token may be a part of a character, and what a token reads may depend on the one before it (a space that only
    the first word lacks). So the newest tokens are decoded together with those that gave the last text, and nothing
    is given while the end is an incomplete character. Tokens that give none in a row (special ones), or none but broken
    characters, are not decoded again and again.

    Args:
        decode: token ids to text, special tokens left out.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._ids: list[int] = []
        self._before = self._given = 0  # tokens before those that gave the last text, and those that have given theirs

    def push(self, token: int) -> str:
        """The text that this token completes; may be empty."""
        self._ids.append(token)
        new = self._new_text()
        if (not new or new.endswith(_INCOMPLETE)) and len(self._ids) - self._given < _PATIENCE:
            return ""
        if new:
            self._before, self._given = self._given, len(self._ids)
        else:  # what comes next still follows what gave the last text
            del self._ids[self._given :]
        return new

    def flush(self) -> str:
        """The rest, once no token will come any more: an incomplete character stays a replacement character."""
        new = self._new_text()
        self._before = self._given = len(self._ids)
        return new

    def _new_text(self) -> str:
        known = self._decode(self._ids[self._before : self._given])
        return self._decode(self._ids[self._before :])[len(known) :]


def token_texts(tokenizer: Any, token_ids: Sequence[int]) -> list[str]:
    """The text of every token; that of a character which takes several is at the last of them."""
    stream = Detokenizer(decoder(tokenizer))
    texts = [stream.push(token) for token in token_ids]
    return [*texts[:-1], texts[-1] + stream.flush()] if texts else []


class StopStrings:
    """Text up to the first stop string, given as soon as it cannot be the beginning of one.

    The first is the one that ends first; of two that end together, the one that begins first.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(strings)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """(text that can be given, whether a stop string has come)."""
        self._held += text
        found = [(at + len(string), at) for string in self._strings if (at := self._held.find(string)) >= 0]
        if found:
            given, self._held = self._held[: min(found)[1]], ""
            return given, True
        keep = max((_overlap(self._held, string) for string in self._strings), default=0)
        given, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return given, False

    def flush(self) -> str:
        """What was held back, once no text will come any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, string: str) -> int:
    """The most characters at the end of the text that are the beginning of the string, but not all of it."""
    for count in range(min(len(string) - 1, len(text)), 0, -1):
        if text.endswith(string[:count]):
            return count
    return 0


class TextStream:
    """An answer's text, token by token, and why it ended.

    Args:
        decode: token ids to text, special tokens left out.
        end_ids: tokens that end an answer. stop: strings that do. max_tokens: it is longer than by no means.
    """

    def __init__(
        self, decode: Callable[[list[int]], str], end_ids: set[int], stop: Sequence[str], max_tokens: int
    ) -> None:
        self._detokenizer, self._stops = Detokenizer(decode), StopStrings(stop)
        self._end_ids, self._left = end_ids, max_tokens
        self.tokens = 0

    def push(self, token: int) -> tuple[str, FinishReason | None]:
        """The text that can be given now, and why the answer has ended, None if it has not."""
        self.tokens += 1
        is_end = token in self._end_ids
        text, is_stopped = self._stops.push("" if is_end else self._detokenizer.push(token))
        if is_stopped:
            return text, "stop"
        if not is_end and self.tokens < self._left:
            return text, None
        rest, is_stopped = self._stops.push(self._detokenizer.flush())
        text += rest if is_stopped else rest + self._stops.flush()
        return text, "stop" if is_end or is_stopped else "length"
