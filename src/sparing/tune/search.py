"""The search: Optuna proposes candidates, generation by generation, and contexts are given to those worth it.

A generation reads its first contexts together, so that all share their prefills. Then (successive halving) the best
third reads on, unless it is certain already that a candidate won't do: it breaks a limit that does not depend on the
context, or the interval of its loss lies above what is allowed, or above that of the best candidate.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparing.compare.cells import GATE, Contestant
from sparing.compare.observer import Observer
from sparing.errors import MethodRefusedError, MissingExtraError
from sparing.tune.request import Request
from sparing.tune.space import Space
from sparing.tune.standing import FINALISTS, Contexts, Standing, best_of_each, standing

REDUCTION = 3  # of contexts and candidates from rung to rung
GENERATION = 12  # candidates that are proposed together
# A limit in time is certainly broken only well above it: machines are noisy.
TIME_MARGIN = 1.25
# Values of candidates that break the request lie above all that meet it.
INFEASIBLE = 1e3
_CERTAIN = {
    "memory": "holds {:.1%} of the bytes",
    "bytes": "holds {:,} bytes",
    "latency": "takes {:.3g} s",
    "first_token": "takes {:.3g} s",
    "max_loss": "loses at least {:.0%}",
}


@dataclass
class Search:
    """A search on its way.

    Attributes:
        observer: of the cells. request: what is asked for. space: what is tried.
        contexts: of each counted cell, those that choices may be based on.
        trials: how many candidates are proposed. seed: of the proposals.
        progress: told (candidates proposed, all, words).
        finished: candidates that read all contexts. dropped: the others, with the reason. refused: those that can't
            work on the model, with the error.
    """

    observer: Observer
    request: Request
    space: Space
    contexts: Contexts
    trials: int
    seed: int
    progress: Callable[[int, int, str], None]
    finished: list[Standing] = field(default_factory=list)
    dropped: list[tuple[Standing, str]] = field(default_factory=list)
    refused: dict[Contestant, MethodRefusedError] = field(default_factory=dict)

    def run(self) -> None:
        """Propose and read until all trials are used up.

        Raises:
            MissingExtraError: Optuna is not installed. MethodRefusedError: every method was refused; the first error.
            SparingError: see `Observer.observe`.
        """
        study = _study(self.seed)
        for given in self.space.first():
            study.enqueue_trial(given)
        asked = 0
        while asked < self.trials:
            wanted = len(self.space.methods) if asked == 0 else GENERATION
            trials = [study.ask() for _ in range(min(wanted, self.trials - asked))]
            asked += len(trials)
            proposals = {trial.number: self.space.suggest(trial) for trial in trials}
            self.progress(asked, self.trials, self._best_words())
            values = self.generation(list(dict.fromkeys(proposals.values())))
            for trial in trials:
                study.tell(trial, values[proposals[trial.number]])
        if not (self.finished or self.dropped):
            raise next(iter(self.refused.values()))
        if self.request.max_loss is not None:
            self.progress(asked, self.trials, "making the best ones smaller")
            self.polish()

    def generation(self, proposals: Sequence[Contestant]) -> dict[Contestant, float]:
        """Read with some candidates: the value of each at the rung that it reached; smaller is better."""
        values = {each.contestant: self.value(each) for each in self.finished}
        fitted = self._fitted([each for each in self._met(proposals) if each not in values])
        alive = [each for each in dict.fromkeys(fitted.values()) if each not in values]
        for rung in self.rungs():
            contexts = {cell: indices[:rung] for cell, indices in self.contexts.items()}
            self._read(alive, contexts)
            standings = sorted((standing(self.observer, each, contexts) for each in alive), key=self.value)
            values |= {each.contestant: self.value(each) for each in standings}
            standings = [each for each in standings if not self._is_ruled_out(each)]
            if rung == max(self.rungs()):
                self.finished += standings
                break
            kept = max(FINALISTS, math.ceil(len(standings) / REDUCTION))
            self.dropped += [(each, f"not among the best {kept} after {rung} contexts") for each in standings[kept:]]
            alive = [each.contestant for each in standings[:kept]]
        return {each: values.get(fitted.get(each, each), 2 * INFEASIBLE) for each in proposals}

    def rungs(self) -> list[int]:
        """Contexts of a cell that have been read after each round."""
        most = max(len(indices) for indices in self.contexts.values())
        return sorted({max(2, most // REDUCTION**2), max(2, most // REDUCTION), most})

    def value(self, each: Standing) -> float:
        """What is minimised: what is spent where the loss is limited, else the loss; far above both if not allowed."""
        if self.request.broken(each):
            return INFEASIBLE + self._excess(each)
        # The other of the two decides between equals.
        spent, lost = self.spent(each), each.loss.mean
        return spent + 1e-3 * lost if self.request.max_loss is not None else lost + 1e-3 * spent

    def spent(self, each: Standing) -> float:
        """What a candidate costs: the share of the bytes that it holds, or its time where only time is limited."""
        if not self.request.minds_time_only:
            return each.share
        token = each.decode_s or 0.0
        return token if self.request.latency is not None else each.prefill_s

    def _excess(self, each: Standing) -> float:
        """By how much limits are broken, as shares of them."""
        limits = self.request.limits(each).items()
        # A loss is a share already, and its limit may be 0.
        return sum(max(found - limit, 0.0) / (1.0 if name == "max_loss" else limit) for name, (limit, found) in limits)

    def _is_ruled_out(self, each: Standing) -> bool:
        """True, and noted, if more contexts would not change that the candidate won't do."""
        reason = self._certain(each)
        if reason:
            self.dropped.append((each, reason))
        return bool(reason)

    def _certain(self, each: Standing) -> str:
        request = self.request
        for name, (limit, found) in request.limits(each).items():
            least = each.loss.low if name == "max_loss" else found
            margin = TIME_MARGIN if name in ("latency", "first_token") else 1.0
            if least > margin * limit:
                return _CERTAIN[name].format(least)
        best = min((done.loss.high for done in self.finished if not request.broken(done)), default=math.inf)
        if request.max_loss is None and each.loss.low > best:
            return f"loses at least {each.loss.low:.0%}, the best one at most {best:.0%}"
        return ""

    def _fitted(self, proposals: Sequence[Contestant]) -> dict[Contestant, Contestant]:
        """Proposals, each with the candidate that it makes: with a budget so small that its bytes are within limits."""
        fitted = {each: each for each in proposals}
        first = {cell: indices[: self.rungs()[0]] for cell, indices in self.contexts.items()}
        for _ in range(3):
            candidates = list(dict.fromkeys(fitted.values()))
            self._read(candidates, first)
            room = {each: self._room(standing(self.observer, each, first)) for each in candidates}
            smaller = {
                each: self.space.resized(each, 0.98 * factor) for each, factor in room.items() if 0.25 < factor < 1
            }
            able = self._met(smaller.values())
            smaller = {each: made for each, made in smaller.items() if made in able}
            if not smaller:
                break
            fitted = {proposal: smaller.get(each, each) for proposal, each in fitted.items()}
        return fitted

    def _met(self, candidates: Iterable[Contestant]) -> list[Contestant]:
        """Those that can work on the model, each once; why the others can't is noted."""
        candidates = list(dict.fromkeys(candidates))
        refused = self.observer.introduce(candidates)
        self.refused |= refused
        return [each for each in candidates if each not in refused]

    def _room(self, each: Standing) -> float:
        """The limit in bytes, as a share of what is held."""
        limits = self.request.limits(each).items()
        return min((limit / held for name, (limit, held) in limits if name in ("memory", "bytes")), default=math.inf)

    def _read(self, candidates: Sequence[Contestant], contexts: Contexts) -> None:
        readers = [GATE, *candidates]
        self.observer.observe((cell, index, readers) for cell, indices in contexts.items() for index in indices)

    def _best_words(self) -> str:
        best = min(self.finished, key=self.value, default=None)
        return f"best: {best.label}, loss {best.loss.mean:.1%}, {best.share:.0%} of the bytes" if best else "searching"

    def polish(self) -> None:
        """Try the best candidates at smaller budgets: proposals rarely hit the least that still does."""
        best = best_of_each((each for each in self.finished if not self.request.broken(each)), self.value)
        smaller = [self.space.resized(each.contestant, factor) for each in best for factor in (0.9, 0.8, 0.65, 0.5)]
        if smaller:
            self.generation(list(dict.fromkeys(smaller)))

    def relax(self) -> None:
        """Nothing meets the request: read with the best methods at larger sizes too, to say what would."""
        everyone = [*self.finished, *(each for each, _ in self.dropped)]
        best = best_of_each(everyone, lambda each: each.loss.mean)
        larger = [self.space.resized(each.contestant, factor) for each in best for factor in (1.5, 2, 3, 5, 8)]
        known = {each.contestant for each in self.finished}
        alive = self._met(each for each in larger if each not in known and not self.space.is_full(each))
        self._read(alive, self.contexts)
        self.finished += [standing(self.observer, each, self.contexts) for each in alive]


def _study(seed: int) -> Any:
    try:
        import optuna
    except ImportError as error:
        raise MissingExtraError("Optuna", "tune") from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    with warnings.catch_warnings():
        # A sampler over conditional parameters is marked as experimental.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(multivariate=True, group=True, constant_liar=True, seed=seed)
    return optuna.create_study(sampler=sampler)
