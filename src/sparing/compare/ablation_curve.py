"""The ablation curve: a task's score against the number of heads that are taken away.

Three orders: the best-scored heads first, the worst-scored first, and heads drawn at random among those that are not
at the top. If a measurement is right, only the first drops.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from sparing.adapters.lens import ModelLens
from sparing.compare.store import write_text_atomic
from sparing.core.edits import Ablation, Head, HeadEdit
from sparing.core.placement import input_device
from sparing.core.scores import Scores
from sparing.editing import ablate, edit, head_outputs
from sparing.errors import require
from sparing.tasks import Sample, Task
from sparing.tasks.probes import text_samples


@dataclass(frozen=True)
class AblationCurve:
    """Task scores after taking heads away.

    Attributes:
        scorer: whose ranking. task: whose score. kind: what taken away means. n: samples per point.
        full: the score of the intact model. counts: how many heads were taken away.
        top, bottom: scores with the best, or the worst, so many gone. random: per count, the score of each draw.
        heads: the ranking, best first.
    """

    scorer: str
    task: str
    kind: str
    n: int
    full: float
    counts: list[int]
    top: list[float]
    bottom: list[float]
    random: list[list[float]]
    heads: list[Head]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as JSON."""
        write_text_atomic(path, json.dumps(asdict(self), indent=1))


def ablation_curve(
    model: Any,
    tokenizer: Any,
    scores: Scores,
    task: Task,
    *,
    length: int = 512,
    samples: int = 10,
    kind: Ablation = "zero",
    counts: Sequence[int] | None = None,
    draws: int = 5,
    seed: int = 0,
    progress: Callable[[int, int, str], None] = lambda done, total, what: None,
) -> AblationCurve:
    """Measure the curve by generating answers.

    Args:
        scores: over (layer, head), of this model.
        length, samples: of a task that makes its samples; a file of the user's own has texts of its own length, and
            `samples` of them at most.
        counts: heads to take away; by default 1, 2, 4, ... up to half.
        draws: random sets per count, drawn among the heads outside the top `count`.

    Raises:
        InvalidInputError: a number out of range, samples longer than what the model was made for, or a task without
            answers to generate. ScoresMismatchError: scores of other units than heads, or of another model.
    """
    scores.require_axes("layer", "head")
    scores.check_model(ModelLens(model).identity)
    require(draws >= 1, "draws", draws, "a whole number >= 1")
    require(samples >= 1, "samples", samples, "a whole number >= 1")
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    require(limit is None or length <= limit, "length", length, f"at most the model's {limit} positions")
    ranked = [(unit[0], unit[1]) for unit in scores.ranked()]
    counts = list(counts or _doubling(len(ranked) // 2))
    require(all(1 <= c <= len(ranked) // 2 for c in counts), "counts", counts, f"numbers from 1 to {len(ranked) // 2}")
    needs_reference = kind in ("mean", "resample")
    reference = head_outputs(model, text_samples(tokenizer, 4, length, seed)) if needs_reference else None
    asked = _samples(tokenizer, task, length, samples, seed, limit)
    total, done = 1 + len(counts) * (2 + draws), 0

    def measure(heads: Sequence[Head]) -> float:
        nonlocal done
        found = _score(model, tokenizer, task, asked, ablate(kind, heads, reference) if heads else None)
        done += 1
        progress(done, total, f"{len(heads)} heads away")
        return found

    full = measure(())
    top, bottom, drawn = [], [], []
    for count in counts:
        top.append(measure(ranked[:count]))
        bottom.append(measure(ranked[-count:]))
        rng = random.Random(f"ablation curve/{seed}/{count}")
        drawn.append([measure(rng.sample(ranked[count:], count)) for _ in range(draws)])
    return AblationCurve(scores.scorer, task.label, kind, len(asked), full, counts, top, bottom, drawn, ranked)


def _samples(tokenizer: Any, task: Task, length: int, samples: int, seed: int, limit: int | None) -> list[Sample]:
    """What is asked at every point of the curve."""
    require(task.kind == "generation", "task", task.label, "a task whose answers are generated")
    # A file of the user's own has as many texts as it has, each as long as it is.
    own = task.num_samples is not None
    count = min(samples, task.num_samples or samples)
    asked = [task.sample(tokenizer, None if own else length, seed, index) for index in range(count)]
    answered = all(question.reference == "answers" for sample in asked for question in sample.questions)
    require(answered, "task", task.label, "a file whose questions have answers", "add the answers to the file")
    longest = max(sample.length for sample in asked)
    require(limit is None or longest <= limit, "length", longest, f"at most the model's {limit} positions")
    return asked


def _score(model: Any, tokenizer: Any, task: Task, asked: Sequence[Any], taken: HeadEdit | None) -> float:
    """Mean over samples of the mean over their questions."""
    if taken is not None:
        with edit(model, taken):
            return _score(model, tokenizer, task, asked, None)
    means = []
    for sample in asked:
        points = []
        for question in sample.questions:
            ids = torch.tensor([[*sample.context_ids, *question.token_ids]], device=input_device(model))
            with torch.no_grad():
                said = model.generate(
                    ids, attention_mask=torch.ones_like(ids), max_new_tokens=question.max_new_tokens, do_sample=False
                )
            text = tokenizer.decode(said[0, ids.shape[1] :].tolist(), skip_special_tokens=True)
            points.append(task.score(question, text))
        means.append(sum(points) / len(points))
    return sum(means) / len(means)


def _doubling(most: int) -> list[int]:
    counts = [1]
    while counts[-1] * 2 <= most:
        counts.append(counts[-1] * 2)
    return counts if counts[-1] == most else [*counts, most]
