"""Learning a few numbers on a frozen model: the loop, its schedules, and the loss on answers.

Everything is AdamW (arXiv:1711.05101) without weight decay. The model's parameters get no gradients and are never
changed; what is learned reaches the model through a lens's hooks.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from sparing.core.head_scorer import Run
from sparing.core.lens import Lens
from sparing.core.samples import NeedleSample
from sparing.errors import InvalidInputError
from sparing.measures.batches import pad_left

# (step, steps) → factor on the learning rate.
Schedule = Callable[[int, int], float]

# (step, samples) → the parts of the loss, which are summed.
Loss = Callable[[int, Sequence[Any]], Sequence[Tensor]]

_IGNORED = -100


def constant(step: int, steps: int) -> float:
    """1 throughout."""
    return 1.0


def falling(step: int, steps: int) -> float:
    """From 1 at the first step down a straight line, to 0 after the last."""
    return 1.0 - step / steps


def trapezoid(step: int, steps: int) -> float:
    """Up over the first fifth of the steps, 1, down over the last fifth; never below 0.1."""
    ramp = max(steps // 5, 1)
    return min(1.0, max((step + 1) / ramp, 0.1), max((steps - step) / ramp, 0.1))


@dataclass(frozen=True)
class Learned:
    """How the learning went.

    Attributes:
        curve: (steps taken, parts) float32: the parts of the loss, each before its step.
        notes: why it stopped, in a sentence.
    """

    curve: Tensor
    notes: tuple[str, ...]


def learn(
    lens: Lens, numbers: Tensor, loss: Loss, run: Run, *, steps: int, learning_rate: float, batch_size: int,
    schedule: Schedule = constant, bounds: tuple[float, float] | None = None,
) -> Learned:  # fmt: skip
    """Change numbers in place so that a loss falls: AdamW (β 0.9 and 0.999, no weight decay), one batch a step.

    Args:
        lens: its model is frozen meanwhile. numbers: a leaf that requires gradients.
        loss: see `Loss`; it runs the model, under the lens's hooks.
        run: the samples (each epoch in another order), the seed, the time limit and who is told of progress.
            The limit is looked at after each step, so at least one is taken.
        bounds: the numbers are clamped to them after each step.

    Raises:
        InvalidInputError: the loss is not finite.
    """
    optimiser = torch.optim.AdamW([numbers], lr=learning_rate, weight_decay=0.0)
    batches, began, curve = shuffled(run, batch_size), time.monotonic(), []
    why = f"all {steps} steps were taken"
    with frozen(lens.model):
        for step in range(steps):
            optimiser.param_groups[0]["lr"] = learning_rate * schedule(step, steps)
            parts = torch.stack(list(loss(step, next(batches))))
            curve.append(parts.detach().float().cpu())
            total = float(curve[-1].sum())
            if not math.isfinite(total):
                fix = "use a smaller learning rate, or the model in float32"
                raise InvalidInputError(f"loss at step {step}", total, "a finite number", fix)
            optimiser.zero_grad()
            parts.sum().backward()
            optimiser.step()
            if bounds is not None:
                with torch.no_grad():
                    numbers.clamp_(*bounds)
            run.progress(step + 1, steps, f"loss {total:.4g}")
            if time.monotonic() - began > run.max_seconds and step + 1 < steps:
                why = f"stopped after {step + 1} of {steps} steps: {run.max_seconds:g} s had passed"
                break
    return Learned(torch.stack(curve), (why,))


def shuffled(run: Run, size: int) -> Iterator[Sequence[Any]]:
    """Batches of the run's samples without end; each epoch has all of them, in an order that the run's seed gives."""
    rng = random.Random(f"order/{run.seed}")
    while True:
        order = rng.sample(range(len(run.samples)), len(run.samples))
        for start in range(0, len(order), size):
            yield [run.samples[i] for i in order[start : start + size]]


@contextmanager
def frozen(model: Any) -> Iterator[None]:
    """Gradients are on, but no parameter of the model gets any; afterwards each is as it was."""
    before = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in before:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter, needed in before:
            parameter.requires_grad_(needed)


def answer_loss(lens: Lens, samples: Sequence[NeedleSample]) -> Tensor:
    """Mean cross-entropy of all tokens of all answers, each given the prompt and the answer's tokens before it.

    Returns:
        A float32 scalar (float64 for float64 models), in nats per token. Prompts cost nothing and count nothing.

    Raises:
        InvalidInputError: a sample without an answer.
    """
    if not all(sample.answer_ids for sample in samples):
        raise InvalidInputError("data", "a sample without an answer", "samples whose answer_ids hold a token")
    ids, mask = pad_left([(*sample.ids, *sample.answer_ids[:-1]) for sample in samples])
    last = max(len(sample.answer_ids) for sample in samples)
    answers = torch.full((len(samples), last), _IGNORED)
    for row, sample in enumerate(samples):
        answers[row, last - len(sample.answer_ids) :] = torch.tensor(sample.answer_ids)
    logits = exact(lens.forward(ids, mask, last=last))
    return functional.cross_entropy(logits.flatten(0, 1), answers.flatten().to(logits.device), ignore_index=_IGNORED)


def exact(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def numbers_for(lens: Lens, start: Tensor) -> Tensor:
    """A copy of the start that can be learned: on the model's device, in float32 (float64 for float64 models)."""
    is_double = any(parameter.dtype == torch.float64 for parameter in lens.model.parameters())
    return start.detach().to(lens.device, torch.float64 if is_double else torch.float32, copy=True).requires_grad_()
