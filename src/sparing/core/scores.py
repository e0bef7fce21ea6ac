"""Scores: what was measured on a model, with how it was made, as one file. Higher = matters more.

One safetensors file: the numbers as tensors, everything else as readable JSON in the file's metadata, so
`safetensors` alone is enough to read it.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparing.errors import InputFileError, InvalidInputError, OutputError, ScoresMismatchError, require

FORMAT = "sparing-scores-1"
SEVERAL = "sparing-several-scores-1"


@dataclass(frozen=True)
class ModelIdentity:
    """Which model was measured.

    Attributes:
        name: as the user gave it. architecture: its class.
        num_layers, num_heads, num_kv_heads, head_dim: of the attention layers that were measured.
        fingerprint: short hash of configuration and weights.
    """

    name: str
    architecture: str
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    fingerprint: str

    @property
    def shape(self) -> str:
        """Architecture and dimensions: what two models must share for one's heads to be the other's."""
        heads = f"{self.num_heads} query / {self.num_kv_heads} KV heads of {self.head_dim}"
        return f"{self.architecture}, {self.num_layers} attention layers, {heads}"


@dataclass(frozen=True, eq=False, repr=False)
class Scores:
    """A number for every unit of a model or text. Two are equal if numbers, scorer, parameters, model and data are.

    Attributes:
        values: float32, one dimension per axis; nan where nothing could be measured.
        axes: what the dimensions are, e.g. ("layer", "head") or ("layer", "position", "kind").
        scorer: registered name of the scorer. parameters: its fields.
        model: which model. data: on what: a description, its fingerprint, the tokenizer's length and the like.
        n: how many samples the values are a mean of.
        standard_error: of the mean, same shape as values; None where there is no mean (n = 1, an optimisation).
        labels: names along an axis where they are not just numbers, e.g. {"position": (" The", " magic", ...)}.
        extras: further tensors, e.g. a loss curve. notes: sentences about this run, e.g. why it stopped.
        environment: versions and the date.
    """

    values: Tensor
    axes: tuple[str, ...]
    scorer: str
    model: ModelIdentity
    parameters: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    n: int = 1
    standard_error: Tensor | None = None
    labels: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        assert len(self.axes) == self.values.dim(), f"{self.axes} for {tuple(self.values.shape)}"
        assert self.standard_error is None or self.standard_error.shape == self.values.shape

    @cached_property
    def digest(self) -> str:
        """A short hash of what makes two measurements equal."""
        facts = [self.axes, self.scorer, self.model.shape, self.model.fingerprint, self.parameters, self.data, self.n]
        found = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        found.update(self.values.detach().cpu().contiguous().numpy().tobytes())
        return found.hexdigest()[:12]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Scores) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Scores({self.scorer!r}, {self.digest!r})"

    # -- choosing -----------------------------------------------------------------------------------------------

    def ranked(self) -> list[tuple[int, ...]]:
        """All units that have a value, best first; ties by lower index."""
        flat = self.values.flatten().nan_to_num(-math.inf)
        order = torch.sort(flat, descending=True, stable=True).indices.tolist()
        shape = self.values.shape
        units = [tuple(int(i) for i in torch.unravel_index(torch.tensor(u), shape)) for u in order]
        return [unit for unit in units if not math.isnan(float(self.values[unit]))]

    def top(self, k: int | float) -> list[tuple[int, ...]]:
        """The best units: `k` of them (int), or that share of all units, rounded up (float in (0, 1])."""
        return self.ranked()[: count_of(k, self.values.numel())]

    def per_kv_head(self, reduce: str = "max") -> Scores:
        """Scores of query heads, reduced over the query heads that share a KV head.

        Args:
            reduce: "max" (one important reader makes a KV head important) or "mean".
        """
        self.require_axes("layer", "head")
        require(reduce in ("max", "mean"), "reduce", reduce, '"max" or "mean"')
        grouped = self.values.view(self.model.num_layers, self.model.num_kv_heads, -1)
        values = grouped.amax(-1) if reduce == "max" else grouped.mean(-1)
        notes = (*self.notes, f"{reduce} over the query heads of each KV head")
        return Scores(values, ("layer", "kv_head"), self.scorer, self.model, self.parameters, self.data, self.n,
                      notes=notes, environment=self.environment)  # fmt: skip

    def require_axes(self, *axes: str) -> None:
        """Refuse scores of another kind of unit.

        Raises:
            ScoresMismatchError: the axes differ.
        """
        if self.axes != axes:
            problem = f"{self.scorer} scores have the axes {' × '.join(self.axes)}"
            raise ScoresMismatchError(problem, f"scores over {' × '.join(axes)} are needed here")

    def check_model(self, model: ModelIdentity) -> None:
        """Refuse scores that were measured on a model of another shape; other weights of one shape are allowed.

        Raises:
            ScoresMismatchError: the architecture or a dimension differs.
        """
        if self.model.shape != model.shape:
            problem = f"{self.scorer} scores were measured on {self.model.shape}, this model is {model.shape}"
            raise ScoresMismatchError(problem, "measure this model: sparing score --model ...")

    # -- the file -----------------------------------------------------------------------------------------------

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one safetensors file, whole or not at all.

        Raises:
            OutputError: it cannot be written.
        """
        tensors, metadata = _packed(self)
        return _write(Path(path), tensors, metadata)

    @staticmethod
    def load(path: str | os.PathLike[str], model: ModelIdentity | None = None) -> Scores:
        """Read a file that `save` wrote; with `model`, refuse scores of a model of another shape.

        Raises:
            InputFileError: missing, or not such a file. ScoresMismatchError: see `check_model`.
        """
        found = load_scores(path)
        if len(found) != 1:
            names = ", ".join(each.scorer for each in found)
            raise InputFileError(
                Path(path), f"holds several measurements ({names})", "read it with core.scores.load_scores"
            )
        scores = found[0]
        if model is not None:
            scores.check_model(model)
        return scores


