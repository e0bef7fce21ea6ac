"""Ranking documents by a model's own attention or logits: `rerank(model, tokenizer, query, documents)`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, TypeVar

import torch

from sparing.adapters.lens import ModelLens
from sparing.core.ranker import Ranker, parse_ranker
from sparing.errors import InvalidInputError, require
from sparing.tasks.chat import chat_frame
from sparing.tasks.encoding import Encoder, is_encodable

T = TypeVar("T")


class Ranked(NamedTuple):
    """Which of the given documents (its index), and its score; higher = answers the query better."""

    document: int
    score: float


def rerank(
    model: Any, tokenizer: Any, query: str, documents: Sequence[str], ranker: Ranker | str = "icr"
) -> list[Ranked]:
    """Rank documents by how well they answer a query, the best first; of equal ones the earlier one.

    Example:
        >>> ranked = sparing.rerank(model, tokenizer, "Who wrote Emma?", ["A novel by ...", "The weather ..."])
        >>> context = "\\n".join(documents[index] for index, _ in sparing.reorder_for_long_context(ranked))

    Args:
        model: a decoder-only transformers model; it is left as it was found. Calls on models of one process must not
            overlap: hold a lock where there are threads.
        tokenizer: the model's; its chat template is used if it has one.
        documents: the best of a first-stage ranking first, if there is one.
        ranker: a ranker, or `name(field=value,...)` of a registered one: icr, qrhead, first.

    Raises:
        InvalidInputError: no documents, an empty one, or more than the model has positions for.
        MethodRefusedError: the ranker cannot work with this tokenizer, or the model's attention is not finite.
        ScoresMismatchError: the ranker's heads were measured on another model.
        UnsupportedModelError: the model has no seam that the ranker needs.
    """
    return rerank_many(model, tokenizer, [query], documents, ranker)[0]


def rerank_many(
    model: Any, tokenizer: Any, queries: Sequence[str], documents: Sequence[str], ranker: Ranker | str = "icr"
) -> list[list[Ranked]]:
    """Rank the same documents by several queries; rankers that read the documents first read them once.

    Returns:
        One ranking per query, each what `rerank` gives for it. Raises: see there.
    """
    ranker = parse_ranker(ranker) if isinstance(ranker, str) else ranker
    require(isinstance(ranker, Ranker), "ranker", ranker, "a ranker or the name of one")
    return rank_through(ModelLens(model, tokenizer), queries, documents, ranker)


def rank_through(
    lens: ModelLens, queries: Sequence[str], documents: Sequence[str], ranker: Ranker
) -> list[list[Ranked]]:
    """As `rerank_many`, through a lens with a tokenizer that is there already: making one runs the model."""
    _check_texts("queries", queries)
    _check_texts("documents", documents)
    text, was_training = TokenizedText(lens.tokenizer), lens.model.training
    lens.model.eval()
    try:
        scores = ranker.score(lens, text, queries, documents)
    finally:
        lens.model.train(was_training)
    ordered = torch.sort(scores, dim=-1, descending=True, stable=True)
    rows = zip(ordered.indices.tolist(), ordered.values.tolist(), strict=True)
    return [[Ranked(*pair) for pair in zip(indices, values, strict=True)] for indices, values in rows]


def reorder_for_long_context(ranked: Sequence[T]) -> list[T]:
    """The best at both ends, where models read a long context best, and the worst in its middle.

    From d1, d2, ... (best first): d1, d3, d5, ..., d6, d4, d2. Nothing is added or left out.
    """
    return [*ranked[::2], *reversed(ranked[1::2])]


class TokenizedText:
    """See `core.ranker.PromptText`: a tokenizer, and its chat template around the user's words if it has one.

    Raises:
        InvalidInputError: the template cannot be used, see `tasks.chat.chat_frame`.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._encoder = Encoder(tokenizer)
        self.before: list[int] = self._encoder.front
        self.after: list[int] = []
        if getattr(tokenizer, "chat_template", None):
            before, after = chat_frame(tokenizer, fix="set tokenizer.chat_template to another one, or to None")
            self.before = list(tokenizer.encode(before, add_special_tokens=False))
            self.after = self._encoder(after)

    def __call__(self, text: str) -> list[int]:
        """See `core.ranker.PromptText`."""
        return self._encoder(text)


def _check_texts(what: str, texts: Sequence[str]) -> None:
    """Refuse anything but one or more texts that say something."""
    if isinstance(texts, str) or not len(texts):
        raise InvalidInputError(what, texts, "a list of at least one text")
    for number, text in enumerate(texts):
        if not isinstance(text, str) or not text.strip():
            raise InvalidInputError(f"{what}[{number}]", text, "a text that is not empty")
        require(is_encodable(text), f"{what}[{number}]", text, "a text without half characters (surrogates)")
