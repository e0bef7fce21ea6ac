"""Shorter prompts: tokens that a model never reads, chosen by a draft model that reads all of them.

A method sees one prompt without pads and answers with the indices that stay (`Chosen`); the model then reads those at
contiguous positions, as if nothing else had been written. This goes with any way of reading the shorter prompt and with
any KV method (`SnapKV(keep=0.25, prompt=SpecPC(0.5, draft=small))`), whose budget stays a share of the whole prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparing.core.draft import Draft, Drafted
from sparing.core.lens import Lens
from sparing.core.prompt_method import PromptMethod
from sparing.errors import MethodRefusedError


@dataclass(frozen=True)
class Chosen:
    """What stays of a prompt.

    Attributes:
        kept: (k,) int64 indices on the CPU, strictly increasing.
        drafted: what the draft model wrote after the whole prompt, for scorers that want to know.
    """

    kept: Tensor
    drafted: Drafted | None = None


@dataclass(frozen=True)
class PromptDropper(PromptMethod):
    """Base of all methods that drop prompt tokens before the model reads them. What is read stays stored.

    Attributes:
        keep: the share of the prompt's tokens that stays, in (0, 1], or (int) how many tokens; always exact.
        draft: a transformers model with the same tokenizer; not the model at work itself.

    Raises:
        InvalidInputError: no draft model. MethodRefusedError: bytes as a budget, or settings of what is stored.
    """

    draft: Any = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "draft", Draft.of(self.draft, f"on the command line: {self.label}(draft=NAME)"))
        super().__post_init__()
        if self.budget.kind == "bytes":
            problem = "chooses tokens of text, before anything is stored"
            raise MethodRefusedError(self.label, problem, "give a share in (0, 1] or a number of tokens")
        problem = "says what is read of a prompt, not how, nor what is stored"
        self._refuse("bits", "prefill", "prompt", problem=problem, fix="combine them: method(..., prompt=this)")

    def stays(self, tokens: int) -> int:
        """How many of a prompt's tokens stay."""
        is_short = self.budget.kind == "ratio" and tokens < self.min_prompt
        return tokens if is_short else self.budget.tokens_per_head(tokens, 1)

    def choose(self, lens: Lens, ids: Tensor) -> Chosen:
        """The `stays(n)` tokens that stay of a prompt of n > `stays(n)` tokens.

        Args:
            lens: of the draft model. ids: (n,) the prompt, on the CPU.
        """
        raise NotImplementedError

    @property
    def shortening(self) -> PromptDropper | None:
        """This."""
        return None if self.budget.keeps_all else self
