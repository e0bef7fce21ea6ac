"""WAAD and FAI: where a text hands over, and what it comes back to (Li et al. 2025, arXiv:2510.13554).

Ranks: position. With Ā_loc and Ā_glob the mean maps of the local and global heads (see `span`), R the response rows:

    WAAD[t] = Σ_s Ā_loc[t, s] · min(t - s, W)                        how far back local heads look, W ↔ window = 10
    FAI[s]  = mean over t in T(s) of Ā_glob[t, s]                    how much later tokens come back to s
    T(s) = { t in R : s + 10 <= t <= min(N, s + 50) } ↔ near, far;   nan where T(s) is empty

Layers ↔ layers: "middle" takes 5 evenly spaced ones in the middle third, as for training; "all" takes every layer.
Cost: two forwards; O(1) numbers per row, and a banded column sum.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sparing.core.edits import Head
from sparing.core.head_scorer import HeadScorer, Measured, Run, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.errors import InvalidInputError, require
from sparing.measures.attention import row_tiles
from sparing.measures.batches import pad_left
from sparing.measures.heads import distances, mean_distance, row_mean
from sparing.measures.watching import watch_rows

KINDS = ("waad", "fai")
MIDDLE_LAYERS = 5


@register_scorer("waad_fai", family="attention", data="text", paper="2510.13554", axes=("kind", "position"),
                 summary="where local heads reach back, and what global heads come back to")  # fmt: skip
@dataclass(frozen=True)
class WaadFai(HeadScorer):
    """Timelines of one text. Needs exactly one sample.

    Attributes:
        window: W, distances count up to so many tokens (10). near, far: the band of later rows (10, 50).
        share: of the heads that are local, and that are global (0.3). layers: "middle" or "all".
    """

    window: int = 10
    near: int = 10
    far: int = 50
    share: float = 0.3
    layers: Literal["middle", "all"] = "middle"

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "a number of tokens >= 1")
        require(1 <= self.near <= self.far, "near, far", (self.near, self.far), "1 <= near <= far")
        require(0 < self.share <= 0.5, "share", self.share, "a share in (0, 0.5]")
        require(self.layers in ("middle", "all"), "layers", self.layers, '"middle" or "all"')

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`; the extras hold the groups as (layer, head) rows."""
        if len(run.samples) != 1:
            raise InvalidInputError("samples", len(run.samples), "exactly 1 text", "pass samples=1")
        sample: TextSample = run.samples[0]
        ids, mask = pad_left([sample.ids])
        local, far_looking = self._groups(lens, sample, ids, mask)
        timelines = self._timelines(lens, sample, ids, local, far_looking)
        labels: dict[str, tuple[str, ...]] = {"kind": KINDS}
        if lens.tokenizer is not None:
            labels["position"] = tuple(lens.tokenizer.decode([token]) for token in sample.ids)
        groups = {"local_heads": torch.tensor(local), "global_heads": torch.tensor(far_looking)}
        return Measured(timelines, 1, labels=labels, extras=groups)

    def _groups(self, lens: Lens, sample: TextSample, ids: Tensor, mask: Tensor) -> tuple[list[Head], list[Head]]:
        """Local and global heads of this text, among the layers that are looked at."""
        rows = torch.arange(ids.shape[1])[None] >= sample.response
        spans = watch_rows(lens, ids, mask, mean_distance)
        mean = torch.stack([row_mean(layer, rows)[0] for layer in spans])
        looked_at = chosen_layers(lens.num_layers) if self.layers == "middle" else list(range(lens.num_layers))
        heads = [(layer, head) for layer in looked_at for head in range(lens.num_heads)]
        heads.sort(key=lambda head: float(mean[head]))
        count = max(1, int(self.share * len(heads) + 1e-9))
        return heads[:count], heads[-count:]

    def _timelines(
        self, lens: Lens, sample: TextSample, ids: Tensor, local: list[Head], far_looking: list[Head]
    ) -> Tensor:
        """(2, T): WAAD and FAI."""
        length = ids.shape[1]
        waad, received = torch.zeros(length), torch.zeros(length)

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            near = [head for layer, head in local if layer == call.layer]
            wide = [head for layer, head in far_looking if layer == call.layer]
            for rows, attention in row_tiles(call):
                if near:
                    clipped = mean_distance(call, rows, attention[:, near], self.window)
                    waad[rows] += clipped[0].sum(0).float().cpu()
                if wide:
                    distance = distances(call, rows)
                    counts = (distance >= self.near) & (distance <= self.far)
                    counts[: max(sample.response - rows.start, 0)] = False
                    received.add_((attention[0, wide].sum(0) * counts).sum(0).float().cpu())
            return attend(call)

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(ids, last=1)
        at = torch.arange(length)
        first = (at + self.near).clamp_min(sample.response)
        viewers = ((at + self.far).clamp_max(length - 1) - first + 1).clamp_min(0)
        fai = torch.where(viewers > 0, received / len(far_looking) / viewers.clamp_min(1), torch.nan)
        waad = (waad / len(local)).masked_fill(at < sample.response, torch.nan)
        return torch.stack([waad, fai])


