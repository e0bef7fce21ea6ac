"""What scoring and evicting cost: a real prefill, dense, and with every registered method at work.

The contestants read the same random prompt, one after the other in every round, and are compared round by round with
transformers' own dynamic cache. Reading includes what a scorer observes; evicting is the scoring, the allocation and
the copy into ragged storage. On small models scoring weighs more than on large ones, whose projections cost more per
token while scores do not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from common import (
    DTYPES,
    SIZES,
    Time,
    conditions,
    header_text,
    median_ratio,
    medians,
    random_llama,
    random_prompt,
    table,
    timed,
    use_threads,
    write,
)
from transformers import DynamicCache

import sparing
from sparing.core.method import methods

TARGET = 0.05


@dataclass
class Record:
    """What was measured of one contestant."""

    reading: list[Time] = field(default_factory=list)
    evicting: list[Time] = field(default_factory=list)

    @property
    def total(self) -> list[Time]:
        """Reading and evicting together."""
        pairs = zip(self.reading, self.evicting, strict=True)
        return [Time(a.wall + b.wall, a.cpu + b.cpu) for a, b in pairs]


@torch.no_grad()
def run(model: Any, prompt: torch.Tensor, method: sparing.Method | None, record: Record) -> None:
    """Prefill once, densely or under a method, and note the times."""

    def read(cache: Any) -> Callable[[], Any]:
        return lambda: model(prompt, past_key_values=cache, logits_to_keep=1)

    if method is None:
        record.reading.append(timed(read(DynamicCache(config=model.config))))
        record.evicting.append(Time(0.0, 0.0))
        return
    with sparing.use(model, method) as session:
        cache = session.new_cache()
        record.reading.append(timed(read(cache)))
        record.evicting.append(timed(cache.report))
        drops = method.parts().frees and not method.budget.keeps_all  # others only choose what to read
        assert not drops or cache.plan is not None


def measure(model: Any, prompt: torch.Tensor, keep: float, rounds: int) -> dict[str, Record]:
    """One untimed prefill, then the rounds; every other one in reverse order."""
    found: dict[str, sparing.Method | None] = {"dense": None, "nothing dropped (keep=1)": sparing.Random(1.0)}
    ready = (i.name for i in methods().values() if i.family == "kv_cache" and not (i.needs or i.needs_draft))
    found |= {name: sparing.parse_method(name, keep) for name in ready}
    records = {name: Record() for name in found}
    run(model, prompt, None, Record())
    for number in range(rounds):
        for name in found if number % 2 == 0 else reversed(found):
            run(model, prompt, found[name], records[name])
    return records


def summarize(records: dict[str, Record]) -> list[dict[str, Any]]:
    """A row per contestant."""
    dense = records["dense"].total
    return [
        {
            "name": name,
            **medians(record.total),
            "evicting_cpu_ms": medians(record.evicting)["cpu_ms"],
            "overhead": median_ratio(record.total, dense) - 1,
            "overhead_wall": median_ratio(record.total, dense, "wall") - 1,
            "rounds": [[time.wall, time.cpu] for time in record.total],
        }
        for name, record in records.items()
    ]


def markdown(result: dict[str, Any]) -> str:
    """The result as text."""
    header = [
        "method", "CPU ms", "of it evicting", "evicting / dense", "overhead", "overhead (wall)",
        f"at most {TARGET:.0%}",
    ]  # fmt: skip
    dense = next(row["cpu_ms"] for row in result["rows"] if row["name"] == "dense")
    cells = [
        [
            row["name"], f"{row['cpu_ms']:.0f}", f"{row['evicting_cpu_ms']:.0f}",
            f"{row['evicting_cpu_ms'] / dense:.1%}", f"{row['overhead']:+.1%}",
            f"{row['overhead_wall']:+.1%}", "yes" if row["overhead"] <= TARGET else "no",
        ]
        for row in result["rows"]
    ]  # fmt: skip
    return "\n".join(
        [
            header_text("The cost of scoring", result),
            f"- Model: random Llama, {result['parameters'] / 1e6:.0f}M parameters ({result['size']}), "
            f"{result['dtype']}; prompt of {result['tokens']} random tokens, really prefilled; "
            f"keep {result['keep']:g}; {result['rounds']} rounds",
            "- Overheads are medians of ratios to dense within a round, CPU time unless marked wall; evicting alone is "
            "short and so less noisy, but leaves out what a scorer observes while reading",
            "",
            table(header, cells),
            "",
        ]
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="30m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--keep", type=float, default=0.25)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="prefill", help="topic in the names of the result files")
    return parser.parse_args()


def main() -> None:
    """Run and write the results."""
    args = parse()
    use_threads(args.threads)
    model = random_llama(args.size, DTYPES[args.dtype], args.seed)
    records = measure(model, random_prompt(args.tokens, args.seed), args.keep, args.rounds)
    result = {
        **conditions(args.seed), "size": args.size, "dtype": args.dtype,
        "parameters": sum(p.numel() for p in model.parameters()), "tokens": args.tokens, "keep": args.keep,
        "rounds": args.rounds, "rows": summarize(records),
    }  # fmt: skip
    write(args.name, result, markdown(result))


if __name__ == "__main__":
    main()
