"""Finding a model's attention layers, output projections, MLPs and blocks by running two tokens through it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparing.adapters.structure import require_whole_heads
from sparing.core.placement import input_device
from sparing.errors import UnsupportedModelError

_MLP_NAMES = ("mlp", "feed_forward", "block_sparse_moe", "moe", "ffn", "ff")

# (module, query, key, value) of an attention call.
OnCall = Callable[[nn.Module, Tensor, Tensor, Tensor], None]


@dataclass(frozen=True)
class LensLayer:
    """One attention layer.

    Attributes:
        number: among the attention layers, from 0. block: the decoder layer that it is in.
        attention, projection, mlp: its modules; the last two None if none was found.
        num_heads, num_kv_heads, value_dim: its shape.
    """

    number: int
    block: nn.Module
    attention: nn.Module
    projection: nn.Module | None
    mlp: nn.Module | None
    num_heads: int
    num_kv_heads: int
    value_dim: int

    def require_projection(self, model: nn.Module) -> nn.Module:
        """The output projection.

        Raises:
            UnsupportedModelError: there is none whose input is the heads side by side.
        """
        if self.projection is None:
            problem = f"layer {self.number} has no output projection that takes the heads side by side"
            raise UnsupportedModelError(type(model).__name__, problem, "use a scorer that only watches attention")
        return self.projection


@dataclass(frozen=True)
class Found:
    """What was found: the attention layers, all blocks in their order, and which of the blocks return tuples."""

    layers: list[LensLayer]
    blocks: list[nn.Module]
    tuples: frozenset[nn.Module]


@dataclass
class _Seen:
    """One attention call of the trial run, and the linear maps inside the same module that were called after it."""

    module: nn.Module
    num_heads: int
    num_kv_heads: int
    value_dim: int
    after: list[nn.Module]


def discover(model: nn.Module, recorded: Callable[[OnCall], AbstractContextManager[None]]) -> Found:
    """Run two tokens and see what is called.

    Args:
        recorded: while open, every attention call of the model is told to the given function.

    Raises:
        UnsupportedModelError: see `ModelLens`.
    """
    name = type(model).__name__
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(name, "not a transformers model", "load it with AutoModelForCausalLM")
    if model.config.is_encoder_decoder or not model._can_set_attn_implementation():
        problem = "its attention does not go through transformers' AttentionInterface, or it is no decoder"
        raise UnsupportedModelError(name, problem, "use a decoder-only model that supports attn_implementation='sdpa'")
    require_whole_heads(model)
    calls, tuples = _trial_run(model, recorded)
    if not calls:
        raise UnsupportedModelError(name, "no attention layer was called", "state-space models have no heads to score")
    shapes = {(seen.num_heads, seen.num_kv_heads, seen.value_dim) for seen in calls}
    if len(shapes) > 1:
        problem = f"its layers differ in (query heads, KV heads, head size): {sorted(shapes)}"
        raise UnsupportedModelError(name, problem, "models with one shape of attention are supported")
    paths = {module: path for path, module in model.named_modules()}
    blocks = _blocks(model, paths[calls[0].module])
    layers = []
    for number, seen in enumerate(calls):
        block = next((b for b in blocks if any(m is seen.module for m in b.modules())), None)
        if block is None:
            raise UnsupportedModelError(name, f"attention layer {number} is in no list of blocks")
        width = seen.num_heads * seen.value_dim
        projection = next((m for m in seen.after if linear_width(m) == width), None)
        layers.append(LensLayer(number, block, seen.module, projection, _find_mlp(block, seen.module),
                                seen.num_heads, seen.num_kv_heads, seen.value_dim))  # fmt: skip
    return Found(layers, blocks, tuples)


def _trial_run(
    model: Any, recorded: Callable[[OnCall], AbstractContextManager[None]]
) -> tuple[list[_Seen], frozenset[nn.Module]]:
    """The attention calls, and the modules in lists that return tuples."""
    calls: list[_Seen] = []
    inside: dict[nn.Module, nn.Module] = {}
    tuples: set[nn.Module] = set()

    def on_call(module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> None:
        calls.append(_Seen(module, query.shape[1], key.shape[1], value.shape[-1], []))
        inside.update({m: module for m in module.modules() if linear_width(m)})

    def on_linear(module: nn.Module, args: Any) -> None:
        if calls and inside.get(module) is calls[-1].module:
            calls[-1].after.append(module)

    def on_listed(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, tuple):
            tuples.add(module)

    ids = torch.zeros(1, 2, dtype=torch.int64, device=input_device(model))
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(recorded(on_call))
        for module in model.modules():
            if linear_width(module):
                stack.callback(module.register_forward_pre_hook(on_linear).remove)
            for listed in module if isinstance(module, nn.ModuleList) else ():
                stack.callback(listed.register_forward_hook(on_listed).remove)
        model(ids, use_cache=False)
    return calls, frozenset(tuples)


def linear_width(module: nn.Module) -> int | None:
    """Input width of a linear map; None for anything else. GPT-2's Conv1D stores (in, out)."""
    if isinstance(module, nn.Linear):
        return module.in_features
    if type(module).__name__ == "Conv1D":
        weight: Any = module.weight
        return int(weight.shape[0])
    return None


def _blocks(model: nn.Module, path: str) -> list[nn.Module]:
    """The decoder layers: the outermost list of modules that the attention module is in."""
    parts = path.split(".")
    for end in range(1, len(parts)):
        module = model.get_submodule(".".join(parts[:end]))
        if isinstance(module, nn.ModuleList):
            return list(module)
    raise UnsupportedModelError(type(model).__name__, f"its attention ({path}) is in no list of blocks")


def decoder_blocks(model: Any, count: int) -> list[nn.Module]:
    """The decoder layers, without a trial run: the outermost list of so many modules in the model's decoder.

    Raises:
        UnsupportedModelError: there is none.
    """
    paths = {path: module for path, module in model.get_decoder().named_modules() if isinstance(module, nn.ModuleList)}
    fitting = sorted((path.count("."), path) for path, module in paths.items() if len(module) == count)
    if not fitting:
        problem = f"it has no list of {count} blocks, one for each layer of its cache"
        raise UnsupportedModelError(type(model).__name__, problem, "use a method that drops tokens after the prompt")
    return list(paths[fitting[0][1]])


def _find_mlp(block: nn.Module, attention: nn.Module) -> nn.Module | None:
    """The block's child that holds matrices and not the attention; by its usual names if there are several."""
    others = {
        name: child
        for name, child in block.named_children()
        if any(p.dim() >= 2 for p in child.parameters()) and all(m is not attention for m in child.modules())
    }
    named = [child for name, child in others.items() if name in _MLP_NAMES]
    return named[0] if named else (next(iter(others.values())) if len(others) == 1 else None)


@contextmanager
def swapped(block: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Put another forward on one module while the block is open."""
    before = {name: value for name, value in vars(block).items() if name == "forward"}
    block.__dict__["forward"] = forward
    try:
        yield
    finally:
        del block.__dict__["forward"]
        block.__dict__.update(before)
