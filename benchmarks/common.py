"""What the benchmarks share: random models, clocks, the machine's description, and the files they write.

Imports torch and transformers only, so that the same code runs in an environment without sparing.
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

RESULTS = Path(__file__).parent / "results"

# layers, hidden, intermediate, query heads, KV heads; the head size is 64 everywhere.
SIZES = {
    "100m": (8, 1024, 2816, 16, 4),
    "30m": (6, 576, 1536, 9, 3),
    "14m": (4, 512, 1408, 8, 4),
}
VOCABULARY = 8192
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


# -- models ---------------------------------------------------------------------------------------------------------


def random_llama(size: str, dtype: torch.dtype, seed: int) -> Any:
    """A Llama of the given size with random weights, loaded for sdpa."""
    layers, hidden, intermediate, query_heads, kv_heads = SIZES[size]
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        max_position_embeddings=65536,
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    torch.manual_seed(seed)
    return transformers.LlamaForCausalLM(config).to(dtype).eval()


def random_prompt(tokens: int, seed: int) -> Tensor:
    """(1, tokens) ids."""
    return torch.randint(0, VOCABULARY, (1, tokens), generator=torch.Generator().manual_seed(seed))


# -- clocks ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Time:
    """One measurement: seconds on the wall, and of this process' CPU."""

    wall: float
    cpu: float


def timed(work: Callable[[], Any]) -> Time:
    """Run once. Garbage collection is kept out, so that no contestant pays for another's garbage."""
    gc.collect()
    gc.disable()
    try:
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        return Time(time.perf_counter() - wall, time.process_time() - cpu)
    finally:
        gc.enable()


def medians(times: Sequence[Time], scale: float = 1.0) -> dict[str, float]:
    """Median wall and CPU milliseconds, each divided by `scale` (e.g. the tokens decoded)."""
    return {
        "wall_ms": statistics.median(t.wall for t in times) * 1000 / scale,
        "cpu_ms": statistics.median(t.cpu for t in times) * 1000 / scale,
    }


def median_ratio(times: Sequence[Time], baseline: Sequence[Time], clock: str = "cpu") -> float:
    """Median over the rounds of time / baseline of the same round: noise that lasts a round cancels."""
    pairs = zip(times, baseline, strict=True)
    return statistics.median(getattr(mine, clock) / getattr(other, clock) for mine, other in pairs)


def read_bandwidth(mebibytes: int = 256, rounds: int = 7) -> float:
    """Bytes per second (CPU time) at which one thread reads memory: the best of several sums over a big tensor."""
    data = torch.ones(mebibytes * 2**18)
    return data.nbytes / min(timed(data.sum).cpu for _ in range(rounds))


# -- tokens ---------------------------------------------------------------------------------------------------------


@torch.no_grad()
def decode(model: Any, cache: Any, start: int, count: int, token: Tensor) -> Tensor:
    """Feed `count` tokens greedily, one by one, the first at position `start`; returns the next token.

    Positions are passed, since a cache that was shortened in place has lost count of them.
    """
    for position in range(start, start + count):
        positions = torch.tensor([[position]])
        logits = model(input_ids=token, past_key_values=cache, position_ids=positions, use_cache=True).logits
        token = logits[:, -1:].argmax(-1)
    return token


def bytes_held(cache: Any) -> int:
    """Bytes of all memory that the tensors in a cache lie in, each piece once: what is really held, views or not."""
    pieces: dict[int, int] = {}
    holders: list[Any] = list(cache.layers)
    while holders:
        for value in vars(holders.pop()).values():
            if isinstance(value, Tensor):
                pieces[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
            elif type(value).__module__.startswith("sparing.kernels"):  # sparing keeps its ragged heads in a store
                holders.append(value)
    return sum(pieces.values())


# -- files ----------------------------------------------------------------------------------------------------------


def use_threads(threads: int) -> None:
    """All of torch on so many threads; progress bars off."""
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


def hardware() -> dict[str, Any]:
    """The CPU, its cores, and the threads used."""
    name, info = platform.processor() or platform.machine(), Path("/proc/cpuinfo")
    if info.exists():
        found = re.search(r"model name\s*:\s*(.+)", info.read_text())
        name = found.group(1) if found else name
    return {"cpu": name, "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def versions(*packages: str) -> dict[str, str]:
    """Python and the given packages."""
    return {"python": platform.python_version(), **{name: _version(name) for name in packages}}


def _version(name: str) -> str:
    """Of this project what is running, whatever was installed."""
    return importlib.import_module(name).__version__ if name == "sparing" else metadata.version(name)


def command() -> str:
    """The command that is running."""
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *sys.argv[1:]])


def conditions(seed: int | str, *packages: str) -> dict[str, Any]:
    """How a result came about, with the versions of this project, torch, transformers and further packages."""
    return {
        "hardware": hardware(), "versions": versions("sparing", "torch", "transformers", *packages),
        "command": command(), "seed": seed, "date": str(date.today()),
    }  # fmt: skip


def slug(cpu: str) -> str:
    """A CPU's name for a file name: "Intel(R) Xeon(R) Processor @ 2.80GHz" → "xeon-2.80ghz"."""
    text = re.sub(r"\([^)]*\)|\b(intel|amd|processor|cpu)\b|@", " ", cpu.lower())
    return re.sub(r"[^a-z0-9.]+", "-", text).strip("-") or "cpu"


def table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A Markdown table, its columns aligned."""
    cells = [[str(cell) for cell in row] for row in [header, *rows]]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in cells]
    rule = "|" + "|".join("-" * (w + 2) for w in widths) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def header_text(title: str, result: dict[str, Any]) -> str:
    """The first lines of a result file: what ran, where and how."""
    machine, used = result["hardware"], result["versions"]
    return "\n".join(
        [
            f"# {title}",
            "",
            f"- Hardware: {machine['cpu']}, {machine['cores']} cores, {machine['threads']} thread(s) used",
            f"- Versions: {', '.join(f'{name} {version}' for name, version in used.items())}",
            f"- Command: `{result['command']}`; seed {result['seed']}; {result['date']}",
        ]
    )


def write(topic: str, result: dict[str, Any], text: str) -> None:
    """Print the text, and write `results/<topic>_<hardware>_<date>.json` and `.md`."""
    print(text)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{topic}_{slug(result['hardware']['cpu'])}_{date.today()}"
    path.with_suffix(path.suffix + ".json").write_text(json.dumps(result, indent=1) + "\n")
    path.with_suffix(path.suffix + ".md").write_text(text + "\n")
