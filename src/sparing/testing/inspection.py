"""Looking at caches, models and transformers from outside: what is really held, and what has changed."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.cache_utils import Cache

from sparing.adapters.cache import EvictingCache
from sparing.core.plan import Plan
from sparing.core.scorer import KeyValues

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")


def measured_bytes(cache: Cache) -> int:
    """Bytes of all storages that a cache keeps alive, found by walking its objects; nothing it says is believed."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(cache, set())}
    return sum(storages.values())


def _tensors(owner: Any, seen: set[int]) -> Iterator[Tensor]:
    """Every tensor that can be reached from an object, modules excepted: those belong to the model."""
    if id(owner) in seen or isinstance(owner, nn.Module | type | str | bytes | int | float):
        return
    seen.add(id(owner))
    if isinstance(owner, Tensor):
        yield owner
    elif isinstance(owner, dict):
        for value in owner.values():
            yield from _tensors(value, seen)
    elif isinstance(owner, list | tuple | set | frozenset):
        for value in owner:
            yield from _tensors(value, seen)
    elif not isinstance(owner, Plan) and type(owner).__module__.startswith(("sparing.", "transformers.cache_utils")):
        yield from _tensors(vars(owner), seen)


def held_positions(cache: EvictingCache) -> dict[int, list[list[Tensor]]]:
    """What the cache really holds: layer index → [row][kv_head] → sorted positions, pads counted."""
    held = {}
    for index, layer in zip(cache.structure.full_layers, cache.evicting, strict=True):
        stored = layer.stored_tokens()
        rows, heads = stored.valid.shape[:2]
        held[index] = [
            [stored.positions[row, head][stored.valid[row, head]].sort().values for head in range(heads)]
            for row in range(rows)
        ]
    return held


def held_tokens(cache: EvictingCache) -> dict[int, KeyValues]:
    """Copies of what the cache really holds: layer index → keys, values, biases, positions."""
    pairs = zip(cache.structure.full_layers, cache.evicting, strict=True)
    return {index: layer.stored_tokens() for index, layer in pairs}


def is_exact(cache: EvictingCache) -> bool:
    """True if what the cache holds is a part of the tokens, unchanged."""
    method = cache.method
    return method is None or (method.parts().action.is_exact and not method.is_compact)


def trace(model: PreTrainedModel) -> dict[str, Any]:
    """Everything about a model and transformers that a session could leave behind, in comparable form."""
    marks: dict[str, Any] = {
        "attention functions": dict(AttentionInterface._global_mapping),
        "mask functions": dict(AttentionMaskInterface._global_mapping),
        "gradients on": torch.is_grad_enabled(),
        "random state": torch.get_rng_state().tolist(),
        "training": {name: m.training for name, m in model.named_modules()},
        "weights": {name: (id(t), t._version) for name, t in model.state_dict(keep_vars=True).items()},
    }
    for name, module in model.named_modules():
        marks[f"attributes of {name}"] = {k: id(v) for k, v in vars(module).items()}
        marks[f"class of {name}"] = (type(module), module.__class__.forward)
        for kind in _HOOKS:
            marks[f"{kind} of {name}"] = list(getattr(module, kind))
        config = getattr(module, "config", None)
        if config is not None:
            marks[f"configuration of {name}"] = {k: repr(v) for k, v in vars(config).items()}
    return marks


def assert_same_trace(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Assert that two traces are equal, and say what differs if not."""
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    assert not changed, f"left behind: {', '.join(sorted(changed))}"
