"""CriticalKV: what a token's loss would change in the layer's output (Feng et al. 2025, arXiv:2502.03805).

Ranks: kv_token, with any score a[h, j] that is a share of attention. The paper bounds the change of the layer's output
by a term that falls with the sum of a[h, j] · ‖v_j W_O‖₁ over the kept tokens, as long as these hold enough of the
attention: so the value and the output projection count too, and a first stage sees to the attention. Of b tokens:

    stage 1: the ⌊α b⌋ tokens with the largest a[h, j]
    stage 2: of the others, the b - ⌊α b⌋ tokens with the largest (a[h, j] + ε) · mean over the group of ‖v_j W_O^g‖₁
    first_stage ↔ α = 0.5,   epsilon ↔ ε = 0.0001,   W_O^g ↔ the rows of the output projection for query head g

How many tokens each head keeps is decided by a[h, j] alone, so any allocator can be used (the authors' Ada-CriticalKV
does the same). Cost: as the score's, plus one product of the values with the output projection, O(n Dv hidden) per
query head, one head at a time.

Deviations:
1. b are the tokens to choose beside the protected ones. In kvpress the window is a part of the first stage.
2. a is SnapKV's score with average pooling of 5, as in `snapkv`, so that the two can be compared.
3. Where whole tokens are evicted (latent attention) the norm is averaged over all heads.
4. What a model does between attention and output projection (gates, norms) is not looked at.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparing.core.allocate import Uniform
from sparing.core.budget import share_of
from sparing.core.method import Method, Parts, register
from sparing.core.scorer import KeyValues
from sparing.core.wrapper import Wrapper
from sparing.errors import MethodRefusedError, require
from sparing.measures.pooling import over_group
from sparing.methods.kv.snapkv import WindowAttention


def output_norms(stored: KeyValues) -> Tensor:
    """‖v_j W_O‖₁ for every query head: (B, Hq, N) float32, 0 for pads.

    Raises:
        UnsupportedModelError: the layer has no plain output projection.
    """
    if stored.output is None:
        raise MethodRefusedError("OutputWeighted", "needs the output projection of the layer, which is not known here")
    weight = stored.output.weight()
    values = stored.values.float().masked_fill(~stored.valid[..., None], 0.0)
    group = weight.shape[0] // values.shape[1]
    return torch.stack([(values[:, h // group] @ weight[h]).abs().sum(-1) for h in range(weight.shape[0])], dim=1)


@dataclass(frozen=True)
class OutputWeighted(Wrapper):
    """Scores as another scorer, and chooses in two stages, the second by score times output norm.

    Attributes:
        scorer: its scores must be shares of attention, not norms or distances, which cannot be multiplied so.
        first_stage: share of the budget that is chosen by the score alone, in [0, 1].
        epsilon: added to the score before it is multiplied, >= 0.
    """

    first_stage: float = 0.5
    epsilon: float = 1e-4
    needs_output: ClassVar[bool] = True
    refines: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        name = type(self.scorer).__name__
        require(self.scorer.comparable_across_heads, "scorer", name, "a scorer whose scores are shares of attention")
        require(0 <= self.first_stage <= 1, "first_stage", self.first_stage, "a share in [0, 1]")
        require(self.epsilon >= 0, "epsilon", self.epsilon, "a number >= 0")

    def refine(self, values: Tensor, contenders: Tensor, room: Tensor, stored: KeyValues) -> Tensor:
        """See `Scorer.refine`."""
        weighted = (values + self.epsilon) * over_group(output_norms(stored), values.shape[1])
        order = torch.sort(values.masked_fill(~contenders, -torch.inf), dim=-1, descending=True, stable=True).indices
        sure = torch.tensor([share_of(self.first_stage, n) for n in room.flatten().tolist()], device=order.device)
        is_first = torch.arange(order.shape[-1], device=order.device) < sure.view(*room.shape, 1)
        return weighted.masked_fill(torch.zeros_like(contenders).scatter(-1, order, is_first) & contenders, torch.inf)


@register("criticalkv", paper="2502.03805", summary="the tokens whose loss would change the layer's output most")
@dataclass(frozen=True)
class CriticalKV(Method):
    """SnapKV's votes, half of them weighted by what the value does to the output.

    Attributes:
        window: rows that vote, always kept themselves (32).
        kernel_size: odd width of the average over neighbours (5).
        first_stage: share of the budget that is chosen by the votes alone (0.5).
        epsilon: added to a vote before it is weighted (0.0001).
    """

    window: int = 32
    kernel_size: int = 5
    first_stage: float = 0.5
    epsilon: float = 1e-4

    def parts(self) -> Parts:
        """See `Method.parts`."""
        scorer = WindowAttention(self.window, self.kernel_size)
        return Parts(OutputWeighted(scorer, self.first_stage, self.epsilon), Uniform())
