"""The model card: README.md of the bundled model, written from what was measured."""

from __future__ import annotations

import datetime
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

from sparing.models.recipe.network import Network, Shape
from sparing.models.recipe.train import CURRICULUM, Stage

_INTRODUCTION = """# The bundled model

A language model of {parameters:.2f} million parameters that really retrieves: asked for a fact planted
thousands of tokens earlier, it attends to the fact and copies it. It was trained from scratch, on a CPU, for
`sparing`: as a fast, honest subject for compressing the cache of a transformer, in tests, demonstrations and
first experiments without any download. It is no assistant; beyond the tasks below it only imitates prose.

- Architecture: Llama (`LlamaForCausalLM`): {layers} layers, width {width}, {heads} query heads and {kv_heads}
  key/value heads of width {head_width}, rotary positions (base {rope_theta:.0f}), tied embeddings; float32.
- Tokenizer: byte-level BPE of {vocabulary} entries; digits and punctuation marks are single tokens; about three
  characters of English prose a token. Encoding puts `<s>` in front unless special tokens are switched off.
- Data: thirteen books in the public domain in the United States, from Project Gutenberg, and synthetic
  retrieval tasks set in them, in the sentences of `sparing.tasks`. "Emma" and "Dracula" were held out.
- Recipe: `python -m sparing.models.recipe --texts FOLDER --out FOLDER`; the curriculum is below.
- Licence: as the package; the books are in the public domain.
"""

_LIMITS = """## Limits

- It knows these tasks in these sentences. Other wordings, other languages, instructions: no.
- Keys are pairs of words from `sparing.tasks.words`; other keys are matched less surely.
- It was trained on at most {longest} tokens at a time, with shifted positions up to 8192.
- The tasks are in the style of RULER but shorter; the numbers cannot be compared with those of its leaderboard.
"""


def _accuracy_table(accuracy: dict[str, list[dict[str, Any]]]) -> str:
    lines = ["| task | tokens in all | n | exact match | 95 % interval |", "|---|---:|---:|---:|---|"]
    for name, rows in accuracy.items():
        for row in rows:
            interval = f"{row['low']:.3f} to {row['high']:.3f}"
            lines.append(f"| {name} | {row['length']} | {row['n']} | {row['accuracy']:.3f} | {interval} |")
    return "\n".join(lines)


def _head_table(scores: list[list[float]]) -> str:
    lines = ["| layer | " + " | ".join(f"head {i}" for i in range(len(scores[0]))) + " |"]
    lines.append("|---|" + "---:|" * len(scores[0]))
    lines += [f"| {i} | " + " | ".join(f"{s:.2f}" for s in row) + " |" for i, row in enumerate(scores)]
    return "\n".join(lines)


def _stage_table(stages: tuple[Stage, ...]) -> str:
    lines = ["| length | tokens | learning rates times | mix |", "|---:|---:|---|---|"]
    for stage in stages:
        mix = ", ".join(f"{name} {share:g}" for name, share in stage.mix.items())
        lines.append(f"| {stage.length} | {stage.tokens:,} | {stage.rate:g} to {stage.end_rate:g} | {mix} |")
    return "\n".join(lines)


def write_card(folder: Path, results: dict[str, Any], shape: Shape) -> None:
    """Write README.md into the folder of the exported model."""
    parameters = sum(p.numel() for p in Network(shape).parameters()) / 1e6
    introduction = _INTRODUCTION.format(parameters=parameters, **vars(shape))
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers "
    versions += f"{transformers.__version__}, on a CPU, {datetime.date.today().isoformat()}"
    quoted = "\n".join("> " + line for line in results["text"].splitlines())
    sections = [
        introduction,
        "## Measured\n\nGreedy decoding, whole answer exact, on the held-out books with fresh keys and values; "
        f"Wilson intervals. {versions}.\n",
        _accuracy_table(results["accuracy"]),
        f"\nLoss on the held-out books, at 512 tokens: {results['held_out_loss']:.2f} nats per token; guessing "
        f"by frequency: {results['unigram_loss']:.2f}.\n",
        "Copy scores of the heads (share of answer tokens for which the head attends most to the token that is "
        "copied; single needles at 512 tokens):\n",
        _head_table(results["head_scores"]),
        "\nText it writes (temperature 0.7, first words given):\n",
        quoted,
        "\n## Curriculum\n\nAdamW and Muon; half of the batches with shifted positions from 128 tokens on.\n",
        _stage_table(CURRICULUM),
        "\n" + _LIMITS.format(longest=max(stage.length for stage in CURRICULUM)),
    ]
    (folder / "README.md").write_text("\n".join(sections), encoding="utf-8")
