"""The seam of prompts with segments: a cache of keys that are not rotated, and the attention function that reads it.

The model is given position 0 for every token, where its rotary embedding does nothing. Queries and keys arrive
unrotated, an ordinary layer stores them so, and whoever attends turns them to the positions that it wants.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from sparing.adapters.attach import Registration
from sparing.adapters.attention import AttentionResult, base_attention, softmax_of
from sparing.adapters.handles import LastUpdated
from sparing.adapters.lens import ModelLens
from sparing.adapters.masks import lazy_mask, mask_for_base
from sparing.adapters.rotary import ModelRotary
from sparing.adapters.structure import read_structure
from sparing.core.lens import Attend, AttentionCall
from sparing.core.placement import stored_parameter
from sparing.core.segments import Layout, SegmentAttention, SegmentCall
from sparing.errors import CacheStateError, UnsupportedModelError

# What attention functions are told of and ours does not do.
_REFUSED = ("sliding_window", "position_bias", "indices", "block_indices")
_FIX = "use a model with rotary positions and full attention in every layer, e.g. Llama or Qwen3"
# Positions by which a table of angles grows at least.
_GROWTH = 1024


class Turning:
    """Turns vectors that are not rotated to any positions, rounded as the model itself would round them.

    Args:
        rotary: the model's. like: what will be turned, for its type and device.
    """

    def __init__(self, rotary: ModelRotary, like: Tensor) -> None:
        self._rotary = rotary
        self._cos = self._sin = like.new_empty(1, 0, 1)
        self._like = like.new_empty(1)

    def reserve(self, positions: int) -> None:
        """Be ready for positions below this."""
        if self._cos.shape[1] < positions:
            every = torch.arange(positions + _GROWTH, device=self._like.device)[None]
            cos, sin = self._rotary.embedding(self._like, every, **self._rotary.extra)
            # The model has put the embedding's factor on them already, when it "rotated" them to position 0.
            self._cos, self._sin = cos / self._rotary.scale, sin / self._rotary.scale

    def __call__(self, x: Tensor, positions: Tensor) -> Tensor:
        """See `core.segments.SegmentCall.turn`."""
        if positions.dim() > 1:
            rows = x.reshape(1, 1, -1, x.shape[-1])
            return self._turned(rows, positions.expand(x.shape[:-1]).reshape(-1)).view(x.shape)
        return self._turned(x, positions)

    def _turned(self, x: Tensor, positions: Tensor) -> Tensor:
        # Keys without heads stand in for the second argument.
        turned: Tensor = self._rotary.apply(x, x[:, :0], self._cos[:, positions], self._sin[:, positions])[0]
        return turned


class SegmentedLayer(DynamicLayer):
    """One layer of a `SegmentedCache`."""

    def __init__(self, cache: SegmentedCache) -> None:
        super().__init__()
        self.cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Store new tokens; the attention call that follows is this layer's.

        Raises:
            CacheStateError: the attention call of the layer before never came by.
        """
        if UPDATED.take() is not None:
            problem = "a cache of segments, whose keys are not rotated, is used outside its session"
            raise CacheStateError(problem, "use it inside `with sparing.position_invariant(model) as session:`")
        UPDATED.note(self)
        return super().update(key_states, value_states, *args, **kwargs)


UPDATED: LastUpdated[SegmentedLayer] = LastUpdated()


class SegmentedCache(Cache):
    """A cache for one prompt with segments, and for what is generated after it.

    Args:
        layers: of the model. layout: of the prompt, whose segments have to be read in one forward.
        rotary: the model's. method: how the prompt is attended.
    """

    def __init__(self, layers: int, layout: Layout, rotary: ModelRotary, method: SegmentAttention) -> None:
        self.layout, self._rotary, self._method = layout, rotary, method
        self._turnings: dict[torch.device, Turning] = {}
        super().__init__(layers=[SegmentedLayer(self) for _ in range(layers)])

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, scaling: float) -> Tensor:
        """(B, Hq, Q, Dv) of one layer.

        Raises:
            CacheStateError: the segments are read in parts.
        """
        tokens, end = keys.shape[2], self.layout.end
        start = tokens - query.shape[2]
        if start < end and (start > 0 or tokens < end):
            problem = f"tokens {start} to {tokens} are read, but the {end} up to the last segment see each other"
            raise CacheStateError(problem, "read the prompt in one forward (prefill_chunk_size=None)")
        turn = self._turnings.get(query.device)
        if turn is None:
            turn = self._turnings[query.device] = Turning(self._rotary, query)
        turn.reserve(tokens + end)
        return self._method.attend(SegmentCall(query, keys, values, self.layout, scaling, turn))


