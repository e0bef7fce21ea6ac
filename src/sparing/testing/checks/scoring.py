"""Checks of a method's parts on plain tensors: what it is built of, and what its scores are."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

import sparing
from sparing.core import allocate
from sparing.core.draft import Draft
from sparing.core.method import Method
from sparing.core.scorer import KeyValues, Queries, Scorer, Softmax
from sparing.core.token_scores import TokenScores, guard_ends, select
from sparing.testing.checks.common import MethodFactory, assert_close

HEADS, GROUPS, DIM, LAYERS = 3, 2, 8, 2


def example(rows: int = 1, tokens: int = 48, pads: tuple[int, ...] = (), seed: int = 0) -> tuple[Queries, KeyValues]:
    """Random queries and keys of one layer, the whole prompt in one call, rows left-padded if wished."""
    generator = torch.Generator().manual_seed(seed)
    keys, values = (torch.randn(rows, HEADS, tokens, DIM, generator=generator) for _ in range(2))
    states = torch.randn(rows, HEADS * GROUPS, tokens, DIM, generator=generator)
    left = torch.tensor(pads or (0,) * rows)
    positions = torch.arange(tokens)
    real = positions[None, :] >= left[:, None]
    where = positions.expand(rows, HEADS, tokens).clone()
    valid = real[:, None].expand(rows, HEADS, tokens).clone()
    queries = Queries(states, positions.clone(), real, Softmax(DIM**-0.5))
    return queries, KeyValues(keys, values, valid, where, left, 0, LAYERS, None)


def score(scorer: Scorer, queries: Queries, stored: KeyValues) -> Tensor:
    """Scores of the example, read in one call; with a replay of each row, if the scorer asks for one."""
    if not scorer.replays:
        return scorer.score(scorer.observe(None, queries, stored), stored)
    rows = []
    for row in range(stored.keys.shape[0]):  # one sequence at a time, as caches do
        asked, held = one_row(queries, stored, row)
        rows.append(scorer.score(replayed(scorer, scorer.observe(None, asked, held), asked, held), held))
    return torch.cat(rows)


def one_row(queries: Queries, stored: KeyValues, row: int) -> tuple[Queries, KeyValues]:
    """One row of a batch, with its pads."""
    part = slice(row, row + 1)
    held = dataclasses.replace(
        stored, keys=stored.keys[part], values=stored.values[part], valid=stored.valid[part],
        positions=stored.positions[part], pads=stored.pads[part],
    )  # fmt: skip
    return dataclasses.replace(queries, states=queries.states[part], valid=queries.valid[part]), held


def replayed(scorer: Scorer, state: Any, queries: Queries, stored: KeyValues) -> Any:
    """The state after all passes over one row, whose replayed tokens have the queries and keys of the originals."""
    pad, last = int(stored.pads[0]), int(queries.positions[-1])
    real = last + 1 - pad
    for each in scorer.replay(range(real)):
        count = len(each.ids)
        origin = pad + torch.tensor(each.ids) % real
        positions = torch.arange(last + 1, last + 1 + count)
        new = {name: getattr(stored, name)[:, :, origin] for name in ("keys", "values")}
        new |= {"valid": torch.ones_like(stored.valid[:, :, origin])}
        new |= {"positions": positions.expand_as(new["valid"])}
        longer: dict[str, Any] = {name: torch.cat([getattr(stored, name), t], dim=2) for name, t in new.items()}
        there = torch.ones(1, count, dtype=torch.bool)
        asked = Queries(queries.states[:, :, origin], positions, there, queries.softmax)
        state = scorer.observe_replay(state, asked, dataclasses.replace(stored, **longer), each)
    return state


def check_fields_are_stored_unchanged(make: MethodFactory) -> None:
    """A method is what was written: fields as given, frozen, equal and hashable by value, and its repr builds it."""
    for keep in (0.25, 512, "64MiB"):
        method = make(keep=keep)
        assert isinstance(method, Method), f"{method!r} is not a Method"
        assert method.keep == keep, f"keep={keep!r} was stored as {method.keep!r}"
        assert type(method.keep) is type(keep), f"keep={keep!r} was stored as {method.keep!r}"
        assert method == make(keep=keep), "two methods with the same fields are not equal"
        assert hash(method) == hash(make(keep=keep)), "two equal methods have different hashes"
        names = {field.name for field in dataclasses.fields(method)}
        changed = dataclasses.replace(method, keep=0.125)
        assert changed.keep == 0.125, "dataclasses.replace does not change keep"
        for name in names - {"keep"}:
            assert getattr(changed, name) == getattr(method, name), f"{name} changed together with keep"
        assert _rebuilt(method) == method, f"{method!r} does not build the same method"
        assert method.parts() == method.parts(), "parts() differ between two calls"


def _rebuilt(method: Method) -> Any:
    names = {name: getattr(sparing, name) for name in sparing.__all__ if not name.startswith("_")}
    # A measurement is too long to be written out: its repr names it, and only that very one answers to the name.
    named = {(scores.scorer, scores.digest): scores for scores in method.measurements}
    names["Scores"] = lambda scorer, digest: named[scorer, digest]
    # So is a draft model.
    fields = (getattr(method, field.name) for field in dataclasses.fields(method))
    drafts = {field.name: field for field in fields if isinstance(field, Draft)}
    names["Draft"] = drafts.__getitem__
    parts = method.parts()
    for part in (
        method,
        parts.scorer,
        parts.allocator,
        parts.action,
        parts.reader,
        *(getattr(allocate, n) for n in ("Uniform", "Pyramid")),
    ):
        kind = part if isinstance(part, type) else type(part)
        names[kind.__name__] = kind
    return eval(repr(method), names)


def check_scores_are_well_formed(make: MethodFactory) -> None:
    """Scores are (rows, KV heads, tokens), float32, and finite wherever a token is, also for one or two tokens."""
    scorer = make(keep=0.5).parts().scorer
    for tokens in (1, 2, 5, 48):
        for pads in ((0, 0), (0, tokens - 1)):
            queries, stored = example(rows=2, tokens=tokens, pads=pads)
            values = score(scorer, queries, stored)
            wanted = (2, HEADS, tokens)
            assert tuple(values.shape) == wanted, f"scores are {tuple(values.shape)} instead of {wanted}"
            assert values.dtype == torch.float32, f"scores are {values.dtype} instead of float32"
            assert bool(torch.isfinite(values[stored.valid]).all()), f"scores of {tokens} tokens are not finite"
        first, recent = scorer.protects(tokens)
        assert first >= 0, f"protects({tokens}) is ({first}, {recent})"
        assert recent >= 0, f"protects({tokens}) is ({first}, {recent})"


def check_inputs_are_untouched(make: MethodFactory) -> None:
    """Observing and scoring write into nothing that they are given: it is the model's own memory."""
    scorer = make(keep=0.5).parts().scorer
    queries, stored = example(rows=2, pads=(0, 9))
    given = [queries.states, queries.positions, queries.valid, stored.keys, stored.values, stored.valid]
    given += [stored.positions, stored.pads]
    before = [tensor.clone() for tensor in given]
    score(scorer, queries, stored)
    for number, (tensor, copy) in enumerate(zip(given, before, strict=True)):
        assert torch.equal(tensor, copy), f"input {number} was changed by {type(scorer).__name__}"


