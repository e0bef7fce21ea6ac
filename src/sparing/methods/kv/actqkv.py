"""ActQKV: blocks fetched by a probe of the unusual queries, layers paid by their density (Xiao et al. 2025).

arXiv:2502.13542. Ranks: blocks of S tokens per KV head, for every decoded token anew. Nothing is dropped: it saves
reading, not memory. With the queries q_i of the last W tokens, before rotation, per query head:

    b_i = mean over channels c of (q_ic − mean_c)² / var_c        Activation Bias: large for anchor tokens
    probe = Σ_i softmax(b)_i q_i
    score of a block = probe · mean of its keys before rotation

W ↔ window; S ↔ block. The first block, the last full one and the newest are always read, then the best. How much a
layer reads is set at the prompt's end: in proportion to the normalised entropy of softmax(scores) over its blocks (the
information density), at least one block per head, the same in total whatever the densities.

Cost: one vector per block and W queries beside the cache; N/S dot products per step; one rotation of each key.

Deviations (what the paper does at each window of a long prefill is done here at each decoded token):
1. The window slides over what was decoded; at first it is the end of the prompt. W and S are ours, not the authors'.
2. b is softmaxed over the window to weigh it; keys of a block are averaged, not only representative ones.
3. Densities are measured at the prompt's end, over tokens (each with its block's share), and hold until the next turn.
4. Tokens are read at their own positions. Query heads of a group share their blocks, by the mean score.
5. `keep` is honoured to the token: of a block that fits in part, the newest tokens are read.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.budget import round_to_total
from sparing.core.method import Method, Parts, register
from sparing.core.reader import Choice, Reader, Step, best_blocks, num_blocks, with_ends
from sparing.core.scorer import KeyValues, Queries
from sparing.core.token_scores import TokenScores
from sparing.errors import require


@dataclass(frozen=True)
class ProbeQuery(Reader):
    """Reads the blocks whose mean key answers the anchors among the newest queries.

    Its state: `window` (B, Hq, w, D), the newest queries before rotation; once needed `sums` (B, H, blocks, D) of keys
    before rotation and `covered` (B,), the slots that they are of.

    Attributes:
        window: queries behind the probe. block: tokens per block.
    """

    window: int = 32
    block: int = 32

    needs_rotary: ClassVar[bool] = True

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "a number of tokens >= 1")
        require(self.block >= 1, "block", self.block, "a number of tokens >= 1")

    def observe(self, state: Any, queries: Queries, stored: KeyValues) -> Any:
        """See `Reader.observe`."""
        new = queries.states[:, :, -self.window :]
        places = (queries.positions[-self.window :] - stored.pads[:, None]).clamp_min(0)
        new = new.float() if stored.rotary is None else stored.rotary.unrotate(new.float(), places)
        window = new if state is None else torch.cat([state["window"], new], dim=2)
        return {**(state or {}), "window": window[:, :, -self.window :].clone()}

    def score(self, state: Any, stored: KeyValues) -> Tensor:
        """Attention of the probe to every block, spread evenly over its tokens; sums to 1 per head."""
        tokens, size = stored.keys.shape[2], self.block
        logits = self._scores(self._covering(state, stored), stored) * stored.keys.shape[-1] ** -0.5
        lengths = self._lengths(stored, logits.shape[-1])
        mass = logits.masked_fill(lengths == 0, -torch.inf).softmax(-1) / lengths.clamp_min(1)
        places = (torch.arange(tokens, device=logits.device) - stored.pads[:, None]).clamp_min(0) // size
        return mass.gather(2, places[:, None].expand(-1, mass.shape[1], -1)).masked_fill(~stored.valid, 0.0)

    def choose(self, state: Any, step: Step) -> tuple[Any, Choice]:
        """See `Reader.choose`."""
        stored, newest = step.stored, step.stored.positions[0, 0, -1:]
        real = torch.ones(step.query.shape[0], 1, dtype=torch.bool, device=step.query.device)
        state = self.observe(state, Queries(step.query[:, :, None], newest, real, step.softmax), stored)
        state = self._covering(state, stored)
        if step.reads_all:
            return state, Choice(None)
        return state, best_blocks(with_ends(self._scores(state, stored), self.block, stored), self.block, step)

    def crop(self, state: Any, tokens: int) -> Any:
        """See `Reader.crop`: the window is left as far as it reaches."""
        gone = int(state["covered"][0]) - tokens if "covered" in state else 0
        left = state["window"].shape[2] - gone
        return {"window": state["window"][:, :, :left].clone()} if left > 0 else None

    def _scores(self, state: dict[str, Tensor], stored: KeyValues) -> Tensor:
        """(B, H, blocks)."""
        heads, lengths = stored.keys.shape[1], self._lengths(stored, state["sums"].shape[2])
        means = state["sums"] / lengths[..., None].clamp_min(1)
        count = state["window"].shape[2]
        real = torch.arange(count, 0, -1, device=means.device) <= (stored.keys.shape[2] - stored.pads)[:, None]
        query = probe(state["window"], real).unflatten(1, (heads, -1)).mean(2)
        return (query[:, :, None] * means).sum(-1)

    def _lengths(self, stored: KeyValues, blocks: int) -> Tensor:
        """(B, 1, blocks) tokens in every block."""
        there = (stored.keys.shape[2] - stored.pads)[:, None, None]
        return (there - torch.arange(blocks, device=there.device) * self.block).clamp(0, self.block)

    def _covering(self, state: dict[str, Tensor], stored: KeyValues) -> dict[str, Tensor]:
        """The state, its sums brought up to date with what is stored."""
        rows, heads, tokens, dim = stored.keys.shape
        blocks = int(num_blocks(stored, self.block).max())
        sums = state.get("sums", stored.keys.new_zeros(rows, heads, 0, dim, dtype=torch.float32))
        start = int(state["covered"][0]) if "covered" in state else 0
        places = torch.arange(start, tokens, device=sums.device) - stored.pads[:, None]
        keys = stored.keys[:, :, start:].float()
        if stored.rotary is not None:
            keys = stored.rotary.unrotate(keys, places.clamp_min(0))
        keys = keys.masked_fill((places < 0)[:, None, :, None], 0.0)
        index = (places.clamp_min(0) // self.block)[:, None, :, None].expand_as(keys)
        sums = F.pad(sums, (0, 0, 0, max(blocks - sums.shape[2], 0))).scatter_add(2, index, keys)
        state.update(sums=sums, covered=stored.pads.new_full((rows,), tokens))
        return state


def probe(window: Tensor, real: Tensor) -> Tensor:
    """(B, Hq, D) the mean of the queries of a window, weighted by the softmax of their Activation Bias.

    Args:
        window: (B, Hq, w, D). real: (B, w) bool, False for pads.
    """
    mask = real[:, None, :, None]
    window = window.masked_fill(~mask, 0.0)
    count = mask.sum(2, keepdim=True)
    square = (window - window.sum(2, keepdim=True) / count).masked_fill(~mask, 0.0).square()
    variance = square.sum(2, keepdim=True) / count
    noise = torch.finfo(window.dtype).eps * window.square().amax(2, keepdim=True)
    bias = torch.where(variance > noise, square / variance, 0.0).mean(-1)
    weights = bias.masked_fill(~real[:, None], -torch.inf).softmax(-1)
    return (weights[..., None] * window).sum(2)


@dataclass(frozen=True)
class InformationDensity:
    """Layers in proportion to the normalised entropy of their scores, taken as a distribution over tokens.

    Attributes:
        least: tokens that every head gets, as far as the average allows.
    """

    least: int = 32

    def allocate(self, scores: list[TokenScores], tokens_per_head: list[int]) -> list[Tensor]:
        """See `Allocator.allocate`."""
        heads = [s.values.shape[1] for s in scores]
        rows = []
        for row, tokens in enumerate(tokens_per_head):
            longest = torch.cat([s.valid[row].sum(-1).cpu() for s in scores])
            weights = torch.cat([_density(s, row).mean().expand(s.values.shape[1]) for s in scores])
            total = min(tokens * sum(heads), int(longest.sum()))
            rows.append(round_to_total(weights, total, longest.clamp_max(min(self.least, tokens)), longest))
        return list(torch.stack(rows).split(heads, dim=1))


def _density(scores: TokenScores, row: int) -> Tensor:
    """(kv_heads,) entropy over its largest value, in [0, 1]."""
    valid = scores.valid[row]
    mass = scores.values[row].double().clamp_min(0).masked_fill(~valid, 0.0)
    mass = mass / mass.sum(-1, keepdim=True).clamp_min(1e-300)
    return torch.special.entr(mass).sum(-1) / valid.sum(-1).clamp_min(2).log()


@register(
    "actqkv", paper="2502.13542", summary="reads blocks that a probe of unusual queries asks for; frees no memory"
)
@dataclass(frozen=True)
class ActQKV(Method):
    """A probe of anchor queries, and layer budgets by information density.

    Attributes:
        window: queries behind the probe (32). block: tokens per block (32).
    """

    window: int = 32
    block: int = 32

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts.reading(ProbeQuery(self.window, self.block), InformationDensity(self.block))
