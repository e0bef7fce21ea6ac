"""Activation patching: run the corrupt prompt with one activation of the clean one, and see what comes back.

Ranks: head, or (layer, position, kind). The metric m is 0 for the corrupt prompt and 1 for the clean one (see
`measures.patching`); a site's score is m with that site alone replaced by its value in the clean run. In the form of
Vig et al. 2020 and of Wang et al. 2022 (arXiv:2211.00593).

Cost: one forward per site, from the site's layer on: what comes before is the corrupt run's and is not computed
again. Sites of a layer share a batch, and only the last position's logits are computed.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, MeanScorer, Measured, Run, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens, Site
from sparing.core.samples import PairSample
from sparing.errors import require
from sparing.measures.patching import Metric, Recorded, check_pair, groups, only_sample, record

HeadSite = Literal["output", "query", "key", "value"]
KINDS: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")
# Rows of a batch: one site each.
SITES_AT_ONCE = 16


@register_scorer("activation_patching", family="causal", data="pair", paper="2211.00593",
                 summary="what the clean output of the head alone brings back in the corrupt prompt")  # fmt: skip
@dataclass(frozen=True)
class ActivationPatching(MeanScorer):
    """Patch one head at a time.

    Attributes:
        site: "output" (before the output projection), or "query", "key", "value" as the attention gets them, rotated.
            A key or value is that of the head's KV head, so heads of one group score alike.
        positions: "all", or "last" (the last position only).
    """

    site: HeadSite = "output"
    positions: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        require(self.site in get_args(HeadSite), "site", self.site, ", ".join(get_args(HeadSite)))
        require(self.positions in ("all", "last"), "positions", self.positions, '"all" or "last"')

    def observe(self, lens: Lens, batch: Sequence[PairSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        return torch.stack([self._one(lens, sample) for sample in batch])

    def _one(self, lens: Lens, sample: PairSample) -> Tensor:
        check_pair(sample)
        calls: dict[int, AttentionCall] = {}

        def keep(call: AttentionCall, attend: Attend) -> Tensor:
            calls[call.layer] = call
            return attend(call)

        with nullcontext() if self.site == "output" else lens.hooked(attention=keep):
            clean = record(lens, sample.clean)
        clean_calls = dict(calls)
        corrupt = record(lens, sample.corrupt)
        metric = Metric.of(sample, clean.logits, corrupt.logits)
        per_kv_head = self.site in ("key", "value")
        found = torch.zeros(lens.num_layers, lens.num_kv_heads if per_kv_head else lens.num_heads)
        with torch.no_grad():
            for layer in range(lens.num_layers):
                for heads in groups(found.shape[1], SITES_AT_ONCE):
                    residual = corrupt.residual[layer].expand(len(heads), -1, -1)
                    with self._patched(lens, layer, heads, clean, clean_calls):
                        found[layer, heads] = metric(lens.forward_from(layer, residual, last=1)[:, -1]).float().cpu()
        return found.repeat_interleave(lens.num_heads // found.shape[1], dim=1)

    def _patched(
        self, lens: Lens, layer: int, heads: list[int], clean: Recorded, calls: dict[int, AttentionCall]
    ) -> AbstractContextManager[None]:
        """A block in which row i of the batch has the clean activation of heads[i]."""
        rows = torch.arange(len(heads))
        where = slice(None) if self.positions == "all" else slice(-1, None)
        if self.site == "output":

            def on_heads(at: int, z: Tensor) -> Tensor | None:
                if at != layer:
                    return None
                new = z.clone()
                for row, head in enumerate(heads):
                    new[row, where, head] = clean.heads[layer][0, where, head]
                return new

            return lens.hooked(heads=on_heads)
        name = {"query": "queries", "key": "keys", "value": "values"}[self.site]

        def on_attention(call: AttentionCall, attend: Attend) -> Tensor:
            if call.layer != layer:
                return attend(call)
            new = getattr(call, name).clone()
            new[rows, heads, where] = getattr(calls[layer], name)[0, heads, where]
            return attend(replace(call, **{name: new}))

        return lens.hooked(attention=on_attention)


@register_scorer("residual_patching", family="causal", data="pair", paper="2211.00593",
                 axes=("layer", "position", "kind"),
                 summary="what one clean place of the residual stream brings back")  # fmt: skip
@dataclass(frozen=True)
class ResidualPatching(HeadScorer):
    """Patch one place of the residual stream at a time: kinds resid_pre, attn_out and mlp_out of every layer.

    Needs exactly one sample. Positions before the first changed token are the same in both prompts and score 0.
    """

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`."""
        sample = only_sample(run.samples)
        check_pair(sample)
        clean, corrupt = (record(lens, ids, KINDS) for ids in (sample.clean, sample.corrupt))
        metric = Metric.of(sample, clean.logits, corrupt.logits)
        length, first = len(sample.clean), min(sample.changed)
        found = torch.zeros(lens.num_layers, length, len(KINDS))
        with torch.no_grad():
            for layer in range(lens.num_layers):
                for kind, site in enumerate(KINDS):
                    for group in groups(length - first, SITES_AT_ONCE):
                        places = [first + i for i in group]
                        logits = _with_place(lens, layer, site, places, clean, corrupt)
                        found[layer, places, kind] = metric(logits).float().cpu()
                run.progress(layer + 1, lens.num_layers, "layers")
        return Measured(found, 1, labels=position_labels(lens, sample.clean) | {"kind": tuple(KINDS)})


def _with_place(lens: Lens, layer: int, site: Site, places: list[int], clean: Recorded, corrupt: Recorded) -> Tensor:
    """(rows, V) last logits, row i with the clean value of the site at places[i]."""
    rows = torch.arange(len(places))
    residual = corrupt.residual[layer].expand(len(places), -1, -1)

    def patched(current: Tensor) -> Tensor:
        new = current.clone()
        new[rows, places] = clean.sites[site][layer][0, places]
        return new

    if site == "resid_pre":
        return lens.forward_from(layer, patched(residual), last=1)[:, -1]
    with lens.hooked(sites={site: lambda at, x: patched(x) if at == layer else None}):
        return lens.forward_from(layer, residual, last=1)[:, -1]


def position_labels(lens: Lens, ids: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """The tokens' texts along the position axis, where there is a tokenizer."""
    if lens.tokenizer is None:
        return {}
    return {"position": tuple(lens.tokenizer.decode([token]) for token in ids)}
