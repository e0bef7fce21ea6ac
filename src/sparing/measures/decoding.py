"""Greedy decoding in which every new token's attention rows are looked at, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sparing.core.lens import Attend, AttentionCall, Lens
from sparing.measures.attention import attention_rows
from sparing.measures.batches import pad_left


@dataclass(frozen=True)
class Step:
    """One decoded token.

    Attributes:
        attention: (L, B, Hq, S) float32: the rows that predicted it, over all tokens so far, left pads included; 0 for
            tokens that a sliding-window layer has dropped.
        tokens: (B,) the tokens that were predicted.
        pads: (B,) left pads: token i of a prompt stands at i + pads.
        number: 0 for the first token after the prompt.
    """

    attention: Tensor
    tokens: Tensor
    pads: Tensor
    number: int


def decode_watched(lens: Lens, prompts: Sequence[Sequence[int]], steps: int, watch: Callable[[Step], None]) -> Tensor:
    """Decode greedily after prompts of any lengths, in one batch; (B, steps) tokens.

    The prompt itself is read without watching, all but its last token, whose row predicts the first answer token.
    """
    ids, mask = pad_left(prompts)
    rows: list[Tensor] = []

    def keep_last_row(call: AttentionCall, attend: Attend) -> Tensor:
        last = call.queries.shape[2] - 1
        rows.append(attention_rows(call, slice(last, last + 1))[:, :, 0])
        return attend(call)

    said = []
    with torch.no_grad():
        cache = lens.new_cache()
        if ids.shape[1] > 1:
            lens.forward(ids[:, :-1], mask[:, :-1], last=1, cache=cache)
        token = ids[:, -1:]
        for number in range(steps):
            rows.clear()
            with lens.hooked(attention=keep_last_row):
                logits = lens.forward(token, mask, last=1, cache=cache)
            token = logits[:, -1].argmax(-1, keepdim=True).cpu()
            # Sliding-window layers hold the newest tokens only.
            whole = [functional.pad(row, (mask.shape[1] - row.shape[-1], 0)) for row in rows]
            watch(Step(torch.stack(whole).cpu(), token[:, 0], (~mask).sum(-1), number))
            said.append(token)
            mask = torch.cat([mask, torch.ones_like(token, dtype=torch.bool)], dim=1)
    return torch.cat(said, dim=1)
