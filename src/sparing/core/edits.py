"""Edits of heads: what is done to a head while a `with` block is open, or for good.

An edit acts at one of two seams: on a head's output before the output projection (`heads`), or on its attention
(`attention`). Edits of the first kind that scale or shift can be folded into the weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError, require

Head = tuple[int, int]
Ablation = Literal["zero", "mean", "uniform", "resample"]
ABLATIONS: tuple[Ablation, ...] = get_args(Ablation)


class HeadEdit:
    """Base of all edits; frozen dataclasses.

    Class attributes:
        at: which of the two methods below is implemented: "heads" or "attention".
    """

    at: ClassVar[Literal["heads", "attention"]] = "heads"

    def touched(self) -> Sequence[Head]:
        """The (layer, head) pairs that are changed."""
        raise NotImplementedError

    def heads(self, layer: int, z: Tensor) -> Tensor | None:
        """New (B, T, Hq, Dv) outputs of the heads of a layer, before the output projection; None to leave them."""
        raise NotImplementedError

    def attention(self, call: AttentionCall, attend: Attend) -> Tensor:
        """New (B, T, Hq, Dv) attention outputs of a layer."""
        raise NotImplementedError

    def scale_and_shift(self, layer: int, num_heads: int, dim: int) -> tuple[Tensor, Tensor] | None:
        """((Hq,) factors, (Hq, Dv) shifts) with z' = factor · z + shift, float64; None if it is no such map."""
        return None

    def check(self, lens: Lens) -> None:
        """Refuse heads that the model does not have.

        Raises:
            InvalidInputError: a layer or head out of range.
        """
        for layer, head in self.touched():
            if not (0 <= layer < lens.num_layers and 0 <= head < lens.num_heads):
                allowed = f"layers 0 to {lens.num_layers - 1}, heads 0 to {lens.num_heads - 1}"
                raise InvalidInputError("head", (layer, head), allowed)


def chosen_heads(heads: Iterable[Head] | Scores, top: int | float | None = None) -> tuple[Head, ...]:
    """A list of (layer, head) pairs, or the top of a measurement.

    Raises:
        InvalidInputError: no heads, or `top` missing. ScoresMismatchError: scores over other units.
    """
    if isinstance(heads, Scores):
        heads.require_axes("layer", "head")
        if top is None:
            raise InvalidInputError("top", None, "how many of the scored heads: a number, or a share in (0, 1]")
        return tuple((unit[0], unit[1]) for unit in heads.top(top))
    pairs = tuple((int(layer), int(head)) for layer, head in heads)
    if not pairs:
        raise InvalidInputError("heads", pairs, "at least one (layer, head)")
    return tuple(dict.fromkeys(pairs))


@dataclass(frozen=True)
class ScaleHeads(HeadEdit):
    """z' = factor · z.

    Attributes:
        factors: (layer, head) → factor; heads that are not named keep theirs.
    """

    factors: Mapping[Head, float]

    def __post_init__(self) -> None:
        sensible = bool(self.factors) and all(abs(f) < float("inf") for f in self.factors.values())
        require(sensible, "factors", dict(self.factors), "finite numbers for one or more (layer, head)")

    def touched(self) -> Sequence[Head]:
        """See `HeadEdit.touched`."""
        return tuple(self.factors)

    def heads(self, layer: int, z: Tensor) -> Tensor | None:
        """See `HeadEdit.heads`."""
        mine = {head: factor for (at, head), factor in self.factors.items() if at == layer}
        return None if not mine else z * _factors(mine, z.shape[2]).to(z)[:, None]

    def scale_and_shift(self, layer: int, num_heads: int, dim: int) -> tuple[Tensor, Tensor] | None:
        """See `HeadEdit.scale_and_shift`."""
        mine = {head: factor for (at, head), factor in self.factors.items() if at == layer}
        return _factors(mine, num_heads), torch.zeros(num_heads, dim, dtype=torch.float64)


@dataclass(frozen=True)
class BiasHeads(HeadEdit):
    """z' = z + v (LoFiT's second stage).

    Attributes:
        vectors: (layer, head) → (Dv,) vector.
    """

    vectors: Mapping[Head, Tensor]

    def __post_init__(self) -> None:
        require(bool(self.vectors), "vectors", dict(self.vectors), "a vector for one or more (layer, head)")

    def touched(self) -> Sequence[Head]:
        """See `HeadEdit.touched`."""
        return tuple(self.vectors)

    def check(self, lens: Lens) -> None:
        """See `HeadEdit.check`; the vectors must be as long as a head's output."""
        super().check(lens)
        for head, vector in self.vectors.items():
            require(tuple(vector.shape) == (lens.head_dim,), f"vector of head {head}", tuple(vector.shape),
                    f"({lens.head_dim},) numbers")  # fmt: skip

    def heads(self, layer: int, z: Tensor) -> Tensor | None:
        """See `HeadEdit.heads`."""
        if all(at != layer for at, _ in self.vectors):
            return None
        return z + self._shifts(layer, z.shape[2], z.shape[3]).to(z)

    def scale_and_shift(self, layer: int, num_heads: int, dim: int) -> tuple[Tensor, Tensor] | None:
        """See `HeadEdit.scale_and_shift`."""
        return torch.ones(num_heads, dtype=torch.float64), self._shifts(layer, num_heads, dim)

    def _shifts(self, layer: int, num_heads: int, dim: int) -> Tensor:
        shifts = torch.zeros(num_heads, dim, dtype=torch.float64)
        for (at, head), vector in self.vectors.items():
            if at == layer:
                shifts[head] = vector.double().cpu()
        return shifts


