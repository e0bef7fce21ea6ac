"""Mean output gate: how open a head's gate is, in models that gate what heads say (e.g. Qwen3-Next).

Ranks: head. Between attention and output projection such a model multiplies each head's output z by a gate g in (0, 1):

    score[h] = Σ_t <z'_t, z_t> / Σ_t <z_t, z_t>,   z' = g ⊙ z

the mean gate, weighted by how much passes through it. Found from outside, as the ratio of what goes into the output
projection to what the attention gave, so no model is known by name. Cost: one forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import MeanScorer, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.errors import UnsupportedModelError
from sparing.measures.batches import pad_left


@register_scorer("output_gate", family="attention", data="text", paper="2505.06708",
                 summary="how open the gate on the head's output is, where the model has one")  # fmt: skip
@dataclass(frozen=True)
class OutputGate(MeanScorer):
    """Mean gate, weighted by what passes.

    Raises (when measuring):
        UnsupportedModelError: what attention gives goes into the output projection as it is.
    """

    def observe(self, lens: Lens, batch: Sequence[TextSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        ids, mask = pad_left([sample.ids for sample in batch])
        before: dict[int, Tensor] = {}
        found = torch.ones(len(batch), lens.num_layers, lens.num_heads)
        has_gate = False

        def keep(call: AttentionCall, attend: Attend) -> Tensor:
            before[call.layer] = attend(call)
            return before[call.layer]

        def compare(layer: int, after: Tensor) -> None:
            nonlocal has_gate
            plain = before.pop(layer)
            if not torch.equal(plain, after):
                has_gate = True
            real = mask.to(after.device)[:, :, None, None]
            passed, given = ((x.float() * plain.float() * real).sum((1, 3)) for x in (after, plain))
            found[:, layer] = (passed / given).cpu()

        with torch.no_grad(), lens.hooked(attention=keep, heads=compare):
            lens.forward(ids, mask, last=1)
        if not has_gate:
            problem = "has no gate between attention and output projection"
            raise UnsupportedModelError(lens.identity.architecture, problem, "use another scorer")
        return found
