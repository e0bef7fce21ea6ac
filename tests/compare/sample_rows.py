"""MADE-UP rows, run and example, for tests of layout only. No number here was ever measured."""

from __future__ import annotations

import hashlib
import math
import random
from typing import Any

Row = dict[str, Any]

METHODS = ("snapkv", "adakv", "pyramidkv", "h2o", "knorm", "streaming")
MANY_METHODS = (
    *METHODS, "tova", "expected_attention", "keydiff", "lagkv", "finch", "cakekv", "duo_attention",
    "chunkkv", "random",
)  # fmt: skip
TASKS = ("needle", "needle_multikey", "variable_tracking", "json_lookup")
LENGTHS = (512, 1024)
LAYERS, HEADS = 4, 4
BYTES_PER_TOKEN = 2 * LAYERS * HEADS * 32 * 4


def wilson(score: float, n: int) -> tuple[float, float]:
    """A 95 % interval that looks right for a share of n."""
    z = 1.96
    middle = (score + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(score * (1 - score) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def sample_rows(
    methods: tuple[str, ...] = METHODS,
    keeps: tuple[float | int | str, ...] = (0.1, 0.25, 0.5),
    tasks: tuple[str, ...] = TASKS,
    lengths: tuple[int | None, ...] = LENGTHS,
    modes: tuple[str, ...] = ("query-agnostic", "query-aware"),
    failing: tuple[str, ...] = ("variable_tracking",),
    n: int = 20,
) -> list[Row]:
    """Made-up rows: "full" and every method at every budget; `failing` tasks fail the gate at the last length."""
    rng = random.Random(7)
    rows = []
    for mode in modes:
        for number, task in enumerate(tasks):
            for length in lengths:
                hard = 0.03 * number + (0.05 if length == lengths[-1] else 0)
                gate = 0.7 if task in failing and length == lengths[-1] else 1.0 - 0.02 * (number % 2)
                rows.append(_row(rng, mode, task, length, "full", 1.0, gate, n))
                for rank, method in enumerate(methods):
                    for keep in keeps:
                        share = _share(keep, length)
                        skill = 0.10 + 0.07 * rank - (0.08 if mode == "query-aware" else 0)
                        score = gate * (1 - min(1.0, (skill + hard) * (1 - share) ** 2 * (0.4 + 0.25 / (share + 0.1))))
                        rows.append(_row(rng, mode, task, length, method, keep, max(0.0, score), n))
    return rows


def sample_run() -> dict[str, Any]:
    """A made-up run.json."""
    return {
        "sparing": "0.1.0",
        "torch": "2.13.0",
        "transformers": "5.23.0",
        "python": "3.11.9",
        "hardware": {"cpu": "Made-up CPU (layout test)", "cores": 8, "memory_bytes": 32 * 2**30, "gpu": None},
        "command": "sparing compare --methods snapkv,adakv --keep 0.1,0.25,0.5 --out results/demo",
        "seed": 0,
        "commit": "0000000",
        "started": "2026-01-02T03:04:05Z",
        "finished": "2026-01-02T03:24:05Z",
        "model": "sparing-tiny",
        "model_description": "MADE UP for layout tests: 4 layers, 4 KV heads",
        "threads": 8,
    }


def sample_examples(methods: tuple[str, ...] = METHODS, length: int = 512) -> dict[str, Any]:
    """A made-up examples.json: a needle in a noisy text, and which tokens survive."""
    rng = random.Random(3)
    text = "The grass is green . The sky is blue . The sun is yellow . Here we go . There and back again ."
    sentences = text.split()
    tokens = [(" " if i else "") + sentences[i % len(sentences)] for i in range(length)]
    needle = [
        " The",
        " special",
        " magic",
        " number",
        " for",
        " amber",
        " river",
        " is:",
        " 48",
        "21",
        "5",
        ".",
    ]
    at = length * 2 // 3
    tokens[at : at + len(needle)] = needle
    kept: dict[str, Any] = {}
    for rank, method in enumerate(methods):
        layers = []
        for layer in range(LAYERS):
            heads = []
            for head in range(HEADS):
                count = max(12, int(length * (0.25 + 0.05 * (head - 1.5) * (layer % 2))))
                chosen = set(range(4)) | set(range(length - 24, length)) | set(rng.sample(range(length), count))
                if rank < 3 or head == 0:
                    chosen |= set(range(at, at + len(needle)))
                heads.append(sorted(chosen))
            layers.append(heads)
        kept[method] = {"keep": 0.25, "output": " 48215." if rank < 3 else " 48.", "kept": layers}
    return {
        "task": "needle",
        "mode": "query-agnostic",
        "length": length,
        "question": "\nWhat is the special magic number for amber river? The special magic number for amber river is:",
        "answer": " 48215",
        "tokens": tokens,
        "methods": kept,
    }


def perplexity_rows(methods: tuple[str, ...] = METHODS[:3]) -> list[Row]:
    """Made-up rows of a task that is measured in 1/perplexity."""
    rows = sample_rows(methods, tasks=("book",), lengths=(1024,), failing=())
    for row in rows:
        row.update(metric="1/perplexity", task="book", score=row["score"] * 0.08)
        row.update(low=row["score"] * 0.97, high=row["score"] * 1.03, worse_than_full=0)
        row["key"] = "p" + row["key"]
    return rows


def _share(keep: float | int | str, length: int | None) -> float:
    if isinstance(keep, float):
        return keep
    return min(1.0, keep / (length or 1024)) if isinstance(keep, int) else 0.33


def _row(
    rng: random.Random, mode: str, task: str, length: int | None, method: str, keep: float | int | str,
    score: float, n: int,
) -> Row:  # fmt: skip
    questions = n * 2
    score = round(score * questions) / questions if method != "full" else score
    low, high = wilson(score, questions)
    size = (length or 1024) * BYTES_PER_TOKEN
    share = 1.0 if method == "full" else _share(keep, length)
    label = f"{keep * 100:g} %" if isinstance(keep, float) else (f"{keep} tokens" if isinstance(keep, int) else keep)
    adaptive = method in ("adakv", "pyramidkv", "duo_attention")
    maps = [
        [
            min(1.0, max(0.02, share * (1 + (0.8 * math.sin(3 * layer + 2 * head) if adaptive else 0))))
            for head in range(HEADS)
        ]
        for layer in range(LAYERS)
    ]
    return {
        "key": hashlib.sha256(repr((mode, task, length, method, keep)).encode()).hexdigest()[:16],
        "model": "sparing-tiny",
        "method": method,
        "keep": keep,
        "keep_label": "full" if method == "full" else label,
        "task": task,
        "mode": mode,
        "length": length,
        "n": n,
        "questions": questions,
        "score": score,
        "low": low,
        "high": high,
        "metric": "exact match",
        "bytes_full": size,
        "bytes_kept": int(size * min(1.0, share * (1.005 if method != "full" else 1))),
        "prefill_s": 0.2 * (length or 1024) / 512 * (1.0 if method == "full" else 1.05) + rng.random() * 0.01,
        "decode_s_per_token": 0.004 + 0.004 * share + rng.random() * 0.0003,
        "peak_rss_bytes": int(900e6 + size * share),
        "seed": 0,
        "kept_share": maps,
        "worse_than_full": 0 if method == "full" else round((1 - score) * questions),
        "warning": "made up: prompt shorter than the window" if method == "h2o" and length == LENGTHS[0] else None,
    }
