"""sparing against kvpress: bytes held and decode time per token, on the same model and prompt.

kvpress 0.5.5 does not run on the transformers that sparing uses, so it gets an environment of its own (made on the
first run, in a folder that git ignores) and a process of its own. The two processes take turns, one contestant at a
time, in every round. As their versions differ, times are compared as ratios to each one's own dense cache.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import torch
from common import (
    DTYPES,
    SIZES,
    Time,
    bytes_held,
    command,
    decode,
    hardware,
    header_text,
    median_ratio,
    medians,
    random_llama,
    random_prompt,
    table,
    timed,
    use_threads,
    versions,
    write,
)
from transformers import DynamicCache, StaticCache

import sparing

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
        self.versions, self.names = greeting["versions"], greeting["names"]

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

    def _ask(self, request: dict[str, Any]) -> Any:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit("the kvpress process ended; see its message above")
        return json.loads(line)


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

    def __init__(self, setting: dict[str, Any], model: Any) -> None:
        self.model, self.setting = model, setting
        self.prompt = random_prompt(setting["tokens"], setting["seed"])
        self.methods = {f"{name} {keep:g}": sparing.parse_method(name, keep) for name, keep in setting["methods"]}
        self.names = ["dynamic", "static", *self.methods]
        self.versions = versions("torch", "transformers") | {"sparing": sparing.__version__}
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

    def _read(self, cache: Any) -> None:
        self.model(self.prompt, past_key_values=cache, logits_to_keep=1)

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

    def close(self) -> None:
        """Nothing to end."""


@dataclass
class Record:
    """What was measured of one contestant."""

    prefills: list[Time] = field(default_factory=list)
    decodes: list[Time] = field(default_factory=list)
    bytes: int = 0


Records = dict[str, dict[str, Record]]


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
                time, _ = sides[side].decode(name, steps)
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


def markdown(result: dict[str, Any]) -> str:
    """The result as text."""
    header = [
        "cache", "library", "MiB", "share", "CPU ms", "time / dynamic", "(wall)", "time / static", "prefill / dynamic",
    ]  # fmt: skip
    order = [row["name"] for row in result["rows"] if row["library"] == "sparing"]
    cells = [
        [
            row["name"], row["library"], f"{row['bytes'] / 2**20:.2f}", f"{row['bytes_share']:.3f}",
            f"{row['cpu_ms']:.2f}", f"{row['time_vs_dynamic']:.2f}", f"{row['time_vs_dynamic_wall']:.2f}",
            f"{row['time_vs_static']:.2f}", f"{row['prefill_vs_dynamic']:.2f}",
        ]
        for row in sorted(result["rows"], key=lambda row: order.index(row["name"]))
    ]  # fmt: skip
    other = ", ".join(f"{name} {version}" for name, version in result["kvpress_versions"].items())
    return "\n".join(
        [
            header_text("sparing against kvpress", result),
            f"- kvpress' own environment: {other}",
            f"- Model: random Llama ({result['size']}), {result['dtype']}; prompt of {result['tokens']} random tokens, "
            f"really prefilled {result['prefill_rounds']} times; {result['rounds']} rounds of {result['steps']} tokens",
            "- Ratios are medians within a round, CPU time unless marked wall, each against the same library's own "
            "dense cache: below 1 is faster than no compression",
            "- Bytes right after the prompt: kvpress' keys and values; sparing's with slack and bookkeeping. What "
            "kvpress keeps beside the cache (the indices of masked keys) is not counted",
            "",
            table(header, cells),
            "",
        ]
    )


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="14m")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.5, 0.25, 0.1])
    parser.add_argument("--methods", nargs="+", default=["snapkv", "knorm", "expected_attention", "adakv"])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--prefill-rounds", type=int, default=4)
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
        sides = {"kvpress": Kvpress({**setting, "model": folder}), "sparing": Sparing(setting, model)}
        records = measure(sides, args.rounds, args.steps, args.prefill_rounds)
        sides["kvpress"].close()
    result = {
        "hardware": hardware(), "versions": sides["sparing"].versions, "kvpress_versions": sides["kvpress"].versions,
        "command": command(), "seed": args.seed, "date": str(date.today()), "size": args.size, "dtype": args.dtype,
        "tokens": args.tokens, "prefill_rounds": args.prefill_rounds, "rounds": args.rounds, "steps": args.steps,
        "rows": summarize(records, args.steps),
    }  # fmt: skip
    write(args.name, result, markdown(result))


if __name__ == "__main__":
    main()
