"""sparing against kvpress: what is kept, bytes held and decode time per token, on the same model and prompt.

kvpress 0.5.5 does not run on the transformers that sparing uses, so it gets an environment of its own (made on the
first run, in a folder that git ignores) and a process of its own. The two processes take turns, one contestant at a
time, in every round. As their versions differ, times are compared as ratios to each one's own dense cache.

Methods are set up as alike as their arguments allow. What they keep is compared once more "aligned": with the known
differences taken out, by small subclasses of the presses in kvpress_driver.py or by `Pair.aligned` in kvpress_pairs.py.
Both libraries also have CaM, which is not compared: kvpress' merges only while decoding, after a dense prompt. Wrappers
of kvpress (key rotation, blocks, chunks, CriticalAdaKV) are not compared on their own.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
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
    random_prompt,
    table,
    timed,
    use_threads,
    write,
)
from kvpress_pairs import DRAWN, METHODS
from transformers import DynamicCache, StaticCache

import sparing
from sparing.methods.kv.leverage import LeverageScore
from sparing.methods.kv.streaming_llm import Recency

HERE = Path(__file__).parent
ENVIRONMENT = HERE.parent / ".bench-kvpress"
PACKAGES = ["kvpress==0.5.5", "transformers==5.2.0", "torch==2.13.0"]
ROOM = 512  # free slots of the static cache beyond the prompt


class Kvpress:
    """The other process."""

    def __init__(self, setting: dict[str, Any]) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(setting["threads"])}
        environment.pop("PYTHONPATH", None)
        self.process = subprocess.Popen(
            [_python(), str(HERE / "kvpress_driver.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        greeting = self._ask(setting)
        self.versions, self.known = greeting["versions"], greeting["names"]
        self.names = [name for name in self.known if not name.endswith(" aligned")]
        self.instruction, self.gates = tuple(greeting["instruction"]), tuple(map(tuple, greeting["gates"]))

    def kept(self, name: str, seed: int) -> dict[str, Any]:
        """[layer][KV head] → positions ("tokens") and "channels" of keys."""
        return self._ask({"do": "kept", "name": name, "seed": seed})

    def prefill(self, name: str) -> tuple[Time, int]:
        """Read the prompt; the time and the bytes held afterwards."""
        answer = self._ask({"do": "prefill", "name": name})
        return Time(answer["wall"], answer["cpu"]), answer["bytes"]

    def decode(self, name: str, steps: int) -> tuple[Time, int]:
        """Decode some tokens."""
        answer = self._ask({"do": "decode", "name": name, "steps": steps})
        return Time(answer["wall"], answer["cpu"]), answer["bytes"]

    def close(self) -> None:
        """End the process."""
        self.process.communicate()

    def _ask(self, request: dict[str, Any]) -> dict[str, Any]:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the kvpress process ended; see its message above")
        answer: dict[str, Any] = json.loads(line)
        return answer


def _python() -> str:
    """The interpreter of kvpress' environment, which is made if it is not there."""
    python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(ENVIRONMENT)], check=True)
    found = "import importlib.util as u, sys; sys.exit(u.find_spec('kvpress') is None)"
    if subprocess.run([str(python), "-c", found]).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "-q", *PACKAGES], check=True)
    return str(python)


class Sparing:
    """This process, with the same answers as `Kvpress`."""

    def __init__(self, setting: dict[str, Any], model: Any, kvpress: Kvpress) -> None:
        self.model, self.setting = model, setting
        self.prompt = random_prompt(setting["tokens"], setting["seed"])
        self.methods, self.aligned = {}, {}
        for name, keep in setting["methods"]:
            pair, label = METHODS[name], f"{name} {keep:g}"
            self.methods[label] = _method(pair.spec, keep, kvpress)
            self.aligned[label] = _method(pair.aligned or pair.spec, keep, kvpress)
            if name == "leverage":
                self.aligned[label] = sparing.Evict(keep, scorer=LeverageScore(sketch=0, first=0, recent=0))
        self.names = ["dynamic", "static", *self.methods]
        self.caches: dict[str, Any] = {}
        self.positions: dict[str, int] = {}
        self.tokens: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def prefill(self, name: str) -> tuple[Time, int]:
        """Read the prompt; the time, scoring and eviction included, and the bytes held afterwards."""
        if name in self.methods:
            with sparing.use(self.model, self.methods[name]) as session:
                cache: Any = session.new_cache()
                time = timed(lambda: (self._read(cache), session.report(cache)))
        else:
            config = self.model.config
            room = self.prompt.shape[1] + ROOM
            cache = StaticCache(config=config, max_cache_len=room) if name == "static" else DynamicCache(config=config)
            time = timed(lambda: self._read(cache))
        self.caches[name], self.positions[name] = cache, self.prompt.shape[1]
        self.tokens[name] = torch.zeros(1, 1, dtype=torch.int64)
        return time, bytes_held(self.caches[name])

    def _read(self, cache: Any) -> Any:
        return self.model(self.prompt, past_key_values=cache, logits_to_keep=1)

    @torch.no_grad()
    def kept(self, name: str, *, aligned: bool) -> dict[str, Any]:
        """[layer][KV head] → positions ("tokens") and "channels" of keys."""
        with sparing.use(self.model, (self.aligned if aligned else self.methods)[name]) as session:
            cache = session.new_cache()
            self._read(cache)
            plan = session.report(cache).plan
        assert plan is not None
        channels = []
        for layer in cache.layers:
            coding = getattr(layer.store, "coding", None)
            chosen = None if coding is None or coding.channels is None else coding.channels.tolist()
            channels.append(chosen or [list(range(self.model.config.head_dim))] * self.model.config.num_key_value_heads)
        return {"tokens": [[head.tolist() for head in layer.kept[0]] for layer in plan.layers], "channels": channels}

    def decode(self, name: str, steps: int) -> tuple[Time, int]:
        """Decode some tokens."""

        def work() -> None:
            self.tokens[name] = decode(self.model, self.caches[name], self.positions[name], steps, self.tokens[name])

        if name in self.methods:
            with sparing.use(self.model, self.methods[name]):
                time = timed(work)
        else:
            time = timed(work)
        self.positions[name] += steps
        return time, bytes_held(self.caches[name])


