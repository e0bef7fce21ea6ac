"""Putting sparing's functions on a model, and taking every trace of them away again."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers import PreTrainedConfig

from sparing.adapters import attention
from sparing.errors import UnsupportedModelError

# How many models are attached: the functions are known to transformers only while there are any.
_attached = 0


class Attachment:
    """One model's use of sparing's attention function.

    Raises:
        UnsupportedModelError: the model is already in use by another session.
    """

    def __init__(self, model: nn.Module) -> None:
        global _attached
        self._before = [(config, config._attn_implementation_internal) for config in _configs(model)]
        if any(name in attention.NAMES.values() for _, name in self._before):
            problem = "already in use by another session"
            raise UnsupportedModelError(type(model).__name__, problem, "leave that `with` block first")
        if _attached == 0:
            attention.register()
        _attached += 1
        for config, name in self._before:
            if name is not None:
                # Fused implementations other than sdpa are replaced by it in dense phases.
                config._attn_implementation_internal = attention.NAMES["eager" if name == "eager" else "sdpa"]

    def detach(self) -> None:
        """Restore the model and transformers."""
        global _attached
        for config, name in self._before:
            config._attn_implementation_internal = name
        _attached -= 1
        if _attached == 0:
            attention.unregister()


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration object that a module of the model reads, each once."""
    known: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            known[id(config)] = config
    return iter(known.values())
