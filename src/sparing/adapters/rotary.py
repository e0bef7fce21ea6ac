"""The model's own rotary position embedding as an invertible map, whatever its convention or scaling."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


class ModelRotary:
    """Rotates and unrotates with the model's own `apply_rotary_pos_emb` and its cosines and sines.

    Unrotating is rotating by the negative angle, divided by the square of the scale that some embeddings (YaRN)
    put on cosine and sine.

    Attributes:
        head_dim: size of the heads that it is for; latent attention rotates only a part that is cached with others.
        is_fixed: True if the angle of a position does not depend on how long the sequence is.
    """

    def __init__(self, embedding: nn.Module, apply: Callable[..., Any], head_dim: int) -> None:
        self.embedding, self.apply, self.head_dim = embedding, apply, head_dim
        kind: Any = getattr(embedding, "rope_type", "default")
        kind = kind.get("full_attention") if isinstance(kind, dict) else kind
        self.is_fixed = kind not in ("dynamic", "longrope")
        self.scale = float(getattr(embedding, "attention_scaling", 1.0))
        self.extra = {}
        if "layer_type" in inspect.signature(embedding.forward).parameters:
            self.extra = {"layer_type": "full_attention"}

    def rotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """See `sparing.core.scorer.Rotary`."""
        cos, sin = self._angles(x, positions)
        return self._apply(x, cos, sin)

    def unrotate(self, x: Tensor, positions: Tensor) -> Tensor:
        """See `sparing.core.scorer.Rotary`."""
        cos, sin = self._angles(x, positions)
        return self._apply(x, cos / self.scale**2, -sin / self.scale**2)

    def _angles(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = self.embedding(x.float(), positions, **self.extra)
        return cos, sin

    def _apply(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        # Handed over as queries and keys at once; the second result is not used.
        rotated: Tensor = self.apply(x.float(), x.float(), cos, sin)[0]
        return rotated

    @torch.no_grad()
    def is_inverse(self) -> bool:
        """True if `unrotate` really undoes `rotate` for its heads."""
        generator = torch.Generator().manual_seed(0)
        device = next(iter(self.embedding.buffers()), torch.zeros(0)).device
        x = torch.randn(1, 1, 3, self.head_dim, generator=generator).to(device)
        positions = torch.tensor([[0, 5, 1000]], device=device)
        try:
            back = self.unrotate(self.rotate(x, positions), positions)
        except (RuntimeError, TypeError, ValueError, IndexError):
            return False
        return back.shape == x.shape and bool(torch.allclose(back, x, atol=1e-4))


def find_rotary(model: nn.Module, head_dim: int | None) -> tuple[bool, ModelRotary | None]:
    """Look for the model's rotary embedding.

    Returns:
        (rotates, rotary): `rotates` is False if the model has no rotary embedding at all (its keys are cached
        unrotated); `rotary` is None if there is one but it could not be inverted.
    """
    found = [m for name, m in model.named_modules() if name.split(".")[-1].startswith("rotary_emb")]
    if not found:
        return False, None
    embedding = next((m for m in found if "ision" not in type(m).__name__), found[0])
    module = sys.modules[type(embedding).__module__]
    apply = getattr(module, "apply_rotary_pos_emb", None)
    if apply is None or head_dim is None:
        return True, None
    rotary = ModelRotary(embedding, apply, head_dim)
    return True, rotary if rotary.is_inverse() else None
