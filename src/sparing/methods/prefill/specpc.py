"""SpecPC: the prompt tokens that a small draft model attends to (Galim et al. 2025, arXiv:2506.08373).

Ranks: prompt_token. A draft model with the same tokenizer reads the whole prompt and writes `lookahead` tokens after
it. A prompt token matters as much as the most attention that any of its last W rows, or any row of a written token that
it reads again, pays to it, in any of its heads and layers from `first_layer` on:

    s[j] = max over layers, heads and rows i of  w[i] A[l, h, i, j],   w = 1/W, 2/W, ..., 1 for the last W rows of the
    prompt, 1 for written ones;   p[j] = max of s over the k tokens j - floor((k-1)/2) .. j + ceil((k-1)/2)

Kept are the last W tokens, then, from the best p on, each token with its k - 1 neighbours, nearest first, until `keep`
tokens are together. The model reads them at contiguous positions; the others it never sees.

    window ↔ W = 64,  kernel_size ↔ k = 32 (the authors' configurations; 64 in their code),  lookahead ↔ 1,
    first_layer ↔ 0 (8 of 16 for Llama-3.2-1B),  keep ↔ C = 1024 tokens

SpecKV-PC: the same, with SpecKV on what is left and one draft for both: `prompt_keep` = 2048 tokens are read, and of
their keys and values `keep` (256 tokens) are stored.

Cost: the draft model's prefill and W rows of attention per head of it; the prefill of the model itself shrinks to
`keep` tokens. Of `lookahead` written tokens the draft model reads all but the last, so with 1 there are no such rows.

Deviations:
1. The authors' weights are 0, 1/(W-1), ..., 1: the first row counts for nothing, and with W = 1 none does.
2. Where `keep` is less than W, the most recent tokens are kept; the authors would keep the oldest of the window.
3. Tokens with equal p come in the order of s, then of position: the token that made its neighbourhood matter is kept
   first. The authors leave the order to the sort.
4. Neighbours that lie outside the prompt are left out instead of clamped to its ends.
5. Prompts shorter than W are allowed, and a batch is shortened row by row.
6. A prompt beyond the positions that the draft model was made for is refused.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.budget import Budget
from sparing.core.draft import Drafted
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.method import register
from sparing.core.prompt import Chosen, PromptDropper
from sparing.errors import MethodRefusedError, require
from sparing.measures.attention import row_tiles
from sparing.methods.kv.speckv import SpecKV


@register(
    "specpc",
    family="prompt_compression",
    unit="prompt_token",
    moment="before_prompt",
    paper="2506.08373",
    summary="the prompt tokens that a draft model attends to; the others are never read",
    needs_draft=True,
)
@dataclass(frozen=True)
class SpecPC(PromptDropper):
    """A draft model's attention to the prompt. See the module.

    Attributes:
        lookahead: tokens that the draft model writes (1).
        window: last tokens of the prompt whose rows vote, always kept themselves (64).
        kernel_size: tokens that a maximum is taken over, and that are kept together (32); 1 for single ones.
        first_layer: the draft model's first layer that votes (0).
    """

    lookahead: int = 1
    window: int = 64
    kernel_size: int = 32
    first_layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("lookahead", "window", "kernel_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "a number of tokens >= 1")
        require(self.first_layer >= 0, "first_layer", self.first_layer, "the number of a layer, from 0")

    def choose(self, lens: Lens, ids: Tensor) -> Chosen:
        """See `PromptDropper.choose`."""
        if self.first_layer >= lens.num_layers:
            problem = f"first_layer is {self.first_layer}, and the draft model has {lens.num_layers} layers"
            raise MethodRefusedError(self.label, problem, "give the number of one of them, from 0")
        needed = len(ids) + self.lookahead - 1
        if lens.max_length is not None and needed > lens.max_length:
            problem = f"the draft model was made for {lens.max_length} tokens, and would read {needed}"
            raise MethodRefusedError(self.label, problem, "use a draft model for longer texts")
        votes = Votes(len(ids), self.window, self.first_layer)
        with lens.hooked(attention=votes):
            written = self.draft.write(ids.tolist(), self.lookahead)
        kept = best_neighbourhoods(votes.scores, self.stays(len(ids)), self.window, self.kernel_size)
        return Chosen(kept, Drafted(self.draft, self.lookahead, written))


@register(
    "speckv_pc",
    family="prompt_compression",
    unit="prompt_token",
    moment="before_prompt",
    paper="2506.08373",
    summary="SpecPC, then SpecKV on what is left, with one draft for both; one sequence at a time",
    needs_draft=True,
)
@dataclass(frozen=True)
class SpecKVPC(SpecKV):
    """SpecPC, then SpecKV. See the module.

    Attributes:
        prompt_keep: the share of the prompt's tokens that is read, or (int) how many tokens (2048); `keep` is what of
            the whole prompt stays stored, and no more than what is read.
        prompt_window, prompt_kernel_size, first_layer: `window`, `kernel_size`, `first_layer` of SpecPC.
    """

    prompt_keep: int | float = 2048
    prompt_window: int = 64
    prompt_kernel_size: int = 32
    first_layer: int = 0

    def __post_init__(self) -> None:
        require(self.lookahead >= 1, "lookahead", self.lookahead, "a number of tokens >= 1")
        super().__post_init__()
        Budget.parse(self.prompt_keep)
        if self.prompt is not None:
            raise MethodRefusedError(self.label, "drops prompt tokens by itself", "use SpecKV(..., prompt=...)")
        self._shortening()

    def _shortening(self) -> SpecPC:
        """The first half, which drafts for the second as well."""
        return SpecPC(
            self.prompt_keep, self.draft, self.lookahead, self.prompt_window, self.prompt_kernel_size,
            self.first_layer, min_prompt=self.min_prompt,
        )  # fmt: skip

    @property
    def shortening(self) -> PromptDropper | None:
        """See `Method.shortening`."""
        return self._shortening().shortening


class Votes:
    """An attention hook that keeps, for every token of a prompt, the most weighted attention that is paid to it.

    Attributes:
        scores: (n,) float32, on the CPU once asked for.
    """

    def __init__(self, tokens: int, window: int, first_layer: int) -> None:
        self._tokens, self._window, self._first_layer = tokens, min(window, tokens), first_layer
        self._best: dict[torch.device, Tensor] = {}  # layers may lie on several devices

    def __call__(self, call: AttentionCall, attend: Attend) -> Tensor:
        """Look at the last rows of the prompt, and at all rows after it."""
        gone = -int(call.starts()[0])  # tokens that a sliding window has dropped
        if call.layer >= self._first_layer and gone < self._tokens:
            self._count(call, gone)
        return attend(call)

    def _count(self, call: AttentionCall, gone: int) -> None:
        first = gone + call.first  # position of the first row
        start = self._tokens - self._window  # of the window
        device = call.keys.device
        best = self._best.setdefault(device, torch.zeros(self._tokens, device=device))
        columns = slice(gone, min(gone + call.keys.shape[2], self._tokens))
        for rows, attention in row_tiles(call, max(start - first, 0)):
            positions = torch.arange(first + rows.start, first + rows.stop, device=device)
            weights = ((positions - start + 1) / self._window).clamp_max(1.0)
            found = (attention[0].float() * weights[:, None]).amax((0, 1))[: columns.stop - gone]
            best[columns] = torch.maximum(best[columns], found)

    @property
    def scores(self) -> Tensor:
        """See the class."""
        return torch.stack([best.cpu() for best in self._best.values()]).amax(0)


def best_neighbourhoods(scores: Tensor, count: int, window: int, kernel_size: int) -> Tensor:
    """The `count` indices that stay of (n,) scores, sorted: the last `window`, then the best with their neighbours."""
    tokens = len(scores)
    before, after = (kernel_size - 1) // 2, kernel_size // 2
    pooled = F.max_pool1d(F.pad(scores, (before, after), value=-torch.inf)[None], kernel_size, 1)[0]
    by_score = scores.sort(descending=True, stable=True).indices
    order = by_score[pooled[by_score].sort(descending=True, stable=True).indices][:count]
    steps = torch.arange(-before, after + 1)
    steps = steps[(2 * steps.abs() + (steps > 0)).sort(stable=True).indices]  # 0, -1, 1, -2, ...
    near = (order[:, None] + steps).flatten()
    inside = (near >= 0) & (near < tokens)
    turn = torch.full((tokens,), len(near)).scatter_reduce(0, near[inside], inside.nonzero()[:, 0], "amin")
    recent = torch.arange(max(tokens - window, 0), tokens)
    turn[recent] = -recent  # before all others, the most recent first
    return turn.sort(stable=True).indices[:count].sort().values
