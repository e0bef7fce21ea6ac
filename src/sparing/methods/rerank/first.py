"""FIRST: a listwise ranking from one token (Reddy et al. 2024, arXiv:2406.15657).

Ranks: documents. Each has a letter in the prompt, and the model is asked for their order. It would begin with the
letter of the best one; the logits of all letters at this place give the whole order, and nothing is generated:

    rank by  z[letter of D],  z = logits behind the prompt's last token "["

More documents than `window` are read in windows from the back to the front, `stride` documents apart, so that good ones
move forward; the order that is left is the ranking.

Needs a model that was fine-tuned to rank this way (the paper's are, by a ranking loss on these logits). Of any other
the letters' logits say little; ICR needs no training.

Cost: one forward per window, of the logits of one place.

Deviations:
1. The wording is ours. The published models were trained on RankZephyr's: give it as `opening` and `closing`.
2. Logits of all letters are read; an implementation over a server's top log-probabilities loses some of them.
3. If there are several windows, a document's score is the number of documents behind it: logits of two prompts cannot
   be compared.
"""

from __future__ import annotations

import string
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.lens import Lens
from sparing.core.ranker import Ranker, register_ranker, require_finite, require_fits
from sparing.core.ranking_prompt import PromptText
from sparing.errors import InvalidInputError, MethodRefusedError, require

LETTERS = string.ascii_uppercase


@register_ranker("first", paper="2406.15657",
                 summary="the letters' logits at the answer's first token; for models trained to rank so")  # fmt: skip
@dataclass(frozen=True)
class FIRST(Ranker):
    """Single-token listwise ranking.

    Attributes:
        window: documents in a prompt, at most 26. stride: how far the window moves.
        opening, closing: the words before and behind the documents, with {query} and {count} in them where wished.
    """

    window: int = 20
    stride: int = 10
    opening: str = "Here are {count} passages, each behind its letter. Rank them by how well they answer: {query}\n"
    closing: str = (
        "\n\nQuery: {query}\nName the {count} passages by their letters, the best first, as in [B] > [A]. "
        "Answer with the letters only.\n"
    )

    def __post_init__(self) -> None:
        require(2 <= self.window <= len(LETTERS), "window", self.window, f"a whole number from 2 to {len(LETTERS)}")
        require(1 <= self.stride < self.window, "stride", self.stride, f"a whole number from 1 to {self.window - 1}")
        for name, words in (("opening", self.opening), ("closing", self.closing)):
            try:
                words.format(query="", count=0)
            except (KeyError, IndexError, ValueError, AttributeError):
                raise InvalidInputError(name, words, "a text with no braces but {query} and {count}") from None

    def score(self, lens: Lens, text: PromptText, queries: Sequence[str], documents: Sequence[str]) -> Tensor:
        """See `Ranker.score`."""
        letters = _letters(text, min(len(documents), self.window))
        return torch.stack([self._of_query(lens, text, letters, query, documents) for query in queries])

    def _of_query(
        self, lens: Lens, text: PromptText, letters: list[int], query: str, documents: Sequence[str]
    ) -> Tensor:
        """(documents,) scores."""
        total = len(documents)
        if total <= self.window:
            return self._logits(lens, text, letters, query, documents)
        order, end, start = list(range(total)), total, total
        while start > 0:
            start = max(end - self.window, 0)
            part = order[start:end]
            logits = self._logits(lens, text, letters, query, [documents[index] for index in part])
            order[start:end] = [part[i] for i in torch.sort(logits, descending=True, stable=True).indices.tolist()]
            end -= self.stride
        scores = torch.empty(total, dtype=torch.float64)
        scores[order] = torch.arange(total - 1, -1, -1, dtype=torch.float64)
        return scores

    def _logits(self, lens: Lens, text: PromptText, letters: list[int], query: str, documents: Sequence[str]) -> Tensor:
        """(documents,) logits of the letters of one window's documents."""
        words = {"query": query, "count": len(documents)}
        ids = [*text.before, *text(self.opening.format(**words))]
        for letter, document in zip(LETTERS[: len(documents)], documents, strict=True):
            ids += [*text(f"\n[{letter}]"), *text(" " + document)]
        ids += [*text(self.closing.format(**words)), *text.after, *text("[")]
        require_fits(lens, len(ids), "use a smaller window, e.g. first(window=10,stride=5), or shorter documents")
        with torch.no_grad():
            logits = lens.forward(torch.tensor([ids]), last=1)[0, -1]
        return require_finite(self, logits[letters[: len(documents)]].cpu().double())


def _letters(text: PromptText, count: int) -> list[int]:
    """The token of each letter behind "[".

    Raises:
        MethodRefusedError: one is no single token, or two are the same.
    """
    bracket, found = text("["), []
    for letter in LETTERS[:count]:
        both = text(f"[{letter}")
        # Some tokenizers join the two; then the letter is a token by itself if it is one at all.
        found.append(both[len(bracket) :] if both[: len(bracket)] == bracket else text(letter))
    if any(len(ids) != 1 for ids in found) or len({ids[0] for ids in found}) < count:
        problem = f"the letters A to {LETTERS[count - 1]} are not single tokens of this model's tokenizer"
        raise MethodRefusedError("first", problem, 'use a smaller window if few letters are needed, or ranker "icr"')
    return [ids[0] for ids in found]
