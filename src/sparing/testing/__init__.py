"""For authors of methods: contract checks, tiny models of every structure, and planted patterns.

`check_method(MyMethod)` runs every promise of the library against a method: exact, real, faithful, batch-safe,
chunk-safe, no trace, no silence. Nothing here needs a download or a test framework.
"""

from __future__ import annotations

from sparing.testing.contract import CHECKS, Check, DeclaredRefusal, check_method, run_check
from sparing.testing.driving import Driver, Prompt, random_prompt, run_method, run_untouched
from sparing.testing.inspection import assert_same_trace, held_positions, measured_bytes, trace
from sparing.testing.models import TINY_MODELS, TinyModel, tiny_config, tiny_model
from sparing.testing.reference import DroppedKeysReference

__all__ = [
    "CHECKS",
    "TINY_MODELS",
    "Check",
    "DeclaredRefusal",
    "Driver",
    "DroppedKeysReference",
    "Prompt",
    "TinyModel",
    "assert_same_trace",
    "check_method",
    "held_positions",
    "measured_bytes",
    "random_prompt",
    "run_check",
    "run_method",
    "run_untouched",
    "tiny_config",
    "tiny_model",
    "trace",
]
