"""What a compressed layer hands out instead of tensors, and who handed it out last."""

from __future__ import annotations

import threading
import weakref
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from torch import Tensor

from sparing.errors import CacheStateError

if TYPE_CHECKING:
    from sparing.adapters.layers import EvictingLayer

Layer = TypeVar("Layer")


class LastUpdated(threading.local, Generic[Layer]):
    """The layer whose `update` was the last in this thread: the attention call that follows belongs to it.

    transformers hands the attention function no cache, and `module.layer_idx` is not always the cache's index.
    """

    _reference: weakref.ref[Layer] | None = None

    def note(self, layer: Layer) -> None:
        """The layer's `update` has run in this thread."""
        self._reference = weakref.ref(layer)

    def take(self) -> Layer | None:
        """The layer that was just updated, once."""
        reference, self._reference = self._reference, None
        return None if reference is None else reference()


UPDATED: LastUpdated[EvictingLayer] = LastUpdated()


class RaggedHandle(Tensor):
    """Stands for the keys or values of a compressed layer: their logical shape, no storage, and no operations."""

    layer: EvictingLayer

    @staticmethod
    def __new__(cls, layer: EvictingLayer, like: Tensor, length: int) -> RaggedHandle:
        """A tensor without storage."""
        shape = (*like.shape[:2], length, like.shape[-1])
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)

    def __init__(self, layer: EvictingLayer, like: Tensor, length: int) -> None:
        self.layer = layer

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RaggedHandle{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        raise CacheStateError(
            f"{func} was called on the keys or values of a compressed layer, which are not one tensor any more",
            "use the cache inside `with sparing.use(model, ...)`, on a model that sparing supports",
        )
