"""Attribution patching: activation patching to first order, for all sites at once (Nanda 2023; arXiv:2310.10348).

Ranks: head, or (layer, position, kind). With m the metric of `measures.patching`,

    score(site) = Σ (a_clean - a_corrupt) · ∂m/∂a at the corrupt run,  over positions and components of the site

Cost: two forwards and one backward over the tokens from the first changed one on, whatever the number of sites.
Exact where m is linear in the site; elsewhere an estimate, to be checked on the best sites with `activation_patching`.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, MeanScorer, Measured, Run, register_scorer
from sparing.core.lens import Lens, Site, SiteHook
from sparing.core.samples import PairSample
from sparing.measures.optimise import frozen
from sparing.measures.patching import Metric, behind_common_start, only_sample
from sparing.methods.heads.activation_patching import KINDS, position_labels


@dataclass(frozen=True)
class Gradients:
    """What both runs give: per layer the differences a_clean - a_corrupt, and ∂m/∂a of the corrupt run.

    heads: (1, T, Hq, Dv) each; sites: by site, (1, T, E) each, of the last T tokens: all from the first changed one on.
    before: how many tokens come before these. There is no difference there.
    """

    head_differences: list[Tensor]
    head_gradients: list[Tensor]
    site_differences: dict[Site, list[Tensor]]
    site_gradients: dict[Site, list[Tensor]]
    before: int


def gradients(
    lens: Lens, sample: PairSample, sites: Sequence[Site] = (), rules: AbstractContextManager[None] | None = None
) -> Gradients:
    """Run clean, then corrupt with gradients (by other rules, if given)."""
    length = len(sample.clean)
    sample, cache = behind_common_start(lens, sample)
    clean, corrupt = _Capture(), _Capture(with_gradient=True)
    with torch.no_grad(), clean.at_work(lens, sites):
        clean_logits = lens.forward(torch.tensor([list(sample.clean)]), last=1, cache=cache)[0, -1]
    with frozen(lens.model), torch.enable_grad(), rules or nullcontext(), corrupt.at_work(lens, sites):
        logits = lens.forward(torch.tensor([list(sample.corrupt)]), last=1, cache=cache)[0, -1]
        m = Metric.of(sample, clean_logits, logits.detach())(logits)
        wanted = [*corrupt.heads.values(), *(x for found in corrupt.sites.values() for x in found.values())]
        found = iter(torch.autograd.grad(m, wanted))
    numbers = range(lens.num_layers)
    head_gradients = [next(found) for _ in numbers]
    site_gradients = {site: [next(found) for _ in numbers] for site in sites}
    with torch.no_grad():
        return Gradients(
            [clean.heads[i] - corrupt.heads[i].detach() for i in numbers],
            head_gradients,
            {site: [clean.sites[site][i] - corrupt.sites[site][i].detach() for i in numbers] for site in sites},
            site_gradients,
            length - len(sample.clean),
        )


class _Capture:
    """Keeps the heads' outputs and sites of one forward; with gradients, from the first block's input on."""

    def __init__(self, with_gradient: bool = False) -> None:
        self.with_gradient = with_gradient
        self.heads: dict[int, Tensor] = {}
        self.sites: dict[Site, dict[int, Tensor]] = {}

    def at_work(self, lens: Lens, sites: Sequence[Site]) -> AbstractContextManager[None]:
        self.sites = {site: {} for site in sites}
        hooks: dict[Site, SiteHook] = {site: self._keeper(self.sites[site]) for site in sites}
        if self.with_gradient and "resid_pre" not in hooks:
            hooks["resid_pre"] = self._first_leaf
        return lens.hooked(heads=self._keeper(self.heads), sites=hooks)

    def _keeper(self, found: dict[int, Tensor]) -> SiteHook:
        def hook(layer: int, x: Tensor) -> Tensor | None:
            if self.with_gradient and not x.requires_grad:
                x = x.detach().requires_grad_()
            found[layer] = x
            return x if self.with_gradient else None

        return hook

    def _first_leaf(self, layer: int, x: Tensor) -> Tensor | None:
        """With all parameters frozen, gradients have to begin somewhere."""
        return None if x.requires_grad else x.detach().requires_grad_()


@register_scorer("attribution_patching", family="causal", data="pair", paper="2310.10348",
                 summary="activation patching to first order, all heads at once")  # fmt: skip
@dataclass(frozen=True)
class AttributionPatching(MeanScorer):
    """First-order effect of each head's clean output."""

    def observe(self, lens: Lens, batch: Sequence[PairSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        return torch.stack([head_effects(gradients(lens, sample)) for sample in batch])


@register_scorer("residual_attribution", family="causal", data="pair", paper="2310.10348",
                 axes=("layer", "position", "kind"),
                 summary="residual patching to first order, all places at once")  # fmt: skip
@dataclass(frozen=True)
class ResidualAttribution(HeadScorer):
    """First-order effect of resid_pre, attn_out and mlp_out at every layer and position. Needs exactly one sample."""

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`."""
        sample = only_sample(run.samples)
        found = gradients(lens, sample, KINDS)
        return Measured(site_effects(found), 1, labels=position_labels(lens, sample.clean) | {"kind": tuple(KINDS)})


def head_effects(found: Gradients) -> Tensor:
    """(L, Hq) float32."""
    pairs = zip(found.head_differences, found.head_gradients, strict=True)
    return torch.stack([(difference * gradient).sum((0, 1, 3)).float().cpu() for difference, gradient in pairs])


def site_effects(found: Gradients) -> Tensor:
    """(L, T, kinds) float32."""
    kinds = []
    for site in KINDS:
        pairs = zip(found.site_differences[site], found.site_gradients[site], strict=True)
        kinds.append(torch.stack([(difference * gradient).sum(-1)[0].float().cpu() for difference, gradient in pairs]))
    effects = torch.stack(kinds, dim=-1)
    return torch.cat([effects.new_zeros(len(effects), found.before, len(KINDS)), effects], dim=1)
