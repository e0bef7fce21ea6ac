"""Sparse prefill: the kernels under random patterns, every method inside a model's forward, and the dispatcher.

Attention inside a forward is the time of the whole forward less that of the same forward with attention left out, so
that whatever a method costs (choosing what to read, gathering, merging) counts. The contestants run one after the other
in every round, and are compared round by round with dense attention.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any
from unittest import mock

import torch
from common import (
    DTYPES,
    SIZES,
    Time,
    conditions,
    header_text,
    median_ratio,
    random_llama,
    random_prompt,
    table,
    timed,
    use_threads,
    write,
)
from torch.nn import functional as F

import sparing
from sparing.adapters.prefilling import Prefilling
from sparing.core.method import methods
from sparing.core.parsing import parse_method, split_methods
from sparing.core.pattern import Pattern
from sparing.core.prefill import PromptCall, SparsePrefill
from sparing.core.scorer import Softmax
from sparing.kernels import native
from sparing.kernels.sparse import dispatch, flexible, gather, native_prefill

HEADS, DIM, BLOCK = 8, 64, 128
SPARSITIES = (0.0, 0.5, 0.75, 0.9)
SCORING_GOAL = 0.15


# -- kernels --------------------------------------------------------------------------------------------------------


def random_pattern(tokens: int, sparsity: float) -> Pattern:
    """The first block and every row's own are on, of the others so many that this share of all causal blocks is off."""
    blocks = -(-tokens // BLOCK)
    generator = torch.Generator().manual_seed(0)
    free = torch.ones(blocks, blocks, dtype=torch.bool).tril(-1)
    free[:, 0] = False
    wanted = max(round((1 - sparsity) * blocks * (blocks + 1) / 2) - (2 * blocks - 1), 0)
    on = torch.zeros(HEADS, blocks, blocks, dtype=torch.bool)
    for head in range(HEADS):
        places = free.nonzero()
        rows, columns = places[torch.randperm(len(places), generator=generator)[:wanted]].unbind(-1)
        on[head, rows, columns] = True
    on[..., 0] = True
    return Pattern(tokens, 0, BLOCK, on)


def kernels(lengths: list[int], dtypes: list[str], rounds: int, device: str) -> list[dict[str, Any]]:
    """Speed over dense attention of every path: by CPU time, on other devices by the wall."""
    rows = []
    for name in dtypes:
        for tokens in lengths:
            given = [torch.randn(HEADS, tokens, DIM).to(device, DTYPES[name]) for _ in range(3)]
            for sparsity in SPARSITIES:
                rows.append({"dtype": name, "tokens": tokens, "sparsity": sparsity, **_paths(given, sparsity, rounds)})
                print(rows[-1], flush=True)
    return rows


def _finish(work: Callable[[], Any], device: str) -> None:
    work()
    dispatch.wait(device)


@torch.no_grad()
def _paths(given: list[torch.Tensor], sparsity: float, rounds: int) -> dict[str, Any]:
    query, keys, values = given
    pattern, softmax, device = random_pattern(query.shape[1], sparsity), Softmax(DIM**-0.5), str(query.device)
    pattern = replace(pattern, blocks=pattern.blocks.to(device))
    clock = "cpu" if device == "cpu" else "wall"
    works: dict[str, Callable[[], Any]] = {
        "dense": lambda: F.scaled_dot_product_attention(query[None], keys[None], values[None], is_causal=True),
        "gathered": lambda: gather.attend_gathered(query, keys, values, pattern, softmax),
    }
    if native_prefill.offers(query, keys, values, pattern):
        works["native"] = lambda: native_prefill.attend_native(query, keys, values, pattern, softmax)
    if flexible.offers(query, pattern, softmax, needs_lse=False):
        works["flex"] = lambda: flexible.attend_flex(query, keys, values, pattern, softmax, needs_lse=False)
    times: dict[str, list[Time]] = {name: [] for name in works}
    for number in range(rounds + 1):
        for name, work in works.items():
            dispatch.wait(device)
            took = timed(partial(_finish, work, device))
            if number:
                times[name].append(took)
    density = float(pattern.density().mean())
    speeds = {name: 1 / median_ratio(found, times["dense"], clock) for name, found in times.items() if name != "dense"}
    dense_ms = min(getattr(took, clock) for took in times["dense"]) * 1000
    return {"density": density, "dense_ms": dense_ms, **speeds}


# -- methods inside a model -----------------------------------------------------------------------------------------


@dataclass
class Record:
    """What was measured of one contestant: whole forwards, and of them the time of choosing what to read."""

    forward: list[Time] = field(default_factory=list)
    choosing: list[Time] = field(default_factory=list)
    density: float = 1.0


@torch.no_grad()
def forward(model: Any, prompt: torch.Tensor, method: SparsePrefill | None, record: Record) -> None:
    """One forward, dense where no method is given."""
    chosen: list[Time] = []
    with sparing.use(model, method or sparing.BlockTopK(keep=1.0)) as session, _choosing(method, chosen):
        cache = session.new_cache()
        record.forward.append(timed(lambda: model(prompt, past_key_values=cache, logits_to_keep=1)))
        report = cache.report().prefill
    record.choosing.append(Time(sum(t.wall for t in chosen), sum(t.cpu for t in chosen)))
    record.density = 1.0 if report is None else report.density


@contextmanager
def _choosing(method: SparsePrefill | None, chosen: list[Time]) -> Iterator[None]:
    """Note how long the method takes for its patterns, where it makes them apart from attention."""
    if method is None or type(method).attend is not SparsePrefill.attend:
        yield
        return
    kind, pattern = type(method), type(method).pattern

    def noted(self: SparsePrefill, call: PromptCall) -> Pattern:
        wall, cpu = time.perf_counter(), time.process_time()
        found = pattern(self, call)
        chosen.append(Time(time.perf_counter() - wall, time.process_time() - cpu))
        return found

    with mock.patch.object(kind, "pattern", noted):
        yield


@torch.no_grad()
def without_attention(model: Any, prompt: torch.Tensor, record: Record) -> None:
    """A forward whose attention does nothing."""

    def nothing(self: Prefilling, layer: Any, states: Any, *rest: Any) -> torch.Tensor:
        zeros: torch.Tensor = torch.zeros_like(states[0])
        return zeros

    with (
        mock.patch.object(Prefilling, "attend", nothing),
        sparing.use(model, sparing.BlockTopK(keep=0.5)) as session,
    ):
        cache = session.new_cache()
        record.forward.append(timed(lambda: model(prompt, past_key_values=cache, logits_to_keep=1)))


def inside(model: Any, lengths: list[int], names: list[str], keeps: list[float], rounds: int) -> list[dict[str, Any]]:
    """Speed of attention over dense attention in the same model, and the share that choosing takes of it."""
    rows = []
    for tokens in lengths:
        prompt = random_prompt(tokens, 0)
        contestants: dict[str, SparsePrefill | None] = {"dense": None}
        for name in names:
            for keep in keeps:
                method = parse_method(name, keep)
                assert isinstance(method, SparsePrefill)
                contestants[f"{name} {keep:g}"] = replace(method, dispatch="always")
        records = {name: Record() for name in contestants}
        rest = Record()
        for number in range(rounds + 1):
            without_attention(model, prompt, rest)
            for name, method in contestants.items():
                forward(model, prompt, method, records[name])
            if not number:  # warms up
                rest.forward.clear()
                for record in records.values():
                    record.forward.clear()
                    record.choosing.clear()
        rows += [_row(tokens, name, record, records["dense"], rest) for name, record in records.items()]
        for row in rows[-len(records) :]:
            print(row, flush=True)
    return rows


def _row(tokens: int, name: str, record: Record, dense: Record, rest: Record) -> dict[str, Any]:
    own = _less(record.forward, rest.forward)
    full = _less(dense.forward, rest.forward)
    return {
        "tokens": tokens, "method": name, "density": record.density,
        "attention": 1 / median_ratio(own, full), "forward": 1 / median_ratio(record.forward, dense.forward),
        "choosing": median_ratio(record.choosing, full) if any(t.cpu for t in record.choosing) else None,
        "dense_attention_s": min(t.cpu for t in full), "forward_s": min(t.cpu for t in record.forward),
    }  # fmt: skip


def _less(times: list[Time], rest: list[Time]) -> list[Time]:
    return [Time(a.wall - b.wall, max(a.cpu - b.cpu, 1e-9)) for a, b in zip(times, rest, strict=True)]


# -- the dispatcher -------------------------------------------------------------------------------------------------


def dispatched(
    model: Any, lengths: list[int], names: list[str], keeps: list[float], rounds: int
) -> list[dict[str, Any]]:
    """Whole forwards with dispatch="auto" over dense ones: never much slower, at any length."""
    rows = []
    for tokens in lengths:
        prompt = random_prompt(tokens, 0)
        for name in names:
            for keep in keeps:
                method = parse_method(name, keep)
                assert isinstance(method, SparsePrefill)
                dense, auto = Record(), Record()
                for number in range(rounds + 1):
                    for which, record in (
                        ((None, dense), (method, auto)) if number % 2 else ((method, auto), (None, dense))
                    ):
                        forward(model, prompt, which, record)
                ratio = median_ratio(auto.forward[1:], dense.forward[1:])
                rows.append({"tokens": tokens, "method": f"{name} {keep:g}", "ratio": ratio, "density": auto.density})
                print(rows[-1], flush=True)
    return rows


# -- output ---------------------------------------------------------------------------------------------------------


def markdown(result: dict[str, Any]) -> str:
    """The result as text."""
    paths = [path for path in ("native", "flex", "gathered") if any(path in row for row in result["kernels"])]
    about = [
        f"Kernels: {HEADS} heads of {DIM}, blocks of {BLOCK}; sparsity is the share of causal blocks that are off; "
        "speed is dense SDPA's CPU time over the path's; ideal is 1 / density",
        f"Model: random Llama ({result['size']}), {result['dtype']}; {result['rounds']} rounds; {native.status()}",
        "attention: dense attention's time over the method's, both inside the forward, what choosing takes included; "
        "choosing: its share of dense attention",
    ]
    kernel_rows = [
        [r["dtype"], str(r["tokens"]), f"{r['sparsity']:.0%}", f"{r['density']:.3f}", f"{r['dense_ms']:.0f}",
         *(f"{r[p]:.2f}" if p in r else "-" for p in paths), f"{1 / r['density']:.2f}"]
        for r in result["kernels"]
    ]  # fmt: skip
    model_rows = [
        [str(r["tokens"]), r["method"], f"{r['density']:.3f}", f"{r['attention']:.2f}", f"{r['forward']:.2f}",
         "-" if r["choosing"] is None else f"{r['choosing']:.1%}", f"{r['forward_s']:.2f}"]
        for r in result["inside"]
    ]  # fmt: skip
    auto_rows = [[str(r["tokens"]), r["method"], f"{r['density']:.3f}", f"{r['ratio']:.3f}"] for r in result["auto"]]
    tables = {
        "Kernels": (["dtype", "tokens", "sparsity", "density", "dense ms", *paths, "ideal"], kernel_rows),
        "Inside a model": (
            ["tokens", "method", "density", "attention ×", "forward ×", "choosing", "forward s"], model_rows,
        ),
        'dispatch="auto"': (["tokens", "method", "density", "time / dense forward"], auto_rows),
    }  # fmt: skip
    parts = ["\n".join([header_text("Sparse prefill", result), *(f"- {line}" for line in about)])]
    parts += [f"## {name}\n\n{table(head, rows)}" for name, (head, rows) in tables.items() if rows]
    return "\n\n".join(parts)


def parse() -> argparse.Namespace:
    """The arguments."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    every = [name for name, info in methods().items() if issubclass(info.recipe, SparsePrefill) and not info.needs]
    parser.add_argument("--size", choices=SIZES, default="14m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--methods", default=",".join(every))
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--kernel-lengths", type=int, nargs="*", default=[4096, 8192, 16384])
    parser.add_argument("--lengths", type=int, nargs="*", default=[8192, 16384])
    parser.add_argument("--auto-lengths", type=int, nargs="*", default=[512, 1024, 2048, 4096, 8192])
    parser.add_argument("--auto-methods", default="block_top_k,xattention,vertical_slash")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--device", default="cpu", help="of the kernels; with cuda give no --lengths and --auto-lengths"
    )
    parser.add_argument("--name", default="sparse_prefill")
    return parser.parse_args()


def main() -> None:
    """Run everything and write it down."""
    args = parse()
    use_threads(args.threads)
    model = random_llama(args.size, DTYPES[args.dtype], 0)
    names = split_methods(args.methods)
    result = {
        **conditions(0), "size": args.size, "dtype": args.dtype, "rounds": args.rounds,
        "kernels": kernels(args.kernel_lengths, list(DTYPES), args.rounds, args.device),
        "inside": inside(model, args.lengths, names, args.keep, args.rounds),
        "auto": dispatched(model, args.auto_lengths, split_methods(args.auto_methods), [0.5, 0.25], args.rounds),
    }  # fmt: skip
    write(args.name, result, markdown(result))


if __name__ == "__main__":
    main()
