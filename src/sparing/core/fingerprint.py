"""A short hash that tells models apart."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from torch import nn

from sparing.core.placement import stored_parameter

# What a configuration says of the place and the program that it was loaded by.
NOT_THE_MODEL = ("_name_or_path", "transformers_version")


def fingerprint(model: nn.Module) -> str:
    """Changes when the configuration or the weights change (every parameter's shape and first values are in it)."""
    config: Any = model.config
    fields = {key: value for key, value in config.to_dict().items() if key not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(fields, sort_keys=True, default=str).encode())
    for name, parameter in model.named_parameters():
        path, _, own = name.rpartition(".")
        first = stored_parameter(model.get_submodule(path), own).detach().flatten()[:8].float().cpu().tolist()
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}{first}".encode())
    return digest.hexdigest()[:12]
