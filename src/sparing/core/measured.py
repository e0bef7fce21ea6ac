"""Methods that know a model from measurements of its heads or layers."""

from __future__ import annotations

import math
from dataclasses import dataclass

from sparing.core.allocate_heads import Importances
from sparing.core.method import Method, methods
from sparing.core.scores import Scores
from sparing.errors import InvalidInputError, ScoresMismatchError, UnknownNameError


@dataclass(frozen=True)
class MeasuredMethod(Method):
    """Base of the methods whose registry entry names scorers (`needs`).

    Attributes:
        scores: what was measured: one measurement, or a tuple of several. A method that needs one takes any, of heads
            by whatever scorer; one that needs several tells them apart by their scorers.

    Raises:
        InvalidInputError: none was given. ScoresMismatchError: one is missing, or over other units than are needed.
    """

    scores: Scores | tuple[Scores, ...] | None = None

    def __post_init__(self) -> None:
        if not self.measurements or not all(isinstance(each, Scores) for each in self.measurements):
            allowed = "what was measured on the model (Scores, or several in a tuple)"
            raise InvalidInputError(f"{self.label}.scores", self.scores, allowed, self._fix)
        super().__post_init__()

    @property
    def measurements(self) -> tuple[Scores, ...]:
        """See `Method.measurements`."""
        if self.scores is None:
            return ()
        return self.scores if isinstance(self.scores, tuple) else (self.scores,)

    @property
    def _fix(self) -> str:
        name = self.label
        return f"make it: sparing calibrate --method {name} --model ... --out FILE, then give {name}(scores=FILE)"

    def measured(self, name: str) -> Scores:
        """The measurement by that scorer, or the only one that there is if only one is needed."""
        needs = self.info.needs if self.info is not None else ()
        is_only = len(self.measurements) == 1 and len(needs) <= 1
        found = [each for each in self.measurements if is_only or each.scorer == name]
        if len(found) != 1:
            given = ", ".join(each.scorer for each in self.measurements)
            problem = f"{self.label} needs one measurement by each of {', '.join(needs)}; there is {given}"
            raise ScoresMismatchError(problem, self._fix)
        return found[0]

    def per_kv_head(self, name: str, reduce: str) -> Importances:
        """[layer][KV head] of a measurement of query or KV heads; what has no value is less than anything.

        Args:
            reduce: over the query heads of a KV head, "max" or "mean".
        """
        scores = self.measured(name)
        if scores.axes != ("layer", "kv_head"):
            scores = scores.per_kv_head(reduce)
        return tuple(tuple(row) for row in scores.values.nan_to_num(-math.inf).tolist())


def needed_by(method: str) -> tuple[str, ...]:
    """The scorers whose measurements a registered method needs, or can use.

    Raises:
        UnknownNameError: no such method. InvalidInputError: it uses none.
    """
    known = methods()
    if method not in known:
        raise UnknownNameError("method", method, known)
    needs = known[method].needs + known[method].takes
    if not needs:
        allowed = "one of " + ", ".join(name for name, info in known.items() if info.needs + info.takes)
        raise InvalidInputError("method", method, allowed, "the others need no measurement")
    return needs
