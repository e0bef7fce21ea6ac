"""A short hash that tells models apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn


def fingerprint(model: nn.Module) -> str:
    """Changes when the configuration or the weights change (every parameter's shape and first values are in it)."""
    config: Any = model.config
    digest = hashlib.sha256(json.dumps(config.to_dict(), sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        first = parameter.detach().flatten()[:8].float().cpu().tolist()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{first}".encode())
    return digest.hexdigest()[:12]
