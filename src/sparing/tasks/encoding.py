"""Text to token ids, piece by piece, so that samples can be put together to the token.

Pieces are cut where a space or a line break follows, as the usual tokenizers cut before they merge; the
ids of the pieces in a row are then the ids of the whole text, or another correct encoding of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# Tokenizers of the SentencePiece family put a space before whatever comes first. A piece that continues a
# text must not get one, so it is encoded behind this letter, whose tokens are then taken away again.
_ANCHOR = "a"


class Piece(NamedTuple):
    """Some tokens of a context; `mark` numbers the fact that they state, None for filler."""

    ids: list[int]
    mark: int | None = None


class Encoder:
    """Encodes pieces of text with a tokenizer and remembers them.

    Attributes:
        front: the special tokens that the tokenizer puts before a text, often one "beginning of text".
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._known: dict[str, list[int]] = {}
        self._anchor = self._plain(_ANCHOR)
        self.front = self._front()

    def __call__(self, text: str) -> list[int]:
        """Return the ids of text as the continuation of another text, without special tokens."""
        if text not in self._known:
            self._known[text] = self._plain(text) if text[:1].isalnum() else self._continue(text)
        return self._known[text]

    def start(self, text: str) -> list[int]:
        """Return the ids of text at the beginning of a context, special tokens in front."""
        return self.front + self._plain(text)

    def _continue(self, text: str) -> list[int]:
        ids, skip = self._plain(_ANCHOR + text), len(self._anchor)
        return ids[skip:] if ids[:skip] == self._anchor else self._plain(text)

    def _plain(self, text: str) -> list[int]:
        return list(self._tokenizer.encode(text, add_special_tokens=False))

    def _front(self) -> list[int]:
        ids = list(self._tokenizer.encode(_ANCHOR))
        for start in range(len(ids)):
            if ids[start : start + len(self._anchor)] == self._anchor:
                return ids[:start]
        return []


def is_encodable(text: str) -> bool:
    """False for a text with half characters (surrogates), which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def common_length(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many ids two sequences begin with in common."""
    pairs = enumerate(zip(first, second, strict=False))
    return next((place for place, (a, b) in pairs if a != b), min(len(first), len(second)))


def total(pieces: list[Piece]) -> int:
    """Return the number of tokens of all pieces."""
    return sum(len(piece.ids) for piece in pieces)


def join(front: list[int], pieces: list[Piece]) -> tuple[list[int], dict[int, tuple[int, int]]]:
    """Return front and pieces as one list of ids, and [start, end) of each marked piece in it."""
    ids, spans = list(front), {}
    for piece in pieces:
        if piece.mark is not None:
            spans[piece.mark] = (len(ids), len(ids) + len(piece.ids))
        ids += piece.ids
    return ids, spans
