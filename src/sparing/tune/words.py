"""A tuning in sentences."""

from __future__ import annotations

from sparing.tune.standing import Standing
from sparing.tune.tuner import Outcome


def verdict(outcome: Outcome) -> list[str]:
    """What to run, how sure that is; or that nothing meets the request, and what would."""
    sentences = [_recommended(outcome)] if outcome.recipe is not None else _unmet(outcome)
    for cell, score in outcome.left_out:
        sentences.append(f"{cell.label} was left out: the full cache itself scores {score:.2f} there.")
    sentences += [f"Left out: {error}." for error in outcome.refused]
    return sentences


def figures(each: Standing) -> str:
    """Loss with its interval, bytes and seconds, in one phrase."""
    loss = each.loss
    parts = [
        f"a loss of {percent(loss.mean)} ({percent(loss.low)} to {percent(loss.high)})",
        f"{each.share:.1%} of the bytes",
        f"{each.prefill_s:.3g} s until the first token",
    ]
    if each.decode_s is not None:
        parts.append(f"{milliseconds(each.decode_s)} ms a token")
    return ", ".join(parts)


def percent(share: float) -> str:
    """ "−1.3 %"."""
    return f"{100 * share:.1f} %".replace("-", "−").replace("−0.0 ", "0.0 ")


def milliseconds(seconds: float | None) -> str:
    """ "26.8"; a dash if that was not measured."""
    return "–" if seconds is None else f"{1000 * seconds:.3g}"


def _recommended(outcome: Outcome) -> str:
    _, held = outcome.finalists[0]
    text = f"Run {held.label}: {figures(held)}, on {held.n} contexts a task that nothing was chosen by."
    limit = outcome.request.max_loss
    if limit is None:
        return text
    if held.loss.high <= limit:
        return f"{text} That the loss is at most {percent(limit)} is certain at 95 %."
    return (
        f"{text} Its mean is within {percent(limit)}; that the loss itself is, so few contexts can't show: "
        "more --samples make the interval narrower."
    )


def _unmet(outcome: Outcome) -> list[str]:
    request, found = outcome.request, outcome.searched
    if not request.broken(outcome.full):
        return [
            f"Run the model as it is: its full cache meets the request ({request}), and nothing smaller that was tried."
        ]
    sentences = [f"Nothing that was tried meets the request ({request})."]
    for _, held in outcome.finalists[:1]:
        sentences.append(f"The nearest is {held.label}: it {' and '.join(request.broken(held))}.")
    if request.max_loss is not None:
        enough = [each for each in found if each.loss.mean <= request.max_loss]
        if enough and not request.minds_time_only:
            least = min(enough, key=lambda each: each.share)
            sentences.append(f"What would lose so little: {least.label}, {figures(least)}.")
        elif enough:
            fastest = min(enough, key=lambda each: (each.decode_s or 0.0, each.prefill_s))
            sentences.append(f"What would lose so little, the fastest: {fastest.label}, {figures(fastest)}.")
        else:
            sentences.append(f"Nothing that was tried loses at most {percent(request.max_loss)}, at any size.")
    within = [each for each in found if not _limits_broken(outcome, each)]
    if within:
        best = min(within, key=lambda each: each.loss.mean)
        sentences.append(f"What loses least within the other limits: {best.label}, {figures(best)}.")
    return sentences


def _limits_broken(outcome: Outcome, each: Standing) -> bool:
    """True if a limit other than that of the loss is broken."""
    return any(found > limit for name, (limit, found) in outcome.request.limits(each).items() if name != "max_loss")