def check_same_seed_same_scores(make: MethodFactory) -> None:
    """Scores repeat, whatever the global random state is, and that state is not touched."""
    method = make(keep=0.5)
    queries, stored = example(rows=2)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        first = score(method.parts().scorer, queries, stored)
        torch.manual_seed(2)
        state = torch.get_rng_state()
        second = score(make(keep=0.5).parts().scorer, queries, stored)
        assert torch.equal(first, second), "scores differ between two calls"
        assert torch.equal(state, torch.get_rng_state()), "scoring draws from the global random generator"


def check_rows_do_not_mix(make: MethodFactory) -> None:
    """A row of a left-padded batch scores as it does alone, even if its pads hold large nonsense (promise 4)."""
    scorer = make(keep=0.5).parts().scorer
    pads = (0, 11, 30)
    queries, stored = example(rows=3, pads=pads)
    stored.keys.masked_fill_(~stored.valid[..., None], 1e3)
    stored.values.masked_fill_(~stored.valid[..., None], 1e3)
    together = score(scorer, queries, stored)
    for row, pad in enumerate(pads):
        part = slice(row, row + 1)
        count = stored.keys.shape[2] - pad
        alone = KeyValues(
            stored.keys[part, :, pad:], stored.values[part, :, pad:], stored.valid[part, :, pad:],
            torch.arange(count).expand(1, HEADS, count), torch.zeros(1, dtype=torch.int64), 0, LAYERS, None,
        )  # fmt: skip
        asked = Queries(queries.states[part, :, pad:], torch.arange(count), queries.valid[part, pad:], queries.softmax)
        wanted = score(scorer, asked, alone)
        got = together[part, :, pad:]
        if not _orders_by_position(scorer, got, wanted):
            assert_close(got, wanted, 1e-4 * max(1.0, float(wanted.abs().max())), f"scores of padded row {row}")


