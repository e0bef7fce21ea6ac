"""The lens: watching and changing attention, heads and the residual stream of any transformers decoder.

Which modules are attention, output projection, MLP and block is found out by running two tokens once and looking at
what is called, in which order and with what shapes; no model is known by name.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from sparing.adapters.attach import Attachment, Registration, is_attached
from sparing.adapters.attention import base_attention, softmax_of
from sparing.adapters.discovery import LensLayer, OnCall, discover, swapped
from sparing.adapters.masks import LazyMask, lazy_mask, mask_for_base
from sparing.adapters.prefix import holds_keys_only, read_only
from sparing.adapters.relevance import relevance_rules
from sparing.adapters.structure import require_plain_cache
from sparing.core.fingerprint import fingerprint
from sparing.core.lens import Attend, AttentionCall, AttentionHook, Site, SiteHook
from sparing.core.placement import input_device, stored_parameter
from sparing.core.scores import ModelIdentity
from sparing.errors import InvalidInputError, UnsupportedModelError

# What each attention module's calls go through while a lens is at work on it: its number, and hooks, outermost last.
_hooks: dict[nn.Module, tuple[int, list[AttentionHook]]] = {}
_recorders: list[OnCall] = []


class ModelLens:
    """See `core.lens.Lens`. Importing and making one changes nothing in the model; only `hooked` blocks do, while open.

    Args:
        model: a decoder-only transformers model.
        tokenizer: for scorers that need text. name: how the model is called in results.

    Raises:
        UnsupportedModelError: its attention does not go through transformers' AttentionInterface, or its layers
            differ in their numbers of heads.
    """

    def __init__(self, model: Any, tokenizer: Any = None, name: str | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        found = discover(model, self._recorded)
        self.layers, self.blocks, self._tuples = found.layers, found.blocks, found.tuples
        first = self.layers[0]
        self.num_layers, self.num_heads, self.num_kv_heads = len(self.layers), first.num_heads, first.num_kv_heads
        self.head_dim = first.value_dim
        self.vocabulary_size: int = model.get_input_embeddings().num_embeddings
        text_config: Any = self.model.config.get_text_config(decoder=True)
        self.max_length: int | None = getattr(text_config, "max_position_embeddings", None)
        self._name = name

    @cached_property
    def identity(self) -> ModelIdentity:
        """Which model; asked for first, its weights are looked at."""
        kind = type(self.model).__name__
        title = self._name or getattr(self.model.config, "_name_or_path", "") or kind
        return ModelIdentity(
            title, kind, self.num_layers, self.num_heads, self.num_kv_heads, self.head_dim, fingerprint(self.model)
        )

    @property
    def device(self) -> torch.device:
        """Where token ids have to be."""
        return input_device(self.model)

    # -- watching and changing ----------------------------------------------------------------------------------

    @contextmanager
    def hooked(
        self,
        attention: AttentionHook | None = None,
        heads: SiteHook | None = None,
        sites: Mapping[Site, SiteHook] | None = None,
    ) -> Iterator[None]:
        """See `core.lens.Lens.hooked`."""
        with ExitStack() as stack:
            for layer in self.layers:
                if heads is not None:
                    stack.enter_context(self._head_hook(layer, heads))
                for site, hook in (sites or {}).items():
                    stack.enter_context(_site_hook(layer, site, hook))
            if attention is not None:
                stack.enter_context(self._attached())
                for layer in self.layers:
                    _, hooks = _hooks.setdefault(layer.attention, (layer.number, []))
                    hooks.append(attention)
                    stack.callback(_forget, layer.attention)
            yield

    @contextmanager
    def _attached(self) -> Iterator[None]:
        """Send the model's attention through `_attention_over`; inside another such block there is nothing to do."""
        if is_attached(self.model, WATCHING):
            yield
            return
        attachment = Attachment(self.model, WATCHING)
        try:
            yield
        finally:
            attachment.detach()

    @contextmanager
    def _recorded(self, on_call: OnCall) -> Iterator[None]:
        _recorders.append(on_call)
        try:
            with self._attached():
                yield
        finally:
            _recorders.remove(on_call)

    def _head_hook(self, layer: LensLayer, hook: SiteHook) -> AbstractContextManager[None]:
        projection = layer.require_projection(self.model)

        def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
            flat: Tensor = args[0]
            new = hook(layer.number, flat.view(*flat.shape[:-1], layer.num_heads, layer.value_dim))
            return None if new is None else (new.reshape(flat.shape).contiguous(), *args[1:])

        return _removing(projection.register_forward_pre_hook(before))

    # -- running ------------------------------------------------------------------------------------------------

    def forward(self, ids: Tensor, mask: Tensor | None = None, last: int | None = None, cache: Any = None) -> Tensor:
        """See `core.lens.Lens.forward`."""
        more: dict[str, Any] = {"use_cache": False} if cache is None else {"past_key_values": cache, "use_cache": True}
        if mask is not None and not bool(mask.all()):
            mask = mask.to(self.device)
            more["attention_mask"] = mask.long()
            # Plain forwards of transformers count pads as positions; `generate` does not, and so do we not.
            more["position_ids"] = (mask.long().cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        if last is not None:
            more["logits_to_keep"] = last
        logits: Tensor = self.model(ids.to(self.device), **more).logits
        return logits if last is None else logits[:, -last:]

    def final_states(self, ids: Tensor, mask: Tensor | None = None, last: int | None = None) -> Tensor:
        """See `core.lens.Lens.final_states`."""
        seen: list[Tensor] = []
        before = lambda module, args: seen.append(args[0])  # noqa: E731
        with _removing(self.model.get_output_embeddings().register_forward_pre_hook(before)):
            self.forward(ids, mask, last)
        return seen[-1] if last is None else seen[-1][:, -last:]

    def new_cache(self) -> Any:
        """See `core.lens.Lens.new_cache`."""
        require_plain_cache(self.model)
        return DynamicCache(config=self.model.config)

    def prefix(self, ids: Tensor) -> Any:
        """See `core.lens.Lens.prefix`."""
        if not ids.shape[1] or len(self.blocks) > self.num_layers:
            return None
        cache = self.new_cache()
        if not holds_keys_only(cache, self.num_layers):
            return None
        with torch.no_grad():
            self.forward(ids, last=1, cache=cache)
        return read_only(cache)

    def forward_from(
        self, layer: int, residual: Tensor, mask: Tensor | None = None, last: int | None = None, cache: Any = None
    ) -> Tensor:
        """See `core.lens.Lens.forward_from`; blocks before the layer are passed over."""
        if not 0 <= layer <= self.num_layers:
            raise InvalidInputError("layer", layer, f"0 to {self.num_layers}")
        start = len(self.blocks) if layer == self.num_layers else self.blocks.index(self.layers[layer].block)
        ids = torch.zeros(residual.shape[:2], dtype=torch.int64, device=self.device)
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks[:start]):
                stack.enter_context(swapped(block, self._pass_over(block, residual if number == start - 1 else None)))
            if start == 0:
                before = lambda module, args, kwargs: _with_input(args, kwargs, residual)  # noqa: E731
                stack.enter_context(_removing(self.blocks[0].register_forward_pre_hook(before, with_kwargs=True)))
            return self.forward(ids, mask, last, cache)

    def _pass_over(self, block: nn.Module, residual: Tensor | None) -> Callable[..., Any]:
        """A forward for the block that hands on the given residual stream, or what came in."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            out = residual if residual is not None else (args[0] if args else kwargs["hidden_states"])
            return (out,) if block in self._tuples else out

        return forward

    def relevance(self, rules: frozenset[str]) -> AbstractContextManager[None]:
        """See `core.lens.Lens.relevance`."""
        return relevance_rules(self.model, self.layers, rules)

    def output_weight(self, layer: int) -> Tensor:
        """See `core.lens.Lens.output_weight`."""
        found = self.layers[layer]
        projection: Any = found.require_projection(self.model)
        # GPT-2's Conv1D stores (in, out), nn.Linear (out, in).
        matrix = stored_parameter(projection, "weight")
        weight = matrix if type(projection).__name__ == "Conv1D" else matrix.T
        return weight.view(found.num_heads, found.value_dim, -1)


def _forget(module: nn.Module) -> None:
    """Take away the hook that was added last."""
    _, hooks = _hooks[module]
    hooks.pop()
    if not hooks:
        del _hooks[module]


def _attention_over(base: str) -> Callable[..., tuple[Tensor, None]]:
    """The attention function for models that were loaded with the implementation `base`."""

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        scaling: float | None = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        function = base_attention(base, module)
        mask = mask_for_base(attention_mask)

        def attend(call: AttentionCall) -> Tensor:
            out: Tensor = function(module, call.queries, call.keys, call.values, mask, scaling=scaling, **kwargs)[0]
            return out

        for recorder in _recorders:
            recorder(module, query, key, value)
        number, hooks = _hooks.get(module, (-1, []))
        may_see = _visibility(module, query, key, attention_mask)
        starts = _starts(key, attention_mask, may_see, kwargs)
        call = AttentionCall(number, query, key, value, softmax_of(query, scaling, kwargs), may_see, starts)
        chain: Attend = attend
        for hook in hooks:
            chain = _wrap(hook, chain)
        return chain(call), None

    return attention


WATCHING = Registration({"sdpa": "sparing_lens", "eager": "sparing_lens_eager"}, _attention_over, lazy_mask)


def _wrap(hook: AttentionHook, attend: Attend) -> Attend:
    return lambda call: hook(call, attend)


def _visibility(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Callable[[slice], Tensor]:
    """rows → which keys they may see, from whatever transformers made of the mask."""
    rows_in_all, stored = query.shape[2], key.shape[2]
    if isinstance(mask, LazyMask):
        return mask.rows
    if mask is not None:
        if mask.dtype != torch.bool and not bool(((mask == 0) | (mask <= -1e4)).all()):
            raise UnsupportedModelError(type(module).__name__, "adds a bias to its logits, which rows cannot rebuild")
        seen = mask if mask.dtype == torch.bool else mask == 0
        return lambda rows: seen[:, :1, rows, :stored]

    def causal(rows: slice) -> Tensor:
        at = torch.arange(stored - rows_in_all, stored, device=query.device)[rows]
        return (torch.arange(stored, device=query.device) <= at[:, None])[None, None]

    return causal


def _starts(
    key: Tensor, mask: Tensor | None, may_see: Callable[[slice], Tensor], kwargs: Mapping[str, Any]
) -> Callable[[], Tensor]:
    """→ which stored key is the first token of each sequence; negative if a sliding window has dropped it."""

    def starts() -> Tensor:
        if isinstance(mask, LazyMask):
            pads = torch.zeros(1, dtype=torch.int64) if mask.padding is None else mask.padding.int().argmax(-1)
            return (pads - mask.request.get("kv_offset", 0)).to(key.device)
        positions = kwargs.get("position_ids")
        if kwargs.get("sliding_window") is not None and positions is not None:  # no pads, or the mask would be lazy
            return key.shape[2] - 1 - positions[:1, -1].to(key.device)
        if mask is None:
            return torch.zeros(1, dtype=torch.int64, device=key.device)
        return may_see(slice(mask.shape[2] - 1, mask.shape[2]))[:, 0, 0].int().argmax(-1)

    return starts


def _site_hook(layer: LensLayer, site: Site, hook: SiteHook) -> AbstractContextManager[None]:
    """A hook on a place of the residual stream."""

    def after(module: nn.Module, args: Any, output: Any) -> Any:
        new = hook(layer.number, output[0] if isinstance(output, tuple) else output)
        return None if new is None else ((new, *output[1:]) if isinstance(output, tuple) else new)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        new = hook(layer.number, args[0] if args else kwargs["hidden_states"])
        return None if new is None else _with_input(args, kwargs, new)

    if site == "resid_pre":
        return _removing(layer.block.register_forward_pre_hook(before, with_kwargs=True))
    places = {"attn_out": layer.projection, "mlp_out": layer.mlp, "resid_post": layer.block}
    if site not in places:
        raise InvalidInputError("site", site, "resid_pre, " + ", ".join(places))
    place = places[site]
    if place is None:
        raise UnsupportedModelError(type(layer.block).__name__, f"its {site} was not found")
    return _removing(place.register_forward_hook(after))


def _with_input(args: tuple[Any, ...], kwargs: dict[str, Any], new: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})


@contextmanager
def _removing(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()
