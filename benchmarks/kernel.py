"""Attention of one decoded token alone: ragged lanes and codes, against the dense cache's SDPA.

One layer, random tensors, no model. The dense baseline is scaled_dot_product_attention over all tokens with the query
heads of a group packed as rows, which is how transformers decodes. Lanes are uneven, as per-head budgets make them.
Every contestant has as many copies of its cache as make 128 MiB and takes the next one at every call, so that nothing
is read from the processor's own caches. All take turns in every round. With `--device cuda` everything lies on the
GPU and the clock is the wall's, until the GPU is done.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    DTYPES,
    Time,
    conditions,
    header_text,
    median_ratio,
    medians,
    read_bandwidth,
    table,
    timed,
    use_threads,
    write,
)
from torch.nn import functional as F

from sparing.core.budget import round_to_total
from sparing.core.scorer import Softmax
from sparing.kernels import native
from sparing.kernels.attend import attend
from sparing.kernels.compact import CompactStore, Store
from sparing.kernels.ragged import RaggedStore

SPREAD = 1.2  # per-head budgets lie between e^-1.2 and e^1.2 times their (geometric) middle
COLD = 2**27


def synchronize(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device == "cuda":
        torch.cuda.synchronize()


@dataclass
class Contestant:
    """One way to attend, and what was measured of it."""

    name: str
    bytes: int
    calls: list[Callable[[], Any]]
    times: list[Time] = field(default_factory=list)
    turn: int = 0

    def run(self, count: int, device: str) -> None:
        """Call so many times, each on the next copy."""
        synchronize(device)
        self.times.append(timed(lambda: ([self._next()() for _ in range(count)], synchronize(device))))

    def _next(self) -> Callable[[], Any]:
        self.turn += 1
        return self.calls[self.turn % len(self.calls)]


def contestant(name: str, size: int, copy: Callable[[], Any], call: Callable[[Any], Any]) -> Contestant:
    """One with enough copies of its cache."""
    copies = [copy() for _ in range(max(math.ceil(COLD / size), 2))]
    return Contestant(name, size, [lambda mine=mine: call(mine) for mine in copies])


def contestants(args: argparse.Namespace, dtype: torch.dtype) -> list[Contestant]:
    """The dense cache, and ragged lanes and codes at every budget."""
    keys, values, query = tensors(args, dtype)
    grouped, softmax = query.view(1, args.kv_heads, -1, args.dim), Softmax(args.dim**-0.5)

    def sdpa(pair: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return F.scaled_dot_product_attention(grouped, *pair, scale=softmax.scaling)

    size = keys.nbytes + values.nbytes
    found = [contestant("dense", size, lambda: (keys.clone(), values.clone()), sdpa)]
    for keep in args.keep:
        plain = ragged(args, keys, values, keep)
        stores: dict[str, Store] = {"ragged": plain}
        stores |= {f"{bits} bits": CompactStore.pack(plain.clone(), bits) for bits in (8, 4)}
        found += [
            contestant(f"{name} {keep:g}", store.nbytes, store.clone, lambda mine: attend(query, mine, softmax))
            for name, store in stores.items()
        ]
    return found


def ragged(args: argparse.Namespace, keys: torch.Tensor, values: torch.Tensor, keep: float) -> RaggedStore:
    """Lanes of uneven length."""
    heads = args.kv_heads
    weights = torch.tensor([math.exp(SPREAD * (2 * head / (heads - 1) - 1)) for head in range(heads)])
    lengths = round_to_total(weights, int(keep * args.tokens + 0.5) * heads, high=args.tokens).tolist()
    positions = torch.arange(args.tokens, device=keys.device).expand(1, heads, -1)
    return RaggedStore.pack([[torch.arange(n) for n in lengths]], keys, values, positions, None)


def tensors(args: argparse.Namespace, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Random keys, values and a query."""
    g = torch.Generator().manual_seed(args.seed)
    keys, values = (torch.randn(1, args.kv_heads, args.tokens, args.dim, generator=g).to(dtype) for _ in range(2))
    query = torch.randn(1, args.heads, 1, args.dim, generator=g).to(dtype)
    return keys.to(args.device), values.to(args.device), query.to(args.device)


