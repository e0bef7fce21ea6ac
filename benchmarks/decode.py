"""Decode time per token, end to end, and the bytes held: dense caches against ragged ones.

A random Llama decodes against caches that already hold a context. Filling them by a real prefill would take minutes,
so keys and values are random tensors put into the caches directly; sparing's are then evicted by the library's own
code, with random scores. Time does not depend on the values. All contestants run in one process, one after the
other in every round, and are compared round by round.
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    DTYPES,
    SIZES,
    Time,
    bytes_held,
    conditions,
    decode,
    header_text,
    median_ratio,
    medians,
    random_llama,
    read_bandwidth,
    table,
    timed,
    use_threads,
    write,
)
from transformers import DynamicCache, StaticCache

import sparing
from sparing.core.scorer import Softmax
from sparing.kernels import native
from sparing.kernels.attend import attend
from sparing.methods.kv.random import RandomScore

SPREAD = 1.2  # per-head budgets lie between e^-1.2 and e^1.2 times their (geometric) middle
ROOM = 512  # free slots of the static cache beyond the context


@dataclass
class Contestant:
    """A cache at work, and what was measured of it."""

    name: str
    model: Any
    cache: Any
    attach: bool
    position: int
    token: torch.Tensor = field(default_factory=lambda: torch.zeros(1, 1, dtype=torch.int64))
    times: list[Time] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """Decode and note the time."""
        if not self.attach:
            self.times.append(timed(lambda: self._decode(steps)))
            return
        # The session is entered outside of the clock: it costs once per generation, not per token.
        with sparing.use(self.model, sparing.Random()):
            self.times.append(timed(lambda: self._decode(steps)))

    def _decode(self, steps: int) -> None:
        self.token = decode(self.model, self.cache, self.position, steps, self.token)
        self.position += steps


def fill(cache: Any, config: Any, tokens: int, dtype: torch.dtype, seed: int) -> Any:
    """Put random keys and values into every layer of a cache."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, config.num_key_value_heads, tokens, config.head_dim)
    for layer in range(config.num_hidden_layers):
        keys, values = (torch.randn(shape, generator=generator).to(dtype) for _ in range(2))
        if isinstance(cache, StaticCache):
            cache.layers[layer].lazy_initialization(keys, values)
        cache.update(keys, values, layer)
    return cache


def evicted(
    model: Any, keep: float, per_head: bool, bits: int | None, tokens: int, dtype: torch.dtype, seed: int
) -> Any:
    """A cache that sparing has evicted, with random scores."""
    config = model.config
    heads = config.num_key_value_heads
    weights = [math.exp(SPREAD * (2 * head / (heads - 1) - 1)) for head in range(heads)] * config.num_hidden_layers
    uneven = sparing.Proportional(tuple(weights), floor=0.0, cap=3.0)
    method = sparing.Evict(keep, RandomScore(seed), uneven if per_head else sparing.Uniform(), bits=bits)
    cache = fill(sparing.use(model, method).new_cache(), config, tokens, dtype, seed)
    for layer in cache.evicting:
        layer.attended = True  # what the attention function notes when a real prompt is read
    cache.begin_observing(tokens, None)
    cache.evict()
    assert cache.plan.tokens_kept == int(keep * tokens + 0.5) * heads * config.num_hidden_layers
    return cache


def contestants(model: Any, tokens: int, keeps: list[float], dtype: torch.dtype, seed: int) -> list[Contestant]:
    """Everyone, in the order in which they run."""
    config = model.config

    def dense(cache: Any) -> Any:
        return fill(cache, config, tokens, dtype, seed)

    static = StaticCache(config=config, max_cache_len=tokens + ROOM)
    found = [
        Contestant("no context", model, fill(DynamicCache(config=config), config, 1, dtype, seed), False, 1),
        Contestant("dynamic", model, dense(DynamicCache(config=config)), False, tokens),
        Contestant("static", model, dense(static), False, tokens),
    ]
    for keep in keeps:
        for kind, bits in (("uniform", None), ("per-head", None), ("per-head", 8), ("per-head", 4)):
            cache = evicted(model, keep, kind == "per-head", bits, tokens, dtype, seed)
            name = f"sparing {kind} {keep:g}" + (f", {bits} bits" if bits else "")
            found.append(Contestant(name, model, cache, True, tokens))
    return found


def measure(found: list[Contestant], rounds: int, steps: int) -> None:
    """One untimed round, then the rounds, everyone in turn; every other round in reverse order."""
    for contestant in found:
        contestant.run(2)
        contestant.times.clear()
    for number in range(rounds):
        for contestant in found if number % 2 == 0 else reversed(found):
            contestant.run(steps)


def apart(cache: Any, config: Any, dtype: torch.dtype, rounds: int = 15) -> dict[str, float]:
    """CPU milliseconds that one token takes to append, and to attend to, in all layers of an evicted cache."""
    shape = (1, config.num_key_value_heads, 1, config.head_dim)
    new = torch.randn(shape).to(dtype)
    query = torch.randn(1, config.num_attention_heads, 1, config.head_dim).to(dtype)
    softmax = Softmax(config.head_dim**-0.5)
    stores = [layer.store.clone() for layer in cache.evicting]
    append, attention = [], []
    for _ in range(rounds):
        append.append(timed(lambda: [store.append(new, new, 0) for store in stores]))
        attention.append(timed(lambda: [attend(query, store, softmax) for store in stores]))
    return {"append_ms": medians(append)["cpu_ms"], "attend_ms": medians(attention)["cpu_ms"]}