@dataclass(frozen=True)
class AblateHeads(HeadEdit):
    """Take away what heads say, in a named way.

    | kind | a head's output becomes |
    |---|---|
    | `zero` | 0 |
    | `mean` | its mean over the tokens of reference text (`reference`), the same at every token |
    | `resample` | its output at a token drawn from the reference, anew for every token, by `seed` |

    Every forward draws alike by its shape, so decoding with a cache, one token a forward, repeats one draw.

    Heads that attend uniformly are `methods.heads.uniform_heads.UniformHeads`: that edits attention.

    Attributes:
        pairs: the (layer, head) pairs.
        kind: see above.
        reference: (L, tokens, Hq, Dv) outputs on reference text, see `editing.head_outputs`; not needed for zero.
        seed: of the drawing.
    """

    pairs: tuple[Head, ...]
    kind: Literal["zero", "mean", "resample"] = "zero"
    reference: Tensor | None = field(default=None, compare=False)
    seed: int = 0

    def __post_init__(self) -> None:
        require(bool(self.pairs), "pairs", self.pairs, "at least one (layer, head)")
        require(self.kind in ("zero", "mean", "resample"), "kind", self.kind, "zero, mean or resample",
                "for uniform attention use UniformHeads")  # fmt: skip
        has_reference = self.kind == "zero" or self.reference is not None
        require(has_reference, "reference", None, f"outputs on reference text for {self.kind} ablation",
                "measure them with sparing.editing.head_outputs")  # fmt: skip

    def touched(self) -> Sequence[Head]:
        """See `HeadEdit.touched`."""
        return self.pairs

    def check(self, lens: Lens) -> None:
        """See `HeadEdit.check`; the reference must be of a model of this shape."""
        super().check(lens)
        if self.kind != "zero" and self.reference is not None:
            shape, wanted = tuple(self.reference.shape), (lens.num_layers, lens.num_heads, lens.head_dim)
            fits = len(shape) == 4 and shape[1] >= 1 and (shape[0], *shape[2:]) == wanted
            allowed = f"({wanted[0]} layers, tokens, {wanted[1]} heads, {wanted[2]}) outputs"
            require(fits, "reference", shape, allowed, "measure them with sparing.editing.head_outputs")

    def heads(self, layer: int, z: Tensor) -> Tensor | None:
        """See `HeadEdit.heads`."""
        mine = [head for at, head in self.pairs if at == layer]
        if not mine:
            return None
        new = z.clone()
        new[:, :, mine] = replacement(self.kind, z, self.reference, layer, self.seed)[:, :, mine]
        return new

    def scale_and_shift(self, layer: int, num_heads: int, dim: int) -> tuple[Tensor, Tensor] | None:
        """See `HeadEdit.scale_and_shift`."""
        if self.kind == "resample":
            return None
        gone = [head for at, head in self.pairs if at == layer]
        factors, shifts = torch.ones(num_heads, dtype=torch.float64), torch.zeros(num_heads, dim, dtype=torch.float64)
        factors[gone] = 0.0
        if self.kind == "mean" and self.reference is not None:
            shifts[gone] = self.reference[layer].double().mean(0).cpu()[gone]
        return factors, shifts


def replacement(kind: str, z: Tensor, reference: Tensor | None, layer: int, seed: int) -> Tensor:
    """(B, T, Hq, Dv) what ablated heads say instead of z."""
    if kind == "zero":
        return torch.zeros_like(z)
    assert reference is not None
    pool = reference[layer].to(z)
    if kind == "mean":
        return pool.mean(0).expand_as(z)
    drawn = torch.randint(len(pool), z.shape[:2], generator=torch.Generator().manual_seed(seed + 7919 * layer))
    return pool[drawn.to(pool.device)]


def _factors(mine: Mapping[int, float], num_heads: int) -> Tensor:
    factors = torch.ones(num_heads, dtype=torch.float64)
    for head, factor in mine.items():
        factors[head] = factor
    return factors
