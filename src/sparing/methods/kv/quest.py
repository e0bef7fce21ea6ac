"""Quest: pages whose bounds promise the largest logits are read (Tang et al. 2024, arXiv:2406.10774).

Ranks: pages of S tokens per KV head, for every decoded token anew. Nothing is dropped: it saves reading, not memory.

    u_p = Σ_c max(q_c · m_pc, q_c · M_pc)  >=  max over the page of q·k
        = Σ_c relu(q)_c · M_pc + min(q, 0)_c · m_pc

m, M: smallest and largest value of every channel among the page's keys, rotated as cached; S ↔ page. The best pages are
read, as many tokens as `keep` allows; the newest page always is.

Cost: 2/S of the keys' bytes beside the cache, 2·N/S dot products per step, and one sort of the pages.

Deviations:
1. `keep` is honoured to the token: of the last page that fits in part, the newest tokens are read.
2. Query heads of a group share their pages: u is summed over the group (the authors repeat the keys).
3. The authors read everything in the first two layers; `dense_layers=2` does so. The default is 0, so that `keep` means
   the same in every layer and method.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.method import Method, Parts, register
from sparing.core.reader import Choice, Reader, Step, best_blocks, num_blocks
from sparing.core.scorer import KeyValues
from sparing.errors import require


@dataclass(frozen=True)
class PageBounds(Reader):
    """Reads the pages with the largest upper bounds.

    Its state: `low` and `high` (B, H, pages, D), and `covered` (B,), the slots that they are of.

    Attributes:
        page: tokens per page. dense_layers: how many layers, from the first, read everything.
    """

    page: int = 16
    dense_layers: int = 0

    def __post_init__(self) -> None:
        require(self.page >= 1, "page", self.page, "a number of tokens >= 1")
        require(self.dense_layers >= 0, "dense_layers", self.dense_layers, "a number of layers >= 0")

    def begin(self, state: Any, stored: KeyValues) -> Any:
        """See `Reader.begin`."""
        return None if stored.layer < self.dense_layers else self._rebuilt(stored)

    def choose(self, state: Any, step: Step) -> tuple[Any, Choice]:
        """See `Reader.choose`."""
        if step.stored.layer < self.dense_layers:
            return None, Choice(None)
        state = self._rebuilt(step.stored) if state is None else self._extended(state, step.stored)
        if step.reads_all:
            return state, Choice(None)
        heads = step.stored.keys.shape[1]
        query = step.query.float().unflatten(1, (heads, -1))
        bounds = query.clamp_min(0) @ state["high"].mT + query.clamp_max(0) @ state["low"].mT
        newest = num_blocks(step.stored, self.page).to(bounds.device) - 1
        scores = bounds.sum(2).scatter(2, newest[:, None, None].expand(-1, heads, 1), torch.inf)
        return state, best_blocks(scores, self.page, step)

    def _rebuilt(self, stored: KeyValues) -> dict[str, Tensor]:
        """The bounds of all pages at once. Pages are counted from a row's first real token."""
        rows, heads, tokens, dim = stored.keys.shape
        keys, pages = stored.keys.float(), int(num_blocks(stored, self.page).max())
        places = torch.arange(tokens, device=keys.device)
        if bool(stored.pads.any()):
            slots = (places + stored.pads[:, None]).clamp_max(tokens - 1)
            keys = keys.gather(2, slots[:, None, :, None].expand(-1, heads, -1, dim))
        real = (places < tokens - stored.pads[:, None])[:, None, :, None]
        shape = (rows, heads, pages, self.page, dim)
        extremes = []
        for empty in (torch.inf, -torch.inf):
            filled = F.pad(keys.masked_fill(~real, empty), (0, 0, 0, pages * self.page - tokens), value=empty)
            parts = filled[:, :, : pages * self.page].reshape(shape)
            extremes.append(parts.amin(3) if empty > 0 else parts.amax(3))
        is_empty = extremes[0] > extremes[1]
        low, high = (bound.masked_fill(is_empty, 0.0) for bound in extremes)
        return {"low": low, "high": high, "covered": stored.pads.new_full((rows,), tokens)}

    def _extended(self, state: dict[str, Tensor], stored: KeyValues) -> dict[str, Tensor]:
        """The bounds with the tokens since the last time."""
        tokens, missing = stored.keys.shape[2], int(num_blocks(stored, self.page).max()) - state["low"].shape[2]
        if missing > 0:
            state = {name: F.pad(b, (0, 0, 0, missing)) if b.dim() == 4 else b for name, b in state.items()}
        for slot in range(int(state["covered"][0]), tokens):
            key, place = stored.keys[:, :, slot : slot + 1].float(), slot - stored.pads
            index = (place // self.page)[:, None, None, None].expand_as(key)
            is_first = (place % self.page == 0)[:, None, None, None]
            for name, join in (("low", torch.minimum), ("high", torch.maximum)):
                state[name].scatter_(2, index, torch.where(is_first, key, join(state[name].gather(2, index), key)))
        state["covered"].fill_(tokens)
        return state


@register("quest", paper="2406.10774", summary="reads the pages with the largest upper bounds; frees no memory")
@dataclass(frozen=True)
class Quest(Method):
    """Query-aware pages.

    Attributes:
        page: tokens per page (16). dense_layers: how many layers, from the first, read everything (the authors: 2).
    """

    page: int = 16
    dense_layers: int = 0

    def parts(self) -> Parts:
        """See `Method.parts`."""
        return Parts.reading(PageBounds(self.page, self.dense_layers))