def zero_positions(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name of a model's forward, with positions that rotate nothing."""
    tokens: Tensor = args[0] if args else kwargs["input_ids"]
    return {**kwargs, "position_ids": torch.zeros(tokens.shape[:2], dtype=torch.int64, device=tokens.device)}


def _attention_over(base: str) -> Callable[..., AttentionResult]:
    """The attention function for models that were loaded with the implementation `base`."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> AttentionResult:
        layer = UPDATED.take()
        if layer is None:
            function = base_attention(base, module)
            return function(module, query, key, value, mask_for_base(attention_mask), scaling=scaling, **kwargs)
        name = type(module).__name__
        if key is not layer.keys or value is not layer.values:
            raise UnsupportedModelError(name, "its attention changes keys or values after they were cached", _FIX)
        for extra in _REFUSED:
            if kwargs.get(extra) is not None:
                raise UnsupportedModelError(name, f"its attention uses {extra}, which segments do not know", _FIX)
        scale = softmax_of(query, scaling, kwargs).scaling
        return layer.cache.attend(query, key, value, scale).transpose(1, 2).contiguous(), None

    return attention


SEGMENTS = Registration({"sdpa": "sparing_segments", "eager": "sparing_segments_eager"}, _attention_over, lazy_mask)


def require_turnable(model: Any) -> tuple[int, ModelRotary]:
    """The number of layers, and the rotary embedding of a model whose tokens can be given other positions.

    Runs a few single tokens: alone, a token says the same wherever it is, so each layer's queries and keys at one
    position must be those at another, turned.

    Raises:
        UnsupportedModelError: positions that are not rotary or depend on the length, sliding windows, states, latent
            attention, a softmax with more in it; a layer that does not rotate, or not like the others.
    """
    structure = read_structure(model)
    layers = DynamicCache(config=structure.config).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        raise UnsupportedModelError(structure.name, "not all of its layers have plain full attention", _FIX)
    if not structure.rotates:
        raise UnsupportedModelError(structure.name, "its positions are not rotary, so they cannot be changed", _FIX)
    rotary = structure.rotary
    if rotary is None or not rotary.is_fixed:
        problem = "its rotary embedding cannot be turned, or depends on the length of the sequence"
        raise UnsupportedModelError(structure.name, problem, _FIX)
    calls, positions = _trial_run(model)
    if any(call.softmax.softcap is not None or call.softmax.sinks is not None for call in calls):
        raise UnsupportedModelError(structure.name, "its softmax has a cap or sinks, which segments do not know", _FIX)
    if not all(_are_turned(rotary, states, positions) for call in calls for states in (call.queries, call.keys)):
        problem = "its layers do not all rotate queries and keys by its rotary embedding, and by nothing else"
        raise UnsupportedModelError(structure.name, problem, _FIX)
    return len(layers), rotary


@torch.no_grad()
def _trial_run(model: Any) -> tuple[list[AttentionCall], Tensor]:
    """Every layer's attention call for one token, alone in each of three rows, and the positions that it has there."""
    lens = ModelLens(model)
    calls: list[AttentionCall] = []

    def watch(call: AttentionCall, attend: Attend) -> Tensor:
        calls.append(call)
        return attend(call)

    positions = torch.tensor([0, 7, (lens.max_length or 4096) - 1], device=lens.device)
    embeddings = stored_parameter(model.get_input_embeddings(), "weight")
    token = embeddings.norm(dim=-1).argmax().to(lens.device)  # that of a pad is 0, and so is all it turns into
    with lens.hooked(attention=watch):
        model(token.expand(3, 1), position_ids=positions[:, None], use_cache=False)
    return calls, positions


def _are_turned(rotary: ModelRotary, states: Tensor, positions: Tensor) -> bool:
    """True if (3, heads, 1, D) are the first of them, turned to each of the positions."""
    turn = Turning(rotary, states)
    turn.reserve(int(positions.max()) + 1)
    try:
        expected = turn(states[:1].expand_as(states), positions.to(states.device)[:, None, None])
    except (RuntimeError, TypeError, ValueError, IndexError):  # heads of another size than the embedding's
        return False
    # What rounding may do to them is far less than the root of an ulp; another rotation does far more.
    rounding = max(torch.finfo(states.dtype).eps, torch.finfo(torch.float32).eps)
    return bool((states - expected).abs().max() <= rounding**0.5 * states.abs().max())
