"""Boundaries: a small predictor of where a text's attention changes, from its keys (DHSA, arXiv:2510.24606).

Scores a layer: how many of the boundaries of unseen texts its predictor finds. The predictors themselves are
extras["weights"]; DHSA cuts prompts into chunks with them.

Labels need no annotation: the ratio of what all later rows pay to the w keys on one side of a position and on the other
(`attention_jumps`), where it is above θ and the largest within d tokens; of these the best N / chunk. That takes the
whole attention map, which is why a predictor learns it, once per model, from the keys of all KV heads:

    logit of position p = bias + Σ over heads h and pairs a <= b of the 2w keys around p of W[h, a, b] · f[h, a, b]
    f[h, a, b] = cos(k_a, k_b), and for a = b the log norm of k_a,    cross-entropy + ridge / 2 · ‖W‖², by Newton
    window ↔ w = 4,   distance ↔ d = 8 (the authors' non-maximum suppression),   theta ↔ θ = 1.1

One text in four (of four or more) is kept from learning, and scored: the share of its N / chunk boundaries that are
among as many predicted ones.

Cost: one forward per text, its attention map read once; then a few linear systems of H · w · (2w + 1) unknowns.

Deviations: 1. The authors' predictor is a network on the keys themselves (attention that pools either side, then their
difference, product and similarity, then layers). Ours sees what does not change with where rotated keys stand, and is
linear: on the bundled model a hidden layer fitted better and predicted worse. 2. One predictor a layer. 3. What the
sources leave open is our choice: N / chunk, and the ridge.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.core.head_scorer import HeadScorer, Measured, Run, register_scorer
from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.samples import TextSample
from sparing.errors import InvalidInputError, require
from sparing.measures.boundaries import attention_jumps, best_peaks, key_features, pairs_within, scored

# The cross-entropy is convex, and its curvature changes slowly: fewer steps are enough.
NEWTON_STEPS = 12


@dataclass(frozen=True)
class Text:
    """What one layer makes of a text: `features` (H, 2w, N) of its keys, and which positions (N,) are boundaries."""

    features: Tensor
    labels: Tensor


@register_scorer("boundaries", family="learned", data="text", paper="2510.24606", axes=("layer",),
                 summary="how well a layer's keys tell where attention changes; with DHSA's predictor")  # fmt: skip
@dataclass(frozen=True)
class Boundaries(HeadScorer):
    """Predictors of boundaries.

    Attributes:
        window: keys on either side of a position (4). distance: of two boundaries, at least (8).
        theta: least ratio of a boundary (1.1). chunk: tokens from boundary to boundary, on average at least (32).
        ridge: weight of the squared weights, against a sum of cross-entropies.
    """

    window: int = 4
    distance: int = 8
    theta: float = 1.1
    chunk: int = 32
    ridge: float = 1.0

    def __post_init__(self) -> None:
        require(self.window >= 1, "window", self.window, "a number of keys >= 1")
        require(self.distance >= 1, "distance", self.distance, "a number of tokens >= 1")
        require(self.theta >= 1, "theta", self.theta, "a ratio >= 1")
        require(self.chunk >= 1, "chunk", self.chunk, "a number of tokens >= 1")
        require(self.ridge > 0, "ridge", self.ridge, "a number above 0")

    def measure(self, lens: Lens, run: Run) -> Measured:
        """See `HeadScorer.measure`.

        Raises:
            InvalidInputError: no text has a boundary.
        """
        texts = []
        for sample in run.samples:
            texts.append(self.read(lens, sample))
            run.progress(len(texts), len(run.samples), "texts read")
        known = [text for i, text in enumerate(texts) if i % 4 != 3]
        unseen = texts[3::4] or known
        if not all(any(bool(one.labels.any()) for text in some for one in text.values()) for some in (known, unseen)):
            raise InvalidInputError("data", "texts without a boundary", f"more than {2 * self.window} tokens each")
        weights = torch.stack([self._learned([text[layer] for text in known]) for layer in range(lens.num_layers)])
        shares = [[self._found(each, text[layer]) for layer, each in enumerate(weights)] for text in unseen]
        notes = (f"{len(known)} texts were learned from, {len(unseen)} scored",)
        return Measured(torch.tensor(shares).nanmean(0), len(unseen), extras={"weights": weights}, notes=notes)

    def read(self, lens: Lens, sample: TextSample) -> dict[int, Text]:
        """[layer] → its keys and labels."""
        found: dict[int, Text] = {}

        def watch(call: AttentionCall, attend: Attend) -> Tensor:
            ratios = attention_jumps(call, self.window).cpu()
            ratios = ratios.masked_fill(ratios <= self.theta, -torch.inf)
            labels = torch.zeros_like(ratios, dtype=torch.bool)
            labels[best_peaks(ratios, self.distance, max(len(ratios) // self.chunk, 1))] = True
            found[call.layer] = Text(key_features(call.keys[0], self.window).cpu(), labels)
            return attend(call)

        with torch.no_grad(), lens.hooked(attention=watch):
            lens.forward(torch.tensor([sample.ids]), last=1)
        return found

    def _learned(self, texts: list[Text]) -> Tensor:
        """(H, 2w, 2w): the weights of one layer; what is no pair of the window has none."""
        long = [text for text in texts if len(text.labels) >= 2 * self.window]
        pairs = pairs_within(self.window)
        inputs = torch.cat([windows(text.features, pairs) for text in long])
        labels = torch.cat([text.labels[self.window : len(text.labels) - self.window + 1] for text in long])
        learned = logistic(inputs, labels, self.ridge)
        weights = torch.zeros(texts[0].features.shape[0], *pairs.shape)
        weights[:, pairs] = learned.float().view(weights.shape[0], -1)
        return weights

    def _found(self, weights: Tensor, text: Text) -> float:
        """The share of a text's boundaries that are predicted; nan where it has none."""
        predicted = best_peaks(scored(text.features, weights), self.distance, int(text.labels.sum()))
        return float(text.labels[predicted].sum() / text.labels.sum())


def windows(features: Tensor, pairs: Tensor) -> Tensor:
    """(positions, H * pairs) of (H, 2w, N): what `scored` weighs, of every position with w keys on both sides."""
    return features.unfold(-1, pairs.shape[0], 1).permute(2, 0, 1, 3)[:, :, pairs].flatten(1)


def logistic(inputs: Tensor, labels: Tensor, ridge: float) -> Tensor:
    """(F,) float64: the weights of a logistic regression of (n,) labels on (n, F) inputs, without its bias."""
    x, y = F.pad(inputs.double(), (0, 1), value=1.0), labels.double()
    weights = x.new_zeros(x.shape[1])
    for _ in range(NEWTON_STEPS):
        chance = torch.sigmoid(x @ weights)
        gradient = x.T @ (chance - y) + ridge * weights
        curvature = (x * (chance * (1 - chance))[:, None]).T @ x
        curvature.diagonal().add_(ridge)
        weights = weights - torch.linalg.solve(curvature, gradient)
    return weights[:-1]
