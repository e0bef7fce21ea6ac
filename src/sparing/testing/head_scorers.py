"""For authors of head scorers: the promises that every scorer keeps, on tiny models of every structure.

`check_head_scorer(MyScorer())` needs no download and no tokenizer: samples are random tokens, and where an answer
is asked for, it is what the model itself says, so that every sample counts.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable
from typing import Any

import torch

from sparing.adapters.lens import ModelLens
from sparing.core.head_scorer import HeadScorer, MeanScorer
from sparing.core.samples import DataKind, NeedleSample, PairSample, PasskeySample, RankingSample, TextSample
from sparing.core.scores import Scores
from sparing.errors import UnsupportedModelError
from sparing.scoring import score
from sparing.testing.inspection import assert_same_trace, trace
from sparing.testing.models import TINY_MODELS, VOCABULARY, tiny_model

# Float64 models: what two summation orders may differ by, relative to the largest score. Models that fall back to
# float32 inside (norms, softmax, rotary angles) differ by its rounding, amplified through the layers.
SLACK = 1e-4


class _Interruption(Exception):
    """Raised on purpose inside a measurement."""


def random_samples(kind: DataKind, model: Any, count: int = 3, length: int = 40, seed: int = 0) -> list[Any]:
    """Samples of a kind for a model with the tiny vocabulary; their lengths differ where the kind allows it."""
    makers: dict[str, Callable[[random.Random, int, Any], Any]] = {
        "text": _text, "needle": _needle, "pair": _pair, "ranking": _ranking, "passkey": _passkey,
    }  # fmt: skip
    if kind not in makers:
        return []
    return [makers[kind](random.Random(f"{kind}/{seed}/{i}"), length + 3 * i, model) for i in range(count)]


def check_head_scorer(make: Callable[[], HeadScorer], models: Iterable[str] = tuple(TINY_MODELS)) -> list[str]:
    """Run every check on a scorer.

    Args:
        make: builds the scorer; measure few steps if it learns.

    Returns:
        Models that the scorer refuses by name, and why.

    Raises:
        AssertionError: a promise is broken; the message says which, on which model.
    """
    refused = []
    for name in models:
        try:
            for check in CHECKS:
                check(make(), name)
        except UnsupportedModelError as refusal:
            refused.append(f"{name}: {refusal}")
        except AssertionError as error:
            raise AssertionError(f"{check.__name__} on {name}: {error}") from error
    return refused


def check_scores_are_well_formed(scorer: HeadScorer, name: str) -> None:
    """The axes are those registered, layers and heads are as many as the model has, and something is measured."""
    found = _measure(scorer, tiny_model(name))
    lens = ModelLens(tiny_model(name))
    sizes = {"layer": lens.num_layers, "head": lens.num_heads, "kv_head": lens.num_kv_heads}
    assert found.axes == scorer.info.axes
    for axis, size in zip(found.axes, found.values.shape, strict=True):
        assert size == sizes.get(axis, size), f"{size} along {axis}, the model has {sizes[axis]}"
        assert len(found.labels.get(axis, range(size))) == size, f"labels along {axis} do not fit"
    assert found.values.dtype == torch.float32
    assert bool(found.values.isfinite().any()), "nothing was measured"
    assert not bool(found.values.isinf().any()), "a score is infinite"
    assert found.n >= 1


def check_same_seed_same_scores(scorer: HeadScorer, name: str) -> None:
    """Measured twice, the scores are the same bit for bit, whatever the global random state is."""
    first = _measure(scorer, tiny_model(name))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(123)
        second = _measure(scorer, tiny_model(name))
    assert torch.equal(first.values.nan_to_num(-7.0), second.values.nan_to_num(-7.0)), "the scores differ"


def check_samples_do_not_mix(scorer: HeadScorer, name: str) -> None:
    """One sample at a time gives what a left-padded batch of several lengths gives."""
    if not isinstance(scorer, MeanScorer):
        return
    model = tiny_model(name, torch.float64)
    together, alone = (_measure(scorer, model, batch_size=size).values for size in (3, 1))
    size = max(float(alone.nan_to_num(0.0).abs().max()), 1.0)
    assert torch.equal(together.isnan(), alone.isnan()), "other units were measured"
    error = float((together - alone).nan_to_num(0.0).abs().max())
    assert error <= SLACK * size, f"a batch and single samples differ by {error}"


def check_leaves_no_trace(scorer: HeadScorer, name: str) -> None:
    """Model, torch and transformers are as found after a measurement, also after one that was interrupted."""
    model = tiny_model(name)
    ids = torch.randint(1, VOCABULARY, (1, 9), generator=torch.Generator().manual_seed(0))
    said = model(ids).logits
    before = trace(model)
    gradients = [(p.requires_grad, p.grad) for p in model.parameters()]
    _measure(scorer, model)
    assert_same_trace(before, trace(model))
    for limit in (1, 4):
        interrupted = _Countdown(limit)
        handle = model.get_output_embeddings().register_forward_pre_hook(interrupted)
        try:
            _measure(scorer, model)
        except _Interruption:
            pass
        finally:
            handle.remove()
        assert_same_trace(before, trace(model))
    assert [(p.requires_grad, p.grad) for p in model.parameters()] == gradients, "gradients were left behind"
    assert torch.equal(model(ids).logits, said), "the model says something else than before"


def check_the_file_gives_it_back(scorer: HeadScorer, name: str) -> None:
    """What was measured can be saved and loaded."""
    import tempfile
    from pathlib import Path

    found = _measure(scorer, tiny_model(name))
    with tempfile.TemporaryDirectory() as folder:
        loaded = Scores.load(found.save(Path(folder) / "scores.safetensors"), found.model)
    assert torch.equal(loaded.values.nan_to_num(-7.0), found.values.nan_to_num(-7.0))
    assert dict(loaded.parameters) == dict(found.parameters), "the scorer's fields are not plain values"


CHECKS = (
    check_scores_are_well_formed,
    check_same_seed_same_scores,
    check_samples_do_not_mix,
    check_leaves_no_trace,
    check_the_file_gives_it_back,
)


class _Countdown:
    """Raises at the n-th call."""

    def __init__(self, calls: int) -> None:
        self.calls = calls

    def __call__(self, *_: Any) -> None:
        self.calls -= 1
        if self.calls <= 0:
            raise _Interruption


def _measure(scorer: HeadScorer, model: Any, batch_size: int = 3) -> Scores:
    kind = scorer.info.data
    count = 1 if scorer.info.axes == ("position",) or "position" in scorer.info.axes else 3
    samples = random_samples(kind, model, count)
    return score(model, scorer, data=samples or None, batch_size=batch_size, length=40)


def _tokens(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(1, VOCABULARY) for _ in range(count))


def _text(rng: random.Random, length: int, model: Any) -> TextSample:
    return TextSample(_tokens(rng, length), length // 2)


def _needle(rng: random.Random, length: int, model: Any) -> NeedleSample:
    """A prompt whose answer is what the model says, with these very tokens planted where the needle is."""
    ids = list(_tokens(rng, length))
    with torch.no_grad():
        said = model.generate(torch.tensor([ids]), max_new_tokens=2, do_sample=False)[0, length:].tolist()
    return NeedleSample(tuple(ids), tuple(said), (" ".join(map(str, said)),), (8, 14), (10, 12), 2)


def _pair(rng: random.Random, length: int, model: Any) -> PairSample:
    clean = list(_tokens(rng, length))
    corrupt = list(clean)
    corrupt[5] = 1 + clean[5] % (VOCABULARY - 1)
    with torch.no_grad():
        difference = model(torch.tensor([clean])).logits[0, -1] - model(torch.tensor([corrupt])).logits[0, -1]
    return PairSample(tuple(clean), tuple(corrupt), int(difference.argmax()), int(difference.argmin()))


def _ranking(rng: random.Random, length: int, model: Any) -> RankingSample:
    documents = _tokens(rng, length)
    third = length // 3
    spans = ((1, third), (third, 2 * third), (2 * third, length))
    real, null = _tokens(rng, 6), _tokens(rng, 4)
    return RankingSample((*documents, *real), (*documents, *null), spans, length, (1,))


def _passkey(rng: random.Random, length: int, model: Any) -> PasskeySample:
    text, first, second = _tokens(rng, length - 12), _tokens(rng, 3), _tokens(rng, 3)
    ids = (*text[:5], *first, *text[5:9], *second, *text[9:], *first, *second)
    return PasskeySample(ids, ((5, 8), (12, 15)), ((length - 6, length - 3), (length - 3, length)))
