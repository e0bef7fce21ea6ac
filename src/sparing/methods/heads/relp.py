"""RelP: attribution patching with relevance in place of gradients (Jafari et al. 2025, arXiv:2508.21258).

Ranks: head, or (layer, position, kind). The formula of `attribution_patching`, with a backward pass in which parts of
the model count as what they do to this very input, not as their slope there:

| rule | forward | gradient flows through |
|---|---|---|
| `layer_norm` | norm(x) | x · (1 / scale), the scale a fixed number |
| `identity` | act(x) | x · (act(x) / x), the ratio a fixed number |
| `half` | act(gate) · up | half to each factor |
| `attention` | pattern · v | v only, the pattern a fixed number |

The first three are the authors' default. With all four, on a model without biases, Σ embedding · gradient = the logit.
Cost: as attribution patching.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.core.head_scorer import HeadScorer, MeanScorer, Measured, Run, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import PairSample
from sparing.errors import require
from sparing.measures.attention import row_tiles
from sparing.measures.patching import only_sample
from sparing.methods.heads.activation_patching import KINDS, position_labels
from sparing.methods.heads.attribution_patching import gradients, head_effects, site_effects

RULES = ("layer_norm", "identity", "half", "attention")
DEFAULT = "layer_norm+identity+half"


@register_scorer("relp", family="causal", data="pair", paper="2508.21258",
                 summary="relevance patching: attribution patching with relevance rules")  # fmt: skip
@dataclass(frozen=True)
class RelevancePatching(MeanScorer):
    """Relevance of each head's clean output.

    Attributes:
        rules: rules joined by "+".
    """

    rules: str = DEFAULT

    def __post_init__(self) -> None:
        parse_rules(self.rules)

    def observe(self, lens: Lens, batch: Sequence[PairSample]) -> Tensor:
        """See `MeanScorer.observe`."""
        return torch.stack([head_effects(gradients(lens, sample, rules=at_work(lens, self.rules))) for sample in batch])


@register_scorer("residual_relp", family="causal", data="pair", paper="2508.21258",
                 axes=("layer", "position", "kind"),
                 summary="relevance patching of every place of the residual stream")  # fmt: skip
@dataclass(frozen=True)
class ResidualRelevance(HeadScorer):
    """Relevance of resid_pre, attn_out and mlp_out at every layer and position. Needs exactly one sample.

    Attributes:
        rules: rules joined by "+".
    """

    rules: str = DEFAULT

    def __post_init__(self) -> None:
        parse_rules(self.rules)

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`."""
        sample = only_sample(run.samples)
        found = gradients(lens, sample, KINDS, at_work(lens, self.rules))
        return Measured(site_effects(found), 1, labels=position_labels(lens, sample.clean) | {"kind": tuple(KINDS)})


def parse_rules(text: str) -> frozenset[str]:
    """The rules in a text.

    Raises:
        InvalidInputError: not names of rules joined by "+".
    """
    rules = frozenset(text.split("+"))
    require(rules <= set(RULES), "rules", text, "any of " + ", ".join(RULES) + ', joined by "+"')
    return rules


@contextmanager
def at_work(lens: Lens, text: str) -> Iterator[None]:
    """Let gradients flow by the rules while the block is open."""
    rules = parse_rules(text)
    with lens.relevance(rules - {"attention"}):
        if "attention" not in rules:
            yield
            return
        with lens.hooked(attention=_values_only):
            yield


def _values_only(call: AttentionCall, attend: Attend) -> Tensor:
    """The attention's value with the gradient of pattern.detach() · v."""
    out = attend(call)
    group = call.queries.shape[1] // call.values.shape[1]
    values = call.values.repeat_interleave(group, dim=1)
    tiles = []
    for _, attention in row_tiles(call):
        tiles.append((attention.detach().to(values.dtype) @ values).transpose(1, 2))
    path = torch.cat(tiles, dim=1)
    return out.detach() + (path - path.detach())