def _method(spec: str, keep: float, kvpress: Kvpress) -> sparing.Method:
    """A method of sparing; the instruction and the gates are kvpress'."""
    if spec == "duo":
        return sparing.Evict(keep, scorer=Recency(16), allocator=sparing.FullHeads(kvpress.gates, 16 + 64))
    method = sparing.parse_method(spec, keep)
    return replace(method, instruction=kvpress.instruction) if spec == "kvzip" else method


@dataclass
class Record:
    """What was measured of one contestant."""

    prefills: list[Time] = field(default_factory=list)
    decodes: list[Time] = field(default_factory=list)
    bytes: int = 0  # right after the prompt
    bytes_decoding: int = 0


Records = dict[str, dict[str, Record]]


def overlap(mine: dict[str, Any], theirs: dict[str, Any], what: str) -> float:
    """Jaccard overlap of the sets that the two keep, mean over layers and KV heads."""
    pairs = [
        (set(a), set(b)) for layers in zip(mine[what], theirs[what], strict=True) for a, b in zip(*layers, strict=True)
    ]
    return sum(len(a & b) / len(a | b) for a, b in pairs) / len(pairs)


def compare_kept(kvpress: Kvpress, own: Sparing, seed: int) -> list[dict[str, Any]]:
    """A row per contestant, and another for the channels if some are pruned."""
    rows = []
    for name in own.methods:
        mine, theirs = own.kept(name, aligned=False), kvpress.kept(name, seed)
        aligned = None
        if f"{name} aligned" in kvpress.known:
            aligned = own.kept(name, aligned=True), kvpress.kept(f"{name} aligned", seed)
        again = kvpress.kept(name, seed + 1) if name.split()[0] in DRAWN else None
        for what in ("tokens", "channels") if name.startswith("think") else ("tokens",):
            rows.append(
                {
                    "name": name, "what": what, "overlap": overlap(mine, theirs, what),
                    "aligned": overlap(*aligned, what) if aligned else None,
                    "kvpress_other_seed": overlap(theirs, again, what) if again else None,
                    "kept": {"kvpress": _total(theirs[what]), "sparing": _total(mine[what])},
                }
            )  # fmt: skip
    return rows


def _total(kept: list[list[list[int]]]) -> int:
    return sum(len(head) for layer in kept for head in layer)


def measure(sides: dict[str, Any], rounds: int, steps: int, prefill_rounds: int) -> Records:
    """The sides take turns, contestant by contestant; every other round goes backwards, against slow drifts."""
    records: Records = {side: {name: Record() for name in runner.names} for side, runner in sides.items()}
    names = sides["sparing"].names
    for number in range(prefill_rounds):
        for name in _order(names, number):
            for side in _order(list(sides), number):
                time, size = sides[side].prefill(name)
                records[side][name].prefills.append(time)
                records[side][name].bytes = size
    for number in range(rounds + 1):
        for name in _order(names, number):
            for side in _order(list(sides), number):
                time, size = sides[side].decode(name, steps)
                records[side][name].bytes_decoding = size
                if number:  # the first round warms up
                    records[side][name].decodes.append(time)
    return records


def _order(names: list[str], number: int) -> list[str]:
    return names if number % 2 == 0 else names[::-1]


