"""Where a model's weights are. accelerate may have spread them over devices, main memory and the disk."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def input_device(model: Any) -> torch.device:
    """Where token ids have to be: with the embeddings; where these are put away, accelerate moves ids by itself."""
    device: torch.device = model.get_input_embeddings().weight.device
    return torch.device("cpu") if device.type == "meta" else device


def stored_parameter(module: nn.Module, name: str) -> Tensor:
    """A module's own parameter; fetched from main memory or the disk if it was put away there, which makes it empty."""
    parameter: Tensor = getattr(module, name)
    if not parameter.is_meta:
        return parameter
    hook: Any = getattr(module, "_hf_hook", None)
    fetchers = [each for each in getattr(hook, "hooks", [hook]) if getattr(each, "weights_map", None) is not None]
    assert fetchers, f"{name} of {type(module).__name__} has no numbers, and nothing says where they are"
    fetched: Tensor = fetchers[-1].weights_map[name]
    return fetched
