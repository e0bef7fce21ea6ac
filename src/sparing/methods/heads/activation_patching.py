"""Activation patching: run the corrupt prompt with one activation of the clean one, and see what comes back.

Ranks: head, or (layer, position, kind). The metric m is 0 for the corrupt prompt and 1 for the clean one (see
`measures.patching`); a site's score is m with that site alone replaced by its value in the clean run. In the form of
Vig et al. 2020 and of Wang et al. 2022 (arXiv:2211.00593).

Cost: one forward per site, from the site's layer on: what comes before is the corrupt run's and is not computed
again. Nor are the tokens before the first one that is changed: they are in a cache. Sites of a layer share a batch,
only the last position's logits are computed, and of the heads' clean run one layer is held at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, MeanScorer, Measured, Run, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens, Site
from sparing.core.samples import PairSample
from sparing.errors import require
from sparing.measures.patching import Metric, Recorded, Step, behind_common_start, groups, only_sample, record, walk

HeadSite = Literal["output", "query", "key", "value"]
KINDS: tuple[Site, ...] = ("resid_pre", "attn_out", "mlp_out")
# Tokens of a batch, whose rows have a site each: what keeps a GPU or a CPU busy. More would only take memory.
TOKENS_AT_ONCE, TOKENS_ON_CPU = 8192, 512


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
        sample, cache = behind_common_start(lens, sample)
        prompts = (sample.clean, sample.corrupt)
        with torch.no_grad():
            logits = (lens.forward(torch.tensor([ids]), last=1, cache=cache)[0, -1] for ids in prompts)
            metric = Metric.of(sample, *logits)
            per_kv_head = self.site in ("key", "value")
            found = torch.zeros(lens.num_layers, lens.num_kv_heads if per_kv_head else lens.num_heads)
            both = (walk(lens, ids, cache, calls=self.site != "output") for ids in prompts)
            for layer, (clean, corrupt) in enumerate(zip(*both, strict=True)):
                for heads in groups(found.shape[1], sites_at_once(lens, sample)):
                    residual = corrupt.residual.expand(len(heads), -1, -1)
                    with self._patched(lens, layer, heads, clean):
                        patched = lens.forward_from(layer, residual, last=1, cache=cache)[:, -1]
                    found[layer, heads] = metric(patched).float().cpu()
        return found.repeat_interleave(lens.num_heads // found.shape[1], dim=1)

    def _patched(self, lens: Lens, layer: int, heads: list[int], clean: Step) -> AbstractContextManager[None]:
        """A block in which row i of the batch has the clean activation of heads[i]."""
        rows = torch.arange(len(heads))
        where = slice(None) if self.positions == "all" else slice(-1, None)
        if clean.call is None:

            def on_heads(at: int, z: Tensor) -> Tensor | None:
                if at != layer:
                    return None
                new = z.clone()
                for row, head in enumerate(heads):
                    new[row, where, head] = clean.heads[0, where, head]
                return new

            return lens.hooked(heads=on_heads)
        name = {"query": "queries", "key": "keys", "value": "values"}[self.site]
        source: Tensor = getattr(clean.call, name)

        def on_attention(call: AttentionCall, attend: Attend) -> Tensor:
            if call.layer != layer:
                return attend(call)
            new = getattr(call, name).clone()
            new[rows, heads, where] = source[0, heads, where]
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
        whole = only_sample(run.samples)
        sample, cache = behind_common_start(lens, whole)
        clean, corrupt = (record(lens, ids, KINDS, cache) for ids in (sample.clean, sample.corrupt))
        metric = Metric.of(sample, clean.logits, corrupt.logits)
        length, first = len(sample.clean), min(sample.changed)
        found = torch.zeros(lens.num_layers, len(whole.clean), len(KINDS))
        ending = found[:, len(whole.clean) - length :]
        with torch.no_grad():
            for layer in range(lens.num_layers):
                for kind, site in enumerate(KINDS):
                    for group in groups(length - first, sites_at_once(lens, sample)):
                        places = [first + i for i in group]
                        logits = _with_place(lens, layer, site, places, clean, corrupt, cache)
                        ending[layer, places, kind] = metric(logits).float().cpu()
                run.progress(layer + 1, lens.num_layers, "layers")
        return Measured(found, 1, labels=position_labels(lens, whole.clean) | {"kind": tuple(KINDS)})


def sites_at_once(lens: Lens, sample: PairSample) -> int:
    """How many rows a batch has."""
    tokens = TOKENS_ON_CPU if lens.device.type == "cpu" else TOKENS_AT_ONCE
    return max(1, tokens // len(sample.clean))


def _with_place(
    lens: Lens, layer: int, site: Site, places: list[int], clean: Recorded, corrupt: Recorded, cache: Any
) -> Tensor:
    """(rows, V) last logits, row i with the clean value of the site at places[i]."""
    rows = torch.arange(len(places))
    residual = corrupt.residual[layer].expand(len(places), -1, -1)

    def patched(current: Tensor) -> Tensor:
        new = current.clone()
        new[rows, places] = clean.sites[site][layer][0, places]
        return new

    if site == "resid_pre":
        return lens.forward_from(layer, patched(residual), last=1, cache=cache)[:, -1]
    with lens.hooked(sites={site: lambda at, x: patched(x) if at == layer else None}):
        return lens.forward_from(layer, residual, last=1, cache=cache)[:, -1]


def position_labels(lens: Lens, ids: Sequence[int]) -> dict[str, tuple[str, ...]]:
    """The tokens' texts along the position axis, where there is a tokenizer."""
    if lens.tokenizer is None:
        return {}
    return {"position": tuple(lens.tokenizer.decode([token]) for token in ids)}