def _orders_by_position(scorer: Scorer, got: Tensor, wanted: Tensor) -> bool:
    """True if two score tensors differ by a constant shift only, as positions do in a padded row."""
    shift = got - wanted
    return bool(torch.allclose(shift, shift[..., :1].expand_as(shift), atol=1e-5))


def check_kv_heads_are_interchangeable(make: MethodFactory) -> None:
    """Permuting KV heads, with their query heads, permutes the scores; only scores without data may stay put.

    What a method knows of a model from measurements is permuted likewise.
    """
    method = make(keep=0.5)
    scorer = method.parts().scorer
    queries, stored = example(rows=2)
    order = torch.tensor([2, 0, 1])
    query_order = (order[:, None] * GROUPS + torch.arange(GROUPS)).flatten()
    plain = score(scorer, queries, stored)
    moved = score(
        _permuted(method, order).parts().scorer,
        dataclasses.replace(queries, states=queries.states[:, query_order]),
        dataclasses.replace(stored, keys=stored.keys[:, order], values=stored.values[:, order]),
    )
    if torch.equal(moved, plain):  # no data in it, e.g. positions or a draw
        other = score(scorer, *example(rows=2, seed=1))
        assert torch.equal(other, plain), "scores ignore which KV head a key belongs to"
        return
    scale = max(1.0, float(plain.abs().max()))
    assert_close(moved, plain[:, order], 1e-5 * scale, "scores after permuting KV heads")


def _permuted(method: Method, kv_heads: Tensor) -> Method:
    """The same method for a model whose KV heads, with their query heads, stand in another order."""
    if not method.measurements:
        return method
    query_heads = (kv_heads[:, None] * GROUPS + torch.arange(GROUPS)).flatten()
    orders = {"kv_head": kv_heads, "head": query_heads}
    measured = []
    for scores in method.measurements:
        values = scores.values
        for axis, name in enumerate(scores.axes):
            values = values.index_select(axis, orders[name]) if name in orders else values
        measured.append(dataclasses.replace(scores, values=values))
    changes: dict[str, Any] = {"scores": tuple(measured)}
    return dataclasses.replace(method, **changes)


def check_raising_a_score_keeps_the_token(make: MethodFactory) -> None:
    """A kept token whose score rises is still kept, and higher means keep: the best of a head never goes first."""
    parts = make(keep=0.5).parts()
    generator = torch.Generator().manual_seed(0)
    tokens, budget = 60, 20
    layers = [torch.randn(1, HEADS, tokens, generator=generator) for _ in range(LAYERS)]
    before = _choose(parts.allocator, parts.scorer, layers, budget)
    for trial in range(24):
        layer, head = trial % LAYERS, trial % HEADS
        kept = before[layer][head]
        token = int(kept[int(torch.randint(len(kept), (1,), generator=generator))])
        raised = [values.clone() for values in layers]
        raised[layer][0, head, token] += 0.1 + trial
        after = _choose(parts.allocator, parts.scorer, raised, budget)
        assert token in after[layer][head].tolist(), f"token {token} was dropped because its score rose"


def _choose(allocator: allocate.Allocator, scorer: Scorer, layers: list[Tensor], budget: int) -> list[list[Tensor]]:
    """[layer][kv_head] → kept tokens of one row."""
    scores = []
    for values in layers:
        valid = torch.ones_like(values, dtype=torch.bool)
        positions = torch.arange(values.shape[-1]).expand_as(values)
        first, recent = scorer.protects(budget)
        guard = guard_ends(valid, positions, torch.zeros(1, dtype=torch.int64), first, min(recent, budget // 2))
        scores.append(TokenScores(values, valid, guard))
    counts = allocator.allocate(scores, [budget])
    total = sum(int(count.sum()) for count in counts)
    assert total == budget * HEADS * len(layers), f"{total} tokens were given out, not {budget} per head"
    return [select(s, count)[0] for s, count in zip(scores, counts, strict=True)]
