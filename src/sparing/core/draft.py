"""Draft models: small models with the same tokenizer, which read or write before the model at work does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch

from sparing.core.fingerprint import fingerprint
from sparing.core.placement import input_device
from sparing.errors import InvalidInputError, MethodRefusedError


@dataclass(frozen=True, repr=False)
class Draft:
    """A transformers model in the part of a draft model. Two are equal if they hold the same model object.

    Its text names the model by its class and fingerprint, so that results of other draft models have other keys.
    """

    model: Any

    @classmethod
    def of(cls, given: Any, fix: str = "") -> Draft:
        """A model, or what is a draft already.

        Raises:
            InvalidInputError: it does not generate.
        """
        if isinstance(given, cls):
            return given
        if not callable(getattr(given, "generate", None)):
            raise InvalidInputError("draft", given, "a transformers model that generates", fix)
        return cls(given)

    @cached_property
    def name(self) -> str:
        """The model's class and fingerprint."""
        return f"{type(self.model).__name__}:{fingerprint(self.model)}"

    def __repr__(self) -> str:
        return f"Draft({self.name!r})"

    def meet(self, label: str, model: Any) -> None:
        """Refuse to be the draft model of a model with another vocabulary, or of itself.

        Raises:
            MethodRefusedError: one of these.
        """
        if self.model is model:
            fix = "load a smaller model, or the same one a second time"
            raise MethodRefusedError(label, "the draft model is the very model that is compressed", fix)
        own, drafts = (m.get_input_embeddings().num_embeddings for m in (model, self.model))
        if own != drafts:
            problem = f"the draft model has a vocabulary of {drafts} tokens, this one of {own}"
            raise MethodRefusedError(label, problem, "use a draft model with the same tokenizer")

    def write(self, ids: Sequence[int], count: int) -> tuple[int, ...]:
        """The `count` tokens, or fewer if the text ends, that the model writes greedily after a prompt."""
        prompt = torch.tensor([list(ids)], device=input_device(self.model))
        with torch.no_grad():
            written = self.model.generate(
                prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=count, do_sample=False
            )
        return tuple(written[0, len(ids) :].tolist())


@dataclass(frozen=True)
class Drafted:
    """What a draft model wrote after a prompt.

    Attributes:
        draft: who wrote. lookahead: how many tokens it was asked for. ids: the tokens.
    """

    draft: Draft
    lookahead: int
    ids: tuple[int, ...]
