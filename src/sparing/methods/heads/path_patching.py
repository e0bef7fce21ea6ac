"""Path patching: what a head says to the output, or to another head, directly (arXiv:2211.00593, 2304.05969).

Ranks: head (the sender). The clean prompt is run with the sender's output replaced by that of the corrupt prompt,
and everything else that heads say frozen:

| receiver | what is recomputed | score |
|---|---|---|
| the logits | norms, and MLPs unless `mlps="frozen"` | m(clean) - m(patched) = 1 - m(patched) |
| a head's query, key or value | what it gets through norms and MLPs; then a second run with only that | same |

so a head on which the answer depends scores high, and 1 means that all of the answer depends on the path.
With frozen MLPs the path to the logits has a closed form, computed for all heads of a layer at once:

    logits' = readout( r + (z_corrupt - z_clean) W_O^h ),  r = the clean residual stream after the last block

Cost: one forward per head (two for a receiving head); frozen MLPs: one readout per head, no forward.

Deviation: the score is 1 - m, so that higher = matters more; the papers plot m(patched) - m(clean).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import PairSample
from sparing.errors import InvalidInputError, UnsupportedModelError, require
from sparing.measures.patching import Metric, Recorded, check_pair, groups, record

HEADS_AT_ONCE = 16


@register_scorer("path_patching", family="causal", data="pair", paper="2211.00593",
                 summary="how much of the answer depends on what the head says directly to a receiver")  # fmt: skip
@dataclass(frozen=True)
class PathPatching(MeanScorer):
    """Direct effects of heads.

    Attributes:
        receiver: "logits", or a head written "layer.head", e.g. "2.1". into: of a receiving head, its "query", "key"
            or "value". mlps: "recomputed" (paths may lead through MLPs) or "frozen" (only to the logits).
    """

    receiver: str = "logits"
    into: Literal["query", "key", "value"] = "query"
    mlps: Literal["recomputed", "frozen"] = "recomputed"

    def __post_init__(self) -> None:
        require(self.into in ("query", "key", "value"), "into", self.into, "query, key or value")
        require(self.mlps in ("recomputed", "frozen"), "mlps", self.mlps, "recomputed or frozen")
        self._receiving_head()
        both = self.mlps == "frozen" and self.receiver != "logits"
        require(not both, "mlps", self.mlps, "recomputed where a head receives")

    def _receiving_head(self) -> tuple[int, int] | None:
        if self.receiver == "logits":
            return None
        layer, dot, head = self.receiver.partition(".")
        if not dot or not layer.isdigit() or not head.isdigit():
            raise InvalidInputError("receiver", self.receiver, '"logits", or "layer.head" such as "2.1"')
        return int(layer), int(head)

    def observe(self, lens: Lens, batch: Sequence[PairSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        target = self._receiving_head()
        if target is not None and not (target[0] < lens.num_layers and target[1] < lens.num_heads):
            allowed = f"a head below {lens.num_layers}.{lens.num_heads}"
            raise InvalidInputError("receiver", self.receiver, allowed)
        return torch.stack([self._one(lens, sample, target) for sample in batch])

    def _one(self, lens: Lens, sample: PairSample, target: tuple[int, int] | None) -> Tensor:
        check_pair(sample)
        sites = ("attn_out", "mlp_out", "resid_post") if self.mlps == "frozen" else ()
        clean, corrupt = (record(lens, ids, sites) for ids in (sample.clean, sample.corrupt))  # type: ignore[arg-type]
        metric = Metric.of(sample, clean.logits, corrupt.logits)
        found = torch.zeros(lens.num_layers, lens.num_heads)
        with torch.no_grad():
            for layer in range(lens.num_layers):
                if target is not None and layer >= target[0]:
                    break  # a later head says nothing to an earlier one
                for heads in groups(lens.num_heads, HEADS_AT_ONCE):
                    if self.mlps == "frozen":
                        logits = _closed_form(lens, layer, heads, clean, corrupt)
                    elif target is None:
                        logits = others_frozen(lens, layer, heads, clean, corrupt)[:, -1]
                    else:
                        logits = self._through(lens, layer, heads, clean, corrupt, target)
                    found[layer, heads] = 1 - metric(logits).float().cpu()
        return found

    def _through(
        self, lens: Lens, layer: int, heads: list[int], clean: Recorded, corrupt: Recorded, target: tuple[int, int]
    ) -> Tensor:
        """(rows, V) last logits of the clean prompt with the receiver's input as the senders change it."""
        name = {"query": "queries", "key": "keys", "value": "values"}[self.into]
        at = target[1] if self.into == "query" else target[1] // (lens.num_heads // lens.num_kv_heads)
        received: list[Tensor] = []

        def listen(call: AttentionCall, attend: Attend) -> Tensor:
            if call.layer == target[0]:
                received.append(getattr(call, name)[:, at])
            return attend(call)

        with lens.hooked(attention=listen):
            others_frozen(lens, layer, heads, clean, corrupt)

        def tell(call: AttentionCall, attend: Attend) -> Tensor:
            if call.layer != target[0]:
                return attend(call)
            new = getattr(call, name).clone()
            new[:, at] = received[0]
            changed = attend(replace(call, **{name: new}))
            if self.into == "query":
                return changed
            # A key or value is shared by its group, and only the receiver is told.
            out = attend(call).clone()
            out[:, :, target[1]] = changed[:, :, target[1]]
            return out

        with lens.hooked(attention=tell):
            residual = clean.residual[target[0]].expand(len(heads), -1, -1)
            return lens.forward_from(target[0], residual, last=1)[:, -1]


def others_frozen(lens: Lens, layer: int, heads: list[int], clean: Recorded, corrupt: Recorded) -> Tensor:
    """(rows, 1, V) last logits of the clean prompt, row i with the corrupt output of heads[i] and all others clean."""

    def on_heads(at: int, z: Tensor) -> Tensor:
        new = clean.heads[at].expand(len(heads), -1, -1, -1)
        if at == layer:
            new = new.clone()
            for row, head in enumerate(heads):
                new[row, :, head] = corrupt.heads[layer][0, :, head]
        return new

    with lens.hooked(heads=on_heads):
        return lens.forward_from(layer, clean.residual[layer].expand(len(heads), -1, -1), last=1)


def _closed_form(lens: Lens, layer: int, heads: list[int], clean: Recorded, corrupt: Recorded) -> Tensor:
    """(rows, V) last logits when only the readout sees the change.

    Raises:
        UnsupportedModelError: what a block adds is not attention plus MLP (norms behind them, parallel scaling).
    """
    before, after = clean.residual[layer], clean.sites["resid_post"][layer]
    added = clean.sites["attn_out"][layer] + clean.sites["mlp_out"][layer]
    if not torch.allclose(before + added, after, rtol=1e-3, atol=1e-3 * float(after.abs().max())):
        problem = "its blocks do not simply add the outputs of attention and MLP to the residual stream"
        raise UnsupportedModelError(lens.identity.architecture, problem, 'use mlps="recomputed"')
    last = clean.sites["resid_post"][-1][:, -1:]
    difference = (corrupt.heads[layer] - clean.heads[layer])[0, -1, heads]  # (rows, Dv): only the last row is read
    shift = torch.einsum("rd,rde->re", difference, lens.output_weight(layer)[heads])
    return lens.forward_from(lens.num_layers, last + shift[:, None], last=1)[:, -1]
