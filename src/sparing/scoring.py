"""Measuring a model: `score(model, "retrieval")`."""

from __future__ import annotations

import hashlib
import math
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import torch
import transformers

import sparing
from sparing.adapters.lens import ModelLens
from sparing.core.head_scorer import HeadScorer, Run, StopRule, finish, parse_scorer
from sparing.core.measured import needed_by
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError, require
from sparing.tasks import passkeys, probes, ranking_probes

# Kind of data → how samples of it are made offline: (tokenizer, count, length, seed) → samples.
MAKERS: dict[str, Callable[..., Sequence[Any]]] = {
    "text": probes.text_samples,
    "needle": probes.needle_samples,
    "pair": probes.pair_samples,
    "ranking": ranking_probes.ranking_samples,
    "passkey": passkeys.passkey_samples,
}


def score(
    model: Any,
    scorer: HeadScorer | str,
    tokenizer: Any = None,
    data: Sequence[Any] | None = None,
    *,
    samples: int = 16,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    stop: StopRule | None = None,
    max_seconds: float = math.inf,
    progress: Callable[[int, int, str], None] | None = None,
    name: str | None = None,
) -> Scores:
    """Measure heads, layers or positions of a model.

    Example:
        >>> scores = sparing.score(model, "retrieval", tokenizer)
        >>> scores.top(3)
        [(2, 1), (2, 2), (2, 0)]
        >>> scores.save("heads.safetensors")

    Args:
        model: a decoder-only transformers model; it is left as it was found.
        scorer: a scorer, or `name(field=value,...)` of a registered one.
        tokenizer: the model's; needed unless `data` is given, or the scorer makes its own.
        data: samples of the scorer's kind (`sparing.core.samples`); made offline by default.
        samples, length, seed: how many samples are made, of how many tokens, and from which series.
        batch_size: samples at a time. stop: when to stop early. max_seconds: stop after so long.
        progress: told (done, total, what) now and then.
        name: how the model is called in the result.

    Raises:
        InvalidInputError: no tokenizer where one is needed, no samples, or one of the numbers is out of range.
        UnsupportedModelError: the model has no seam that the scorer needs.
    """
    scorer = parse_scorer(scorer) if isinstance(scorer, str) else scorer
    require(isinstance(scorer, HeadScorer), "scorer", scorer, "a scorer or the name of one")
    lens = ModelLens(model, tokenizer, name)
    settings = Settings(samples, length, seed, batch_size, stop or StopRule(), max_seconds)
    run, described = prepare(scorer, lens, data, settings, progress or Run.progress)
    was_training = model.training
    model.eval()
    try:
        measured = scorer.measure(lens, run)
    finally:
        model.train(was_training)
    return finish(scorer, lens.identity, measured, described, environment=environment())


@dataclass(frozen=True)
class Settings:
    """How a measurement is carried out, see `score`.

    Raises:
        InvalidInputError: one of the numbers is out of range.
    """

    samples: int = 16
    length: int = 512
    seed: int = 0
    batch_size: int = 8
    stop: StopRule = field(default_factory=StopRule)
    max_seconds: float = math.inf

    def __post_init__(self) -> None:
        require(self.samples >= 1, "samples", self.samples, "a whole number >= 1")
        require(self.batch_size >= 1, "batch_size", self.batch_size, "a whole number >= 1")
        require(self.max_seconds > 0, "max_seconds", self.max_seconds, "a number above 0")


def prepare(
    scorer: HeadScorer,
    lens: ModelLens,
    data: Sequence[Any] | None,
    settings: Settings,
    progress: Callable[[int, int, str], None] = Run.progress,
) -> tuple[Run, dict[str, Any]]:
    """What a scorer is run on, made offline if it is not given; and how the result will call it.

    Raises:
        InvalidInputError: no tokenizer where one is needed, no samples, or samples longer than the model allows.
    """
    kind, length = scorer.info.data, settings.length
    made = data is None and kind != "none"
    if made:
        if lens.tokenizer is None:
            raise InvalidInputError(
                "tokenizer", None, f"the model's tokenizer: {scorer.info.name} makes {kind} samples"
            )
        fits = lens.max_length is None or length <= lens.max_length
        require(fits, "length", length, f"at most the model's {lens.max_length} positions")
        data = MAKERS[kind](lens.tokenizer, settings.samples, length, settings.seed)
    if data is not None and not len(data):
        raise InvalidInputError("data", "no samples", "at least one")
    run = Run(data or (), settings.batch_size, settings.seed, settings.stop, settings.max_seconds, progress)
    return run, _described(kind, run, made, length)


def calibrate(
    model: Any,
    method: str,
    tokenizer: Any,
    *,
    samples: int = 16,
    length: int = 512,
    seed: int = 0,
    batch_size: int = 8,
    progress: Callable[[int, int, str], None] | None = None,
    name: str | None = None,
) -> tuple[Scores, ...]:
    """Measure what a registered method needs to know of a model, on data made offline.

    Example:
        >>> gates = sparing.calibrate(model, "duo", tokenizer)
        >>> with sparing.use(model, sparing.DuoAttention(keep=0.5, scores=gates)) as session:
        ...     model.generate(**inputs)

    Args:
        method: its registered name. All others: see `score`.

    Raises:
        UnknownNameError: no such method. InvalidInputError: it needs no measurement; and see `score`.
    """
    return tuple(
        score(
            model, scorer, tokenizer, samples=samples, length=length, seed=seed, batch_size=batch_size,
            progress=progress, name=name,
        )
        for scorer in needed_by(method)
    )  # fmt: skip


def _described(kind: str, run: Run, made: bool, length: int) -> dict[str, Any]:
    """What was measured on: enough to tell two data sets apart, and to make a synthetic one again."""
    digest = hashlib.sha256(repr(tuple(run.samples)).encode()).hexdigest()[:12]
    origin = {"made": "offline", "length": length} if made else {"made": "given"}
    return {"kind": kind, "samples": len(run.samples), "seed": run.seed, "fingerprint": digest} | origin


def environment() -> dict[str, str]:
    """Versions and the time, for the result."""
    return {
        "sparing": sparing.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
