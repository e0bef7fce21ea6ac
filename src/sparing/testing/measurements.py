"""Measurements made up for methods that need some, so that their promises can be checked on any model."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import torch

from sparing.adapters.lens import ModelLens
from sparing.core.head_scorer import scorers
from sparing.core.scores import ModelIdentity, Scores
from sparing.testing.checks.common import MethodFactory
from sparing.testing.checks.scoring import DIM, GROUPS, HEADS, LAYERS
from sparing.testing.models import tiny_model

# What the checks on plain tensors look like.
EXAMPLE = ModelIdentity("example", "Example", LAYERS, HEADS * GROUPS, HEADS, DIM, "example")


def planted_scores(scorer: str, model: ModelIdentity, seed: int = 0) -> Scores:
    """Random numbers in [0, 1) in the place of a registered scorer's measurement of a model."""
    axes = scorers()[scorer].axes
    sizes = {"layer": model.num_layers, "head": model.num_heads, "kv_head": model.num_kv_heads}
    generator = torch.Generator().manual_seed(seed + len(scorer))
    values, extras = torch.rand(*(sizes[axis] for axis in axes), generator=generator), {}
    if scorer == "boundaries":  # it is its predictors that are used
        extras["weights"] = torch.randn(model.num_layers, model.num_kv_heads, 8, 8, generator=generator)
    return Scores(values, axes, scorer, model, extras=extras)


@functools.cache
def _draft() -> Any:
    return tiny_model("llama", seed=1)


@functools.cache
def identity(name: str) -> ModelIdentity:
    """The identity of a tiny model."""
    return ModelLens(tiny_model(name)).identity


def with_measurements(make: MethodFactory, model: ModelIdentity) -> MethodFactory:
    """The factory itself; of a registered method that needs measurements, one that gives it planted ones.

    One that needs a draft model gets a tiny one, and little to draft.
    """
    recipe: Any = make  # takes more than every factory does
    info: Any = getattr(make, "info", None)
    if info is not None and any(field.name == "draft" for field in dataclasses.fields(info.recipe)):
        return functools.partial(recipe, draft=_draft(), lookahead=6)
    if info is None or not info.needs:
        return make
    return functools.partial(recipe, scores=tuple(planted_scores(name, model) for name in info.needs))
