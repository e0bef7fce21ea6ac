"""A mask that is built only when somebody reads it.

transformers asks for one (B, 1, q, n) mask per forward. Compressed layers only want its padding, and dense layers
want exactly what the model's own attention would have been given, so the request is kept and answered on demand.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from sparing.errors import CacheStateError

_SKIPS = ("allow_is_causal_skip", "allow_is_bidirectional_skip")


class LazyMask(Tensor):
    """The mask of one forward, not yet built: a tensor without storage that turns dense under any operation.

    Attributes:
        base: the attention implementation that the model was loaded with ("sdpa" or "eager").
        request: the arguments of transformers' mask function.
    """

    base: str
    request: dict[str, Any]

    @staticmethod
    def __new__(cls, base: str, request: dict[str, Any]) -> LazyMask:
        """A tensor without storage."""
        shape = (request["batch_size"], 1, request["q_length"], request["kv_length"])
        device = request.get("device", "cpu")
        dtype = torch.bool if base == "sdpa" else request.get("dtype", torch.float32)
        return torch.Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)

    def __init__(self, base: str, request: dict[str, Any]) -> None:
        self.base, self.request = base, request
        self._for_base: tuple[Tensor | None] | None = None

    @property
    def padding(self) -> Tensor | None:
        """(B, tokens) bool, False for pads; None if there is none."""
        padding = self.request.get("attention_mask")
        return padding if padding is None or padding.dtype == torch.bool else padding.bool()

    def for_base(self) -> Tensor | None:
        """What the model's own attention would have received; built once and shared by all layers."""
        if self._for_base is None:
            self._for_base = (ALL_MASK_ATTENTION_FUNCTIONS[self.base](**self.request),)
        return self._for_base[0]

    def dense(self) -> Tensor:
        """The mask as a real tensor, also where the model's own attention could do without."""
        skips = dict.fromkeys(_SKIPS, False)
        mask: Tensor = ALL_MASK_ATTENTION_FUNCTIONS[self.base](**{**self.request, **skips})
        return mask

    def rows(self, rows: slice) -> Tensor:
        """(B, 1, rows, n) bool: the mask of some query rows only; nothing else of it is built."""
        start, stop, _ = rows.indices(self.request["q_length"])
        part = {"q_length": stop - start, "q_offset": self.request.get("q_offset", 0) + start}
        mask: Tensor = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**{**self.request, **dict.fromkeys(_SKIPS, False), **part})
        return mask

    def __repr__(self) -> str:  # type: ignore[override]
        return f"LazyMask{tuple(self.shape)}"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def real(x: Any) -> Any:
            return x.dense() if isinstance(x, LazyMask) else x

        return func(*pytree.tree_map(real, args), **pytree.tree_map(real, kwargs or {}))


def lazy_mask(base: str) -> Callable[..., Tensor | None]:
    """The mask function to register beside an attention function with the given base."""

    def build(**request: Any) -> Tensor | None:
        for name in ("q_offset", "kv_offset"):
            # A static cache hands out its live counter, which moves on before the mask is read.
            if isinstance(request.get(name), Tensor):
                request[name] = request[name].clone()
        if base == "sdpa" and _needs_none(request):
            # Models ask "is there a mask?", so where sdpa would get None, None it must be.
            mask: Tensor | None = ALL_MASK_ATTENTION_FUNCTIONS["sdpa"](**request)
            return mask
        return LazyMask(base, request)

    return build


def mask_for_base(mask: Tensor | None) -> Tensor | None:
    """What the model's own attention would have received in place of a mask that we were given."""
    return mask.for_base() if isinstance(mask, LazyMask) else mask


def padding_of(mask: Tensor | None) -> Tensor | None:
    """(B, tokens) bool of a mask that we were given, False for pads; None if there is none."""
    return mask.padding if isinstance(mask, LazyMask) else None


def check_left_pads(is_token: Tensor) -> None:
    """Refuse pads, False in (B, n) bool, that are not on the left.

    Raises:
        CacheStateError: some are not.
    """
    if bool((is_token.long().diff(dim=-1) < 0).any()):
        raise CacheStateError("pads must be on the left of each row", "set tokenizer.padding_side='left'")


def _needs_none(request: dict[str, Any]) -> bool:
    """True if sdpa may get no mask at all; asking it then costs nothing."""
    padding = request.get("attention_mask")
    if padding is not None and not bool(padding.all()):
        return False
    if request.get("allow_is_bidirectional_skip", False):
        return True
    square = request["q_length"] in (1, request["kv_length"])
    return bool(request.get("allow_is_causal_skip", True)) and square