def measure(args: argparse.Namespace, dtype: torch.dtype, bandwidth: float) -> list[dict[str, Any]]:
    """A row per contestant."""
    found = contestants(args, dtype)
    for each in found:
        each.run(1, args.device)
        each.times.clear()
    for number in range(args.rounds):
        for each in found if number % 2 == 0 else reversed(found):
            each.run(args.calls, args.device)
    rows, clock = [], clock_of(args.device)
    for each in found:
        times = medians(each.times, args.calls)
        rate = each.bytes / times[f"{clock}_ms"] * 1000
        row = {"name": each.name, **times, "bytes": each.bytes, "gb_per_s": rate / 1e9, "of_read": rate / bandwidth}
        row["speed"] = 1 / median_ratio(each.times, found[0].times, clock)
        row["rounds"] = [[time.wall, time.cpu] for time in each.times]
        rows.append(row)
    return rows


def clock_of(device: str) -> str:
    """What is compared: CPU time, of which others take nothing; a GPU's work takes none of it."""
    return "wall" if device == "cuda" else "cpu"


def gpu_bandwidth(mebibytes: int = 1024, rounds: int = 7) -> float:
    """Bytes per second at which the GPU reads its memory: the best of several sums over a big tensor."""
    data = torch.ones(mebibytes * 2**18, device="cuda")
    data.sum()
    synchronize("cuda")
    return data.nbytes / min(timed(lambda: (data.sum(), synchronize("cuda"))).wall for _ in range(rounds))


def markdown(result: dict[str, Any]) -> str:
    """The result as text."""
    shape, clock = result["shape"], clock_of(result["device"])
    name = {"cpu": "CPU", "wall": "wall"}[clock]
    read = "one thread (best of 7 sums over 256 MiB" if clock == "cpu" else "the GPU (best of 7 sums over 1 GiB"
    parts = [
        header_text("Attention of one decoded token", result),
        f"- One layer, {shape['heads']} query heads, {shape['kv_heads']} KV heads of {shape['dim']}, "
        f"{shape['tokens']} tokens; {result['rounds']} rounds of {result['calls']} calls; {native.status()}",
        f"- Read bandwidth of {read}, {name} time): {result['bandwidth'] / 1e9:.1f} GB/s",
        f"- Speed is the median over the rounds of the dense cache's {name} time / the contestant's",
        "",
    ]
    for dtype, rows in result["dtypes"].items():
        cells = [
            [r["name"], f"{r[clock + '_ms']:.3f}", f"{r['bytes'] / 2**20:.1f}", f"{r['speed']:.2f}",
             f"{r['gb_per_s']:.1f}", f"{r['of_read']:.0%}"] for r in rows
        ]  # fmt: skip
        header = ["cache, keep", f"{name} ms", "MiB", "× dense", "GB/s", "of read limit"]
        parts += [f"## {dtype}", "", table(header, cells), ""]
    return "\n".join(parts)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.1, 0.25, 0.5, 0.9, 1.0])
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=list(DTYPES))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--calls", type=int, default=4, help="per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--name", default="kernel", help="topic in the names of the result files")
    return parser.parse_args()


@torch.no_grad()
def main() -> None:
    """Run and write the results."""
    args = parse()
    use_threads(args.threads)
    bandwidth = gpu_bandwidth() if args.device == "cuda" else read_bandwidth()
    dtypes = {name: measure(args, DTYPES[name], bandwidth) for name in args.dtype}
    result = {
        **conditions(args.seed), "device": args.device, "rounds": args.rounds,
        "calls": args.calls, "bandwidth": bandwidth, "kernel": native.status(), "dtypes": dtypes,
        "shape": {name: getattr(args, name) for name in ("heads", "kv_heads", "dim", "tokens")},
    }  # fmt: skip
    if args.device == "cuda":
        result["hardware"]["cpu"] = torch.cuda.get_device_name()
    write(args.name, result, markdown(result))


if __name__ == "__main__":
    main()
