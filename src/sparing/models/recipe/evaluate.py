"""What the exported model can do, measured through transformers on books it was not trained on.

Accuracy is exact match of the whole answer under greedy decoding. It is computed in one forward pass: greedy
decoding gives the true answer exactly if, given the true answer so far, each of its tokens is the most likely.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch.nn import functional
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sparing.models.recipe import questions
from sparing.models.recipe.data import text
from sparing.models.recipe.encoding import Encoder
from sparing.models.recipe.samples import Sample, Source
from sparing.models.recipe.tokenization import load_corpus

Make = Callable[[Source, random.Random, int], Sample | None]


def _needles(count: int, kind: str = "number", hay: str = "text", near: float = 0.0) -> Make:
    return lambda source, rng, length: questions.needles(source, rng, length, count, 1, kind, hay, near)


def _lookup(kind: str) -> Make:
    return lambda source, rng, length: questions.lookups(source, rng, length, 1, kind, near=0.0)


# Name of the measurement, total lengths in tokens, and how a sample is made.
MEASURES: tuple[tuple[str, tuple[int, ...], Make], ...] = (
    ("single needle", (512, 1024, 2048, 4096), _needles(1)),
    ("single needle, words for values", (1024, 2048), _needles(1, kind="word")),
    ("single needle in noise", (1024, 2048), _needles(1, hay="noise")),
    ("four-key needle", (512, 1024, 2048, 4096), _needles(4)),
    ("four-key needle, half of the keys alike", (1024,), _needles(4, near=1.0)),
    ("single needle among needles", (1024,), _needles(1, hay="needles")),
    ("key-value recall (JSON), two words", (512, 1024, 2048), _lookup("word")),
    ("key-value recall (JSON), five digits", (512, 1024, 2048), _lookup("number")),
    ("copy of a passage", (512, 1024, 2048), lambda s, r, n: questions.quotes(s, r, n, 1)),
    ("multi-query, four keys", (1024,), lambda s, r, n: questions.many_keys(s, r, n, 4, near=0.0)),
    ("multi-value, four values", (1024,), lambda s, r, n: questions.all_values(s, r, n, 4, 0)),
)


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % Wilson interval of a share."""
    z, share = 1.96, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


@torch.inference_mode()
def is_right(model: LlamaForCausalLM, sample: Sample) -> list[bool]:
    """Return for each answer of the sample whether greedy decoding gives it exactly."""
    ids = torch.tensor([sample.ids])
    first = sample.answers[0].start - 1
    guesses = model(ids, logits_to_keep=len(sample.ids) - first).logits[0].argmax(-1)
    return [
        bool((guesses[a.start - 1 - first : a.end - 1 - first] == ids[0, a.start : a.end]).all())
        for a in sample.answers
    ]


def accuracy(model: LlamaForCausalLM, source: Source, make: Make, length: int, count: int) -> dict[str, Any]:
    """Measure the share of `count` samples of one kind and length that are answered exactly."""
    rng = random.Random(f"evaluation {length}")
    right = 0
    for _ in range(count):
        sample = make(source, rng, length)
        assert sample is not None, f"the task does not fit into {length} tokens"
        right += is_right(model, sample)[0]
    low, high = wilson(right, count)
    return {"length": length, "n": count, "accuracy": right / count, "low": low, "high": high}


@torch.inference_mode()
def held_out_loss(model: LlamaForCausalLM, source: Source, length: int = 512, count: int = 100) -> float:
    """Return the mean loss, in nats per token, on passages of the source."""
    rng = random.Random("loss")
    losses = []
    for _ in range(count):
        ids = torch.tensor([text(source, rng, length).ids])
        losses.append(functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:]).item())
    return float(np.mean(losses))


def unigram_loss(train: np.ndarray, held_out: np.ndarray, vocabulary: int) -> float:
    """Return the loss on held-out ids, in nats per token, of always guessing by frequency in train."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[held_out].mean())


@torch.inference_mode()
def head_scores(model: LlamaForCausalLM, source: Source, length: int = 512, count: int = 50) -> list[list[float]]:
    """Return each head's copy score (layers x heads), on single needles.

    The score is the share of answer tokens for which the head, where the token is predicted, attends most to
    the very token of the needle that is being copied.
    """
    model.set_attn_implementation("eager")
    rng, total = random.Random("heads"), 0
    hits = torch.zeros(model.config.num_hidden_layers, model.config.num_attention_heads)
    for _ in range(count):
        sample = questions.needles(source, rng, length, 1, 1)
        assert sample is not None
        answer = sample.answers[0]
        attentions = model(torch.tensor([sample.ids]), output_attentions=True).attentions
        most = torch.stack(attentions)[:, 0, :, answer.start - 1 : answer.end - 1].argmax(-1)
        places = torch.arange(answer.end - answer.start) + answer.source
        hits += (most == places).sum(-1)
        total += len(places)
    model.set_attn_implementation("sdpa")
    return (hits / total).tolist()


@torch.inference_mode()
def sample_text(model: Any, tokenizer: Tokenizer, prompt: str, tokens: int = 90) -> str:
    """Return the prompt and how the model goes on, drawn at temperature 0.7 with a fixed seed."""
    torch.manual_seed(0)
    ids = torch.tensor([tokenizer.encode(prompt).ids])
    generate: Any = model.generate
    made = generate(ids, max_new_tokens=tokens, do_sample=True, temperature=0.7, top_k=50)
    return tokenizer.decode(made[0].tolist())


def evaluate(folder: Path, texts: Path, count: int = 200) -> dict[str, Any]:
    """Run all measurements on the exported model in folder with the held-out books of texts."""
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    train, held_out = (load_corpus(tokenizer, texts, held) for held in (False, True))
    source = Source(Encoder(tokenizer), held_out)
    tables = {
        name: [accuracy(model, source, make, length, count) for length in lengths] for name, lengths, make in MEASURES
    }
    return {
        "accuracy": tables,
        "held_out_loss": held_out_loss(model, source),
        "unigram_loss": unigram_loss(train, held_out, source.encoder.vocabulary),
        "head_scores": head_scores(model, source),
        "text": sample_text(model, tokenizer, "It was a dark night, and the"),
    }