def save_scores(path: str | os.PathLike[str], scores: Sequence[Scores]) -> Path:
    """Write measurements into one safetensors file, whole or not at all; of one, what `Scores.save` writes.

    Raises:
        OutputError: it cannot be written.
    """
    if len(scores) == 1:
        return scores[0].save(path)
    tensors: dict[str, Tensor] = {}
    metadata = {"format": json.dumps(SEVERAL)}
    for number, each in enumerate(scores):
        own, header = _packed(each)
        tensors |= {f"{number}.{name}": tensor for name, tensor in own.items()}
        metadata |= {f"{number}.{key}": value for key, value in header.items()}
    return _write(Path(path), tensors, metadata)


def load_scores(path: str | os.PathLike[str]) -> tuple[Scores, ...]:
    """All measurements of a file.

    Raises:
        InputFileError: missing, or not such a file.
    """
    source, fix = Path(path), "give a file written by `sparing score --out`, `sparing calibrate --out` or Scores.save"
    try:
        with safe_open(source, framework="pt") as file:
            header = {key: json.loads(value) for key, value in (file.metadata() or {}).items()}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, ValueError) as error:
        raise InputFileError(source, f"cannot be read as scores ({error})", fix) from error
    if header.get("format") != SEVERAL:
        return (_unpacked(source, tensors, header, fix),)
    count = len({name.partition(".")[0] for name in tensors})
    parts = []
    for number in range(count):
        own, more = ({k.removeprefix(f"{number}."): v for k, v in d.items() if k.startswith(f"{number}.")}
                     for d in (tensors, header))  # fmt: skip
        parts.append(_unpacked(source, own, more, fix))
    return tuple(parts)


def _packed(scores: Scores) -> tuple[dict[str, Tensor], dict[str, str]]:
    """What a file holds of a measurement: its tensors, and everything else as JSON."""
    tensors = {"values": scores.values} | {f"extra.{name}": t for name, t in scores.extras.items()}
    if scores.standard_error is not None:
        tensors["standard_error"] = scores.standard_error
    header = {"format": FORMAT, "axes": scores.axes, "labels": dict(scores.labels), "model": asdict(scores.model)}
    header |= {name: getattr(scores, name) for name in _PLAIN}
    return tensors, {key: json.dumps(value, ensure_ascii=False, default=str) for key, value in header.items()}