def chosen_layers(num_layers: int) -> list[int]:
    """Five evenly spaced layers in [⌊L/3⌋, ⌊2L/3⌋], or all of these where there are fewer."""
    low, high = num_layers // 3, 2 * num_layers // 3
    return sorted({round(x) for x in torch.linspace(low, high, MIDDLE_LAYERS).tolist()})


@dataclass(frozen=True)
class Credit:
    """What tokens are worth in training, by their timelines.

    Attributes:
        share: of the tokens with the largest change of WAAD, and with the largest FAI, that count (0.4).
        bonus: what such a token gets on top of 1 (0.5).
        alpha: the part of an anchor's bonus that its introducing token gets instead (0.5). reach: how many tokens
            before an anchor one is looked for (3).
    """

    share: float = 0.4
    bonus: float = 0.5
    alpha: float = 0.5
    reach: int = 3

    def weights(self, waad: Tensor, fai: Tensor) -> dict[str, Tensor]:
        """γ per token, (T,) each: by local changes, by global influence, and coupled.

            Δ_t = |WAAD_t - WAAD_{t+1}|;  T_loc = top share of Δ, T_glob = top share of FAI
            local:   1 + bonus where t in T_loc;   global: 1 + bonus where t in T_glob
            coupled: as global, but an anchor t in T_glob whose WAAD is at most the median, with a change in T_loc
                     among the `reach` tokens before it, gives α of its bonus to the largest of these changes

        The paper leaves the thresholds of the coupled form open; the median and T_loc are our choice. nan never counts.
        """
        change = (waad[:-1] - waad[1:]).abs()
        change = torch.cat([change, change.new_zeros(1)]).nan_to_num(-1.0)
        is_local, is_global = (self._top(x) for x in (change, fai.nan_to_num(-1.0)))
        coupled = 1 + self.bonus * is_global.float()
        calm = waad <= waad[~waad.isnan()].median()
        for t in is_global.nonzero().flatten().tolist():
            before = [u for u in range(max(0, t - self.reach), t) if bool(is_local[u])]
            if before and bool(calm[t]):
                intro = max(before, key=lambda u: float(change[u]))
                coupled[t] -= self.alpha * self.bonus
                coupled[intro] += self.alpha * self.bonus
        return {"local": 1 + self.bonus * is_local.float(), "global": 1 + self.bonus * is_global.float(),
                "coupled": coupled}  # fmt: skip

    def _top(self, values: Tensor) -> Tensor:
        """(T,) bool: the top share, of the values that count."""
        count = max(1, int(self.share * int((values >= 0).sum())))
        chosen = torch.zeros_like(values, dtype=torch.bool)
        chosen[torch.sort(values, descending=True, stable=True).indices[:count]] = True
        return chosen
