"""Running tokens after a prompt so that a scorer can watch them, and taking them back.

The cache keeps the tokens of the prompt on a tape, which the session writes. At the end of the prompt, before anything
is dropped, each pass that a scorer asks for runs through the model on the same cache, with only that scorer watching,
and is then cropped, so that the cache is as if nothing had happened.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparing.core.scorer import Replay, Scorer
from sparing.errors import CacheStateError, MethodRefusedError

if TYPE_CHECKING:
    from sparing.adapters.cache import EvictingCache


class Tape:
    """The token ids that a cache has read, and how to run more.

    Attributes:
        run: calls the model: run(input_ids=, attention_mask=, position_ids=, past_key_values=). None outside a session.
        replayed: scorers whose passes have run for the prompt in progress.
    """

    def __init__(self) -> None:
        self.ids: Tensor | None = None
        self.run: Callable[..., Any] | None = None
        self.replayed: set[Scorer] = set()

    def write(self, ids: Tensor) -> None:
        """Add (B, q) tokens that are about to be read."""
        self.ids = ids if self.ids is None else torch.cat([self.ids, ids], dim=1)
        self.replayed = set()

    def cut(self, length: int) -> None:
        """Forget all but the first tokens."""
        self.ids = None if self.ids is None or length == 0 else self.ids[:, :length]

    def copy(self) -> Tape:
        """An independent copy."""
        twin = Tape()
        twin.ids, twin.run, twin.replayed = self.ids, self.run, set(self.replayed)
        return twin


@torch.no_grad()
def replay(cache: EvictingCache, scorer: Scorer, end: int) -> None:
    """Run the passes that a scorer asks for, once, on a cache that has read a prompt of `end` tokens, pads included.

    Their time counts as time that the scorer has observed.

    Raises:
        MethodRefusedError: several sequences, whose passes would differ, or more positions than the model has.
        CacheStateError: the tokens are not known.
    """
    if not scorer.replays or scorer in cache.tape.replayed:
        return
    name = type(scorer).__name__
    if cache.evicting[0].rows != 1:
        problem = "replays the prompt, which it can do for one sequence at a time only"
        raise MethodRefusedError(name, problem, "give every sequence its own cache")
    ids = cache.tape.ids
    if ids is None or ids.shape[1] < end or cache.tape.run is None:
        problem = f"{name} replays the prompt, whose tokens are not known"
        raise CacheStateError(problem, "read the prompt as input_ids inside `with sparing.use(...)`")
    pad, began = int(cache.pads(1)[0]), _now(cache)
    short = cache.shortening
    drafted = short.drafted if short is not None and short.length == end else None
    for each in scorer.replay(ids[0, pad:end].tolist(), drafted):
        _check_positions(cache, name, cache.evicting[0].seen - pad + len(each.ids))
        _run_pass(cache, scorer, each, pad)
    cache.tape.replayed.add(scorer)
    cache.observing_seconds[scorer] += _now(cache) - began


def _now(cache: EvictingCache) -> float:
    if cache.evicting[0].device.type == "cuda":
        torch.cuda.synchronize(cache.evicting[0].device)
    return time.perf_counter()


def _check_positions(cache: EvictingCache, name: str, needed: int) -> None:
    """Learned position embeddings end; rotary ones do not."""
    there = cache.structure.learned_positions
    if there is not None and needed > there:
        problem = f"replays up to position {needed}, and {cache.structure.name} has {there}"
        raise MethodRefusedError(name, problem, "replay in smaller chunks, or read a shorter prompt")


def _run_pass(cache: EvictingCache, scorer: Scorer, each: Replay, pad: int) -> None:
    # Sliding windows and recurrent states cannot take tokens back, so they are put aside.
    layers: list[Any] = cache.layers
    aside = {i: copy.deepcopy(layer) for i, layer in enumerate(layers) if layer not in cache.evicting}
    # Dense tensors are never written in place: put back, they hold no bytes of the pass, as a cropped view would.
    dense = [(layer.keys, layer.values) for layer in cache.evicting]
    padding = cache._padding
    seen, count = cache.evicting[0].seen, len(each.ids)
    device = cache.evicting[0].device
    mask = torch.ones(1, seen + count, dtype=torch.int64, device=device)
    mask[:, :pad] = 0
    positions = torch.arange(seen - pad, seen - pad + count, device=device)[None]
    assert cache.tape.run is not None
    cache.replaying = (scorer, each)
    try:
        ids = torch.tensor([each.ids], device=device)
        cache.tape.run(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    finally:
        for layer, (keys, values) in zip(cache.evicting, dense, strict=True):
            layer.crop(-(layer.seen - seen))
            layer.keys, layer.values = keys, values
        for index, layer in aside.items():
            layers[index] = layer
        cache.replaying, cache._padding = None, padding
