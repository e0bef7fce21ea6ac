"""How likely continuations are after a context whose cache has been compressed.

The context without its last token is read and compressed; then its last token and the continuation are fed to what is
left. So every continuation's token, the first one included, is predicted from the compressed cache. (After the whole
context, the first one's logits would be there before anything is dropped, and of a choice between single letters a
method would change nothing.) Methods that drop while decoding are fed token by token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.adapters.cache import EvictingCache
from sparing.core.placement import input_device
from sparing.measures.batches import pad_left
from sparing.session import Session

Ids = Sequence[int]


@dataclass(frozen=True)
class Asked:
    """A context of two tokens or more, and the continuations to be scored after it, each of one token or more."""

    context: Ids
    continuations: Sequence[Ids]


@torch.no_grad()
def log_likelihoods(
    session: Session, batch: Sequence[Asked], dtype: torch.dtype | None = None
) -> tuple[EvictingCache, list[float], list[list[tuple[float, bool]]]]:
    """Read a batch of contexts, compress them, and score every continuation on a copy of what is left.

    Args:
        session: entered. dtype: of the log-probabilities; by default the logits' own.

    Returns:
        The compressed cache of the contexts; for methods that read a part of what is stored, the share that each
        copy's continuations read; and of each context's continuations, in their order, log P(continuation | context)
        in nats, and whether greedy decoding would have given it.
    """
    device = input_device(session.model)
    ids, mask = pad_left([asked.context[:-1] for asked in batch])
    ids, mask = ids.to(device), mask.long().to(device)
    cache = session.prefill(ids, chunk_size=ids.shape[1], attention_mask=mask)
    _, seen = session.shorten(cache, ids, mask)
    assert seen is not None
    read: list[float] = []
    found: list[list[tuple[float, bool]]] = [[] for _ in batch]
    turns = max(len(asked.continuations) for asked in batch)
    for turn in range(turns):
        # A row that has no more to ask is fed its last token, and not listened to.
        targets = [asked.continuations[turn] if turn < len(asked.continuations) else () for asked in batch]
        fed = [[asked.context[-1], *target[:-1]] for asked, target in zip(batch, targets, strict=True)]
        copy = cache.clone()
        logits = _logits(session, copy, seen, fed)
        share = copy.report().read_share
        read += [] if share is None else [share]
        for row, target in enumerate(targets):
            if target:
                found[row].append(_score(logits[row, : len(target)], target, dtype))
    return cache, read, found


def _logits(session: Session, cache: EvictingCache, seen: Tensor, fed: Sequence[Ids]) -> Tensor:
    """(rows, tokens, vocabulary) logits of tokens after a cache; pads on the right see, and are not seen."""
    width = max(map(len, fed))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in fed], device=seen.device)
    mask = torch.cat([seen, torch.ones_like(ids)], dim=1)
    positions = seen.sum(-1, keepdim=True) + torch.arange(width, device=seen.device)
    step, before = 1 if cache.follows_decoding else width, seen.shape[1]
    logits = [
        session.model(
            input_ids=ids[:, start : start + step], attention_mask=mask[:, : before + start + step],
            position_ids=positions[:, start : start + step], past_key_values=cache, use_cache=True,
        ).logits
        for start in range(0, width, step)
    ]  # fmt: skip
    return torch.cat(logits, dim=1)


def _score(logits: Tensor, target: Ids, dtype: torch.dtype | None) -> tuple[float, bool]:
    """The sum of the targets' log-probabilities, and whether each is the likeliest; logits: (targets, vocabulary)."""
    logs = torch.log_softmax(logits, dim=-1, dtype=dtype)
    wanted = torch.tensor(target, device=logits.device)
    return float(logs.gather(1, wanted[:, None]).sum()), bool((logs.argmax(-1) == wanted).all())