def summarize(found: list[Contestant], steps: int, bandwidth: float) -> list[dict[str, Any]]:
    """A row per contestant."""
    by_name = {contestant.name: contestant for contestant in found}
    dynamic, static, floor = by_name["dynamic"], by_name["static"], by_name["no context"]
    floor_seconds = medians(floor.times, steps)["cpu_ms"] / 1000
    rows = []
    for each in found:
        held = bytes_held(each.cache)
        row: dict[str, Any] = {"name": each.name, **medians(each.times, steps), "bytes": held}
        row["bytes_share"] = held / bytes_held(dynamic.cache)
        row["speed_vs_dynamic"] = 1 / median_ratio(each.times, dynamic.times)
        row["speed_vs_dynamic_wall"] = 1 / median_ratio(each.times, dynamic.times, "wall")
        row["speed_vs_static"] = 1 / median_ratio(each.times, static.times)
        # What the cache adds to a token's time, against reading its bytes once at the machine's best; below 5 % of
        # the time without it, the difference is noise.
        added = row["cpu_ms"] / 1000 - floor_seconds
        if added > 0.05 * floor_seconds:
            row["cache_gb_per_s"] = held / added / 1e9
            row["share_of_read_bandwidth"] = held / added / bandwidth
        if each.attach:
            row |= apart(each.cache, each.model.config, each.model.dtype)
            uniform = by_name[each.name.replace("per-head", "uniform").partition(",")[0]]
            row["time_vs_uniform"] = median_ratio(each.times, uniform.times)
        row["rounds"] = [[time.wall, time.cpu] for time in each.times]
        rows.append(row)
    return rows


def markdown(contexts: dict[str, list[dict[str, Any]]], result: dict[str, Any]) -> str:
    """The result as text."""
    parts = [
        header_text("Decode time per token", result),
        f"- Model: random Llama, {result['parameters'] / 1e6:.0f}M parameters ({result['size']}), {result['dtype']}; "
        f"{result['rounds']} rounds of {result['steps']} tokens; {result['kernel']}",
        f"- Read bandwidth of one thread (best of 7 sums over 256 MiB, CPU time): {result['bandwidth'] / 1e9:.1f} GB/s",
        "- Contexts are random tensors put into the caches, not prefilled; times do not depend on their values",
        "- Speeds are medians of ratios within a round, CPU time unless marked wall; GB/s counts the bytes held over "
        "the CPU time beyond that of a model without context; append and attend are CPU ms of one token in all layers",
        "",
    ]

    def number(row: dict[str, Any], key: str, form: str) -> str:
        return format(row[key], form) if key in row else "-"

    for tokens, rows in contexts.items():
        cells = [
            [
                row["name"], f"{row['cpu_ms']:.1f}", f"{row['wall_ms']:.1f}", f"{row['bytes'] / 2**20:.1f}",
                f"{row['bytes_share']:.3f}", f"{row['speed_vs_dynamic']:.2f}", f"{row['speed_vs_dynamic_wall']:.2f}",
                f"{row['speed_vs_static']:.2f}", number(row, "time_vs_uniform", ".3f"),
                number(row, "append_ms", ".2f"), number(row, "attend_ms", ".2f"),
                number(row, "cache_gb_per_s", ".1f"), number(row, "share_of_read_bandwidth", ".0%"),
            ]
            for row in rows
        ]  # fmt: skip
        header = [
            "cache", "CPU ms", "wall ms", "MiB", "share", "× dynamic", "× dynamic (wall)", "× static",
            "time / uniform", "append ms", "attend ms", "GB/s", "of read limit",
        ]  # fmt: skip
        parts += [f"## {tokens} tokens", "", table(header, cells), ""]
    return "\n".join(parts)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="100m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 16384])
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=8, help="tokens per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="decode", help="topic in the names of the result files")
    return parser.parse_args()


def main() -> None:
    """Run and write the results."""
    args = parse()
    use_threads(args.threads)
    dtype = DTYPES[args.dtype]
    model = random_llama(args.size, dtype, args.seed)
    bandwidth = read_bandwidth()
    contexts = {}
    for tokens in args.tokens:
        found = contestants(model, tokens, args.keep, dtype, args.seed)
        measure(found, args.rounds, args.steps)
        contexts[str(tokens)] = summarize(found, args.steps, bandwidth)
    result = {
        **conditions(args.seed), "size": args.size, "dtype": args.dtype,
        "parameters": sum(p.numel() for p in model.parameters()), "rounds": args.rounds, "steps": args.steps,
        "bandwidth": bandwidth, "contexts": contexts, "kernel": native.status(),
    }  # fmt: skip
    write(args.name, result, markdown(contexts, result))


if __name__ == "__main__":
    main()
