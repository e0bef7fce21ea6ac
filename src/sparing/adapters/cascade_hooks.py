"""Hooks on the decoder blocks of a model: rows leave the residual stream of a prompt, and come back after the last one.

Taken out are rows of the hidden states and of all else that has one row per token. Behind the last block the length is
as it was: a token that has left keeps its last hidden state there.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from sparing.adapters.cascading import FIX, Cascading, Stream, rows_of
from sparing.adapters.discovery import decoder_blocks
from sparing.errors import UnsupportedModelError

if TYPE_CHECKING:
    from sparing.adapters.cache import EvictingCache


class CascadeHooks:
    """Hooks on a model's decoder blocks, inert but for forwards of caches that cascade.

    Raises:
        UnsupportedModelError: the blocks were not found.
    """

    def __init__(self, model: nn.Module, layers: int) -> None:
        self.cache: EvictingCache | None = None
        self._name = type(model).__name__
        blocks = decoder_blocks(model, layers)
        self._handles: list[Any] = [blocks[-1].register_forward_hook(self._after)]
        for number, block in enumerate(blocks):
            self._handles.append(block.register_forward_pre_hook(self._before(number), with_kwargs=True))

    def remove(self) -> None:
        """Leave the blocks as they were."""
        for handle in self._handles:
            handle.remove()

    def _before(self, number: int) -> Any:
        def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            cache = self.cache
            if cache is None or not isinstance(cache.prefilling, Cascading):
                return None
            hidden: Tensor = args[0] if args else kwargs["hidden_states"]
            if number == 0:
                cache.prefilling.begin(cache, hidden)
            hidden = cache.prefilling.cut(cache, number, hidden)
            stream = cache.prefilling.stream
            return self._cut(args, kwargs, hidden, stream) if stream is not None and stream.is_cut else None

        return before

    def _after(self, module: nn.Module, args: Any, output: Any) -> Any:
        cache, self.cache = self.cache, None
        if cache is None or not isinstance(cache.prefilling, Cascading):
            return None
        is_tuple = isinstance(output, tuple)
        whole = cache.prefilling.finish(cache, output[0] if is_tuple else output)
        return None if whole is None else ((whole, *output[1:]) if is_tuple else whole)

    def _cut(self, args: tuple[Any, ...], kwargs: dict[str, Any], hidden: Tensor, stream: Stream) -> Any:
        """A block's arguments: of all that the model has made for every token, the part of those who are there."""
        tokens = stream.rows.tokens
        index = torch.where(stream.rows.valid, stream.rows.positions - stream.start, 0)
        if args:
            rest = [self._part("", value, index, tokens) for value in args[1:]]
            return (hidden, *rest), {name: self._part(name, value, index, tokens) for name, value in kwargs.items()}
        named = {
            name: self._part(name, value, index, tokens) for name, value in kwargs.items() if name != "hidden_states"
        }
        return args, {**named, "hidden_states": hidden}

    def _part(self, name: str, value: Any, index: Tensor, tokens: int) -> Any:
        if name == "position_embeddings" and isinstance(value, tuple | list):
            return type(value)(rows_of(part, index) for part in value)
        if not isinstance(value, Tensor):
            return value
        if name == "position_embeddings":
            return rows_of(value, index)
        if name == "position_ids":
            return rows_of(value[..., None], index)[..., 0]
        if value.dim() != 4 and tokens in value.shape:  # masks have four axes, and layers that are cut make their own
            problem = f"its blocks take {name or 'an argument without a name'}, which may have a row for every token"
            raise UnsupportedModelError(self._name, problem, FIX)
        return value
