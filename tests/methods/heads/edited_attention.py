"""Slow and obvious edited attention: float64 maps of the model's own eager attention, changed by hand, times values.

Imports nothing of the code under test but the lens, through which queries, keys and values are read.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparing.adapters.lens import ModelLens
from sparing.core.edits import HeadEdit
from sparing.core.lens import AttentionCall
from sparing.core.scorer import Softmax
from sparing.editing import edit

LENGTH = 40  # longer than the sliding windows of 16
IDS = torch.randint(1, 64, (2, LENGTH), generator=torch.Generator().manual_seed(0))
# The oracle's maps and the edit's are both float64, and so are the sums.
CLOSE = 1e-9

# (map of one head (T, T), its dot products before the softmax (T, T) with -inf where hidden) → its edited map
Change = Callable[[Tensor, Tensor], Tensor]


def calls_of(model: Any, ids: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Per layer one sequence's scaled dot products (Hq, T, T), -inf where hidden, values (Hq, T, D) and outputs."""
    found = []

    def watch(call: Any, attend: Any) -> Tensor:
        group = call.queries.shape[1] // call.keys.shape[1]
        keys, values = (x[0].repeat_interleave(group, dim=0) for x in (call.keys, call.values))
        logits = call.queries[0] @ keys.transpose(-1, -2) * call.softmax.scaling
        logits = logits.masked_fill(~call.may_see(slice(None))[0], -torch.inf)
        out = attend(call)
        found.append((logits, values, out[0].transpose(0, 1)))
        return out

    lens = ModelLens(model)
    with torch.no_grad(), lens.hooked(attention=watch):
        lens.forward(ids)
    return found


def call_with(rows: Tensor, values: Tensor) -> AttentionCall:
    """A call of one head (layer 0) whose attention is `rows` (T, T) on `values` (T,)."""
    tokens = len(rows)
    # Keys are unit vectors, so that a query's numbers are its dot products.
    queries, keys = rows.double().log()[None, None], torch.eye(tokens, dtype=torch.float64)[None, None]
    causal = torch.ones(tokens, tokens, dtype=torch.bool).tril()
    queries = queries.masked_fill(~causal, 0.0)
    return AttentionCall(
        0, queries, keys, values.double().view(1, 1, -1, 1), Softmax(1.0), lambda r: causal[None, None, r]
    )


def attend(call: AttentionCall) -> Tensor:
    """(1, T, 1, 1) plain attention of such a call."""
    logits = (call.queries @ call.keys.transpose(-1, -2)).masked_fill(~call.may_see(slice(None)), -torch.inf)
    return (logits.softmax(-1) @ call.values).transpose(1, 2)


def outputs(model: Any, ids: Tensor, *edits: HeadEdit, mask: Tensor | None = None) -> list[Tensor]:
    """Per layer what the projections get, (B, T, Hq, D), with the edits at work."""
    lens = ModelLens(model)
    found: dict[int, Tensor] = {}
    with torch.no_grad(), edit(model, *edits), lens.hooked(heads=found.__setitem__):
        lens.forward(ids, mask)
    return [found[layer] for layer in range(lens.num_layers)]


def check_first_layer(model: Any, made: HeadEdit, heads: list[int], change: Change) -> None:
    """The edit changes these heads of layer 0 as the oracle says, and leaves the others bit by bit."""
    for row in range(2):
        ids = IDS[row : row + 1]
        logits, values, plain = calls_of(model, ids)[0]
        found = outputs(model, ids, made)[0][0].transpose(0, 1)
        for head in range(len(values)):
            if head in heads:
                rows = change(logits[head].softmax(-1), logits[head])
                assert torch.allclose(found[head], rows @ values[head], atol=CLOSE)
                assert not torch.allclose(found[head], plain[head], atol=1e-3), "the edit should do something"
            else:
                assert torch.equal(found[head], plain[head])


def check_batch_and_decoding(model: Any, made: HeadEdit, decodes: bool = True) -> None:
    """A left-padded batch and decoding with a cache say what single whole edited forwards say."""
    lens, pads = ModelLens(model), 7
    mask = torch.ones(2, LENGTH, dtype=torch.bool)
    mask[1, :pads] = False
    with torch.no_grad():
        plain = lens.forward(IDS[:1])
    with torch.no_grad(), edit(model, made):
        together = lens.forward(IDS, mask)
        alone = [lens.forward(IDS[:1]), lens.forward(IDS[1:, pads:])]
        assert not torch.allclose(alone[0], plain, atol=1e-2), "the edit should do something"
        # The models' norms round to float32: its rounding of values near 10, grown through the layers.
        assert torch.allclose(together[:1], alone[0], atol=1e-4)
        assert torch.allclose(together[1:, pads:], alone[1], atol=1e-4)
        if not decodes:
            return
        for whole, ids, seen in ((together, IDS, mask), (alone[0], IDS[:1], None)):
            cache, start = lens.new_cache(), 0
            # before the window is full, as it fills, in a chunk, and long after
            for end in (12, *range(13, 19), 24, *range(25, LENGTH + 1)):
                said = lens.forward(ids[:, start:end], None if seen is None else seen[:, :end], cache=cache)
                real = torch.ones_like(ids[:, start:end], dtype=torch.bool) if seen is None else seen[:, start:end]
                assert torch.allclose(said[real], whole[:, start:end][real], atol=1e-4), (start, end)
                start = end
