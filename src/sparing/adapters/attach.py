"""Putting sparing's attention functions on a model, and taking every trace of them away again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig

from sparing.errors import UnsupportedModelError


class Registration:
    """Attention functions of ours, known to transformers only while some model uses them.

    Args:
        names: our names, by the implementation that a model was loaded with ("sdpa" or "eager"). Names that hold
            "flash", "sdpa" or "flex_attention" have a meaning of their own in transformers and must be avoided.
        attention: makes the attention function for models loaded with a base implementation.
        mask: makes its mask function; without one under the same name padding would be lost.
    """

    def __init__(self, names: Mapping[str, str], attention: Callable[[str], Any], mask: Callable[[str], Any]) -> None:
        self.names, self._attention, self._mask, self._users = names, attention, mask, 0

    def acquire(self) -> None:
        """One more model uses the functions."""
        if self._users == 0:
            for base, name in self.names.items():
                AttentionInterface.register(name, self._attention(base))
                AttentionMaskInterface.register(name, self._mask(base))
        self._users += 1

    def release(self) -> None:
        """One fewer; after the last, transformers is as it was."""
        self._users -= 1
        if self._users == 0:
            for name in self.names.values():
                AttentionInterface._global_mapping.pop(name, None)
                AttentionMaskInterface._global_mapping.pop(name, None)


class Attachment:
    """One model's use of a registration.

    Raises:
        UnsupportedModelError: the model is already in use by another session or lens.
    """

    def __init__(self, model: nn.Module, registration: Registration) -> None:
        self._before = [(config, config._attn_implementation_internal) for config in _configs(model)]
        self._registration = registration
        if any((name or "").startswith("sparing") for _, name in self._before):
            problem = "already in use by another session, or its attention is being watched or edited"
            raise UnsupportedModelError(type(model).__name__, problem, "leave that `with` block first")
        registration.acquire()
        for config, name in self._before:
            if name is not None:
                # Fused implementations other than sdpa are replaced by it in dense phases.
                config._attn_implementation_internal = registration.names["eager" if name == "eager" else "sdpa"]

    def detach(self) -> None:
        """Restore the model and transformers."""
        for config, name in self._before:
            config._attn_implementation_internal = name
        self._registration.release()


def is_attached(model: nn.Module, registration: Registration) -> bool:
    """True if the model's attention goes through this registration already."""
    return any(config._attn_implementation_internal in registration.names.values() for config in _configs(model))


def _configs(model: nn.Module) -> Iterator[Any]:
    """Every configuration object that a module of the model reads, each once."""
    known: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if isinstance(config, PreTrainedConfig):
            known[id(config)] = config
    return iter(known.values())
