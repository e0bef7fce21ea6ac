"""The output projection of an attention module, as scorers use it."""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor, nn

from sparing.core.placement import stored_parameter
from sparing.errors import UnsupportedModelError

# What transformers' models call it.
NAMES = ("o_proj", "c_proj", "out_proj", "dense", "wo")


class ModuleProjection:
    """See `core.scorer.OutputProjection`. Holds no reference that would keep the model alive."""

    def __init__(self, module: nn.Module, num_heads: int) -> None:
        self._module, self.num_heads = weakref.ref(module), num_heads

    def weight(self) -> Tensor:
        """(Hq, Dv, hidden) float32.

        Raises:
            UnsupportedModelError: the module has no such projection, or its weights are no plain matrix.
        """
        module = self._module()
        found: Any = next((getattr(module, name) for name in NAMES if hasattr(module, name)), None)
        matrix = stored_parameter(found, "weight") if hasattr(found, "weight") else None
        if matrix is None or matrix.dim() != 2 or not matrix.is_floating_point():
            problem = "its attention has no plain output projection, whose weights this method needs"
            raise UnsupportedModelError(type(module).__name__, problem, "use a method without them, e.g. snapkv")
        # GPT-2's Conv1D stores (in, out), nn.Linear (out, in).
        inwards = matrix if type(found).__name__ == "Conv1D" else matrix.T
        weight: Tensor = inwards.detach().float().reshape(self.num_heads, -1, inwards.shape[1])
        return weight