def summarize(records: Records, steps: int) -> list[dict[str, Any]]:
    """A row per side and contestant, ratios against the same side's own dense caches."""
    rows = []
    for side, by_name in records.items():
        dynamic, static = by_name["dynamic"], by_name["static"]
        for name, record in by_name.items():
            rows.append(
                {
                    "library": side, "name": name, "bytes": record.bytes, "bytes_share": record.bytes / dynamic.bytes,
                    "bytes_share_decoding": record.bytes_decoding / dynamic.bytes_decoding,
                    **medians(record.decodes, steps),
                    "time_vs_dynamic": median_ratio(record.decodes, dynamic.decodes),
                    "time_vs_static": median_ratio(record.decodes, static.decodes),
                    "time_vs_dynamic_wall": median_ratio(record.decodes, dynamic.decodes, "wall"),
                    "prefill_cpu_s": medians(record.prefills)["cpu_ms"] / 1000,
                    "prefill_vs_dynamic": median_ratio(record.prefills, dynamic.prefills),
                    "rounds": [[time.wall, time.cpu] for time in record.decodes],
                }
            )  # fmt: skip
    return rows


def kept_table(rows: list[dict[str, Any]]) -> str:
    """What is kept, and why it differs."""

    def number(value: float | None) -> str:
        return "" if value is None else f"{value:.3f}"

    cells = [
        [
            row["name"] + (", key channels" if row["what"] == "channels" else ""),
            row["kept"]["kvpress"], row["kept"]["sparing"], number(row["overlap"]), number(row["aligned"]),
            number(row["kvpress_other_seed"]), METHODS[row["name"].split()[0]].why,
        ]
        for row in rows
    ]  # fmt: skip
    header = ["method", "kept, kvpress", "sparing", "overlap", "aligned", "kvpress, other seed", "why they differ"]
    return table(header, cells)


def cost_table(rows: list[dict[str, Any]]) -> str:
    """Bytes and times, the libraries side by side."""
    formats = {
        "bytes_share": ".3f", "bytes_share_decoding": ".3f", "cpu_ms": ".2f", "time_vs_dynamic": ".2f",
        "time_vs_static": ".2f", "prefill_vs_dynamic": ".2f",
    }  # fmt: skip
    titles = ["bytes", "bytes, decoding", "ms per token", "time : dynamic", "time : static", "prefill : dynamic"]
    sides = [{row["name"]: row for row in rows if row["library"] == side} for side in ("kvpress", "sparing")]
    cells = [
        [name, *(" / ".join(f"{side[name][key]:{how}}" for side in sides) for key, how in formats.items())]
        for name in sides[0]
    ]
    return table(["cache", *titles], cells)


def markdown(result: dict[str, Any]) -> str:
    """The result as text."""
    other = ", ".join(f"{name} {version}" for name, version in result["kvpress_versions"].items())
    return "\n".join(
        [
            header_text("sparing against kvpress", result),
            f"- kvpress' own environment: {other}",
            f"- Model: random Llama ({result['size']}), {result['dtype']}; prompt of {result['tokens']} random tokens, "
            f"really prefilled {result['prefill_rounds']} times; {result['rounds']} rounds of {result['steps']} tokens",
            "",
            "## What is kept",
            "",
            "Overlap is Jaccard's (common / either), mean over layers and KV heads; kept counts are over all of them. "
            "Aligned: with the difference named in the last column taken out. Weights and tokens are random: this "
            "compares definitions, not quality.",
            "",
            kept_table(result["kept"]),
            "",
            "## What it costs",
            "",
            "Every cell: kvpress / sparing. Bytes as a share of the same library's dense dynamic cache, right after "
            "the prompt and at the last decoded token: all tensors in the cache, slack and bookkeeping included; the "
            "indices of masked keys that kvpress keeps elsewhere are not counted. kvpress' kvzip is a slice of the "
            "cache with the replay until the first decoded token. Times are CPU time; ratios are medians of the "
            "ratios within a round, each against the same library's own dense cache: below 1 is faster than no "
            "compression.",
            "",
            cost_table(result["rows"]),
            "",
        ]
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="14m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25])
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prefill-rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=16, help="tokens per round")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--name", default="compare_kvpress", help="topic in the names of the result files")
    return parser.parse_args()


def main() -> None:
    """Run and write the results."""
    args = parse()
    use_threads(args.threads)
    pairs = [(method, keep) for keep in args.keep for method in args.methods]
    setting: dict[str, Any] = {
        "threads": args.threads, "tokens": args.tokens, "seed": args.seed, "room": ROOM, "methods": pairs,
    }  # fmt: skip
    model = random_llama(args.size, DTYPES[args.dtype], args.seed)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kvpress = Kvpress({**setting, "model": folder})
        own = Sparing(setting, model, kvpress)
        kept = compare_kept(kvpress, own, args.seed)
        records = measure({"kvpress": kvpress, "sparing": own}, args.rounds, args.steps, args.prefill_rounds)
        kvpress.close()
    result = {
        **conditions(args.seed), "kvpress_versions": kvpress.versions, "size": args.size, "dtype": args.dtype,
        "tokens": args.tokens, "prefill_rounds": args.prefill_rounds, "rounds": args.rounds, "steps": args.steps,
        "kept": kept, "why": {name: pair.why for name, pair in METHODS.items()}, "rows": summarize(records, args.steps),
    }  # fmt: skip
    write(args.name, result, markdown(result))


if __name__ == "__main__":
    main()