def _unpacked(source: Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any], fix: str) -> Scores:
    if header.get("format") != FORMAT or "values" not in tensors:
        raise InputFileError(source, "holds no scores", fix)
    labels = {axis: tuple(names) for axis, names in header["labels"].items()}
    extras = {name.removeprefix("extra."): t for name, t in tensors.items() if name.startswith("extra.")}
    plain = {name: header[name] for name in _PLAIN} | {"notes": tuple(header["notes"])}
    plain |= {"model": ModelIdentity(**header["model"]), "standard_error": tensors.get("standard_error")}
    return Scores(tensors["values"], tuple(header["axes"]), labels=labels, extras=extras, **plain)


def _write(target: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> Path:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(dir=target.parent, suffix=".part")
        os.close(handle)
        try:
            save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, temporary, metadata)
            os.replace(temporary, target)
        finally:
            Path(temporary).unlink(missing_ok=True)
    except (OSError, SafetensorError) as error:
        raise OutputError(target, str(error)) from error
    return target


# The fields that are JSON as they are.
_PLAIN = ("scorer", "parameters", "data", "n", "notes", "environment")


@dataclass(frozen=True)
class Agreement:
    """How alike two measurements rank the same units.

    Attributes:
        correlation: Pearson's r of the values, over all units that both have a value for; nan if one is constant.
        rank_correlation: Spearman's ρ over the same; ties share their mean rank.
        top_overlap: share of the top k units that both have.
        k, n: how many units are in the top, and in all.
    """

    correlation: float
    rank_correlation: float
    top_overlap: float
    k: int
    n: int

    def __str__(self) -> str:
        both = f"Pearson r = {self.correlation:.3f}, rank correlation {self.rank_correlation:.3f}"
        return f"{both}, {self.top_overlap:.0%} of the top {self.k} shared"


def agree(a: Scores, b: Scores, k: int | float = 0.1) -> Agreement:
    """Compare two measurements of one model: correlation of values and of ranks, and overlap of the top k.

    Args:
        k: units in the top (int), or their share of all units (float in (0, 1]).

    Raises:
        ScoresMismatchError: they are over different units, or fewer than two have a value in both.
    """
    b.require_axes(*a.axes)
    if a.values.shape != b.values.shape:
        problem = f"one has {tuple(a.values.shape)} units, the other {tuple(b.values.shape)}"
        raise ScoresMismatchError(problem, "compare measurements of one model")
    both = ~(a.values.isnan() | b.values.isnan()).flatten()
    if int(both.sum()) < 2:
        raise ScoresMismatchError("fewer than two units have a value in both", "measure more")
    first, second = (s.values.flatten()[both].double() for s in (a, b))
    count = count_of(k, int(both.sum()))
    tops = [set(_top(s, both, count)) for s in (a, b)]
    ranks = _pearson(_ranks(first), _ranks(second))
    return Agreement(_pearson(first, second), ranks, len(tops[0] & tops[1]) / count, count, int(both.sum()))


def count_of(k: int | float, total: int) -> int:
    """`k` itself (int), or that share of the total, rounded up (float in (0, 1]); at most the total.

    Raises:
        InvalidInputError: neither.
    """
    if isinstance(k, bool) or not isinstance(k, int | float) or not k > 0 or (isinstance(k, float) and k > 1):
        raise InvalidInputError("k", k, "a whole number >= 1, or a share in (0, 1]")
    # The tiny subtraction keeps 0.1 * 30 at 3.
    return min(k if isinstance(k, int) else math.ceil(k * total - 1e-9), total)


def _top(scores: Scores, allowed: Tensor, count: int) -> Sequence[tuple[int, ...]]:
    mask = allowed.view(scores.values.shape)
    return [unit for unit in scores.ranked() if mask[unit]][:count]


def _ranks(values: Tensor) -> Tensor:
    """1-based ranks in float64; equal values share the mean of their ranks."""
    _, inverse, counts = torch.unique(values, sorted=True, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def _pearson(a: Tensor, b: Tensor) -> float:
    a, b = a - a.mean(), b - b.mean()
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else math.nan
