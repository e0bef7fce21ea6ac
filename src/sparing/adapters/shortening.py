"""Prompts that are shortened before a model reads them: what is read in their place, and what comes out of it.

Callers speak of whole prompts, the cache and the model of short ones. A cache that has read a short prompt remembers
which columns of the whole one that were; whatever the caller passes later begins with the whole prompt again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig

from sparing.adapters.masks import check_left_pads
from sparing.core.draft import Drafted
from sparing.core.lens import Lens
from sparing.core.pattern import causal_pairs
from sparing.core.prompt import Chosen, PromptDropper
from sparing.errors import InvalidInputError, require


@dataclass(frozen=True)
class Shortening:
    """Which tokens of the prompts of a batch are read.

    Attributes:
        method: the name of the method that chose.
        columns: per row, the columns of the whole prompt that are read, increasing (int64).
        tokens: per row, the tokens of the whole prompt. width: its columns, pads counted.
        length: columns of the short prompts, pads counted.
        drafted: what a draft model wrote after the prompt, if it was a single one.
    """

    method: str
    columns: tuple[Tensor, ...]
    tokens: tuple[int, ...]
    width: int
    length: int
    drafted: Drafted | None = None

    @property
    def dropped(self) -> tuple[int, ...]:
        """Per row, the tokens that are not read."""
        return tuple(n - len(columns) for n, columns in zip(self.tokens, self.columns, strict=True))

    @property
    def density(self) -> float:
        """The share of the (query, key) pairs of the whole prompts that are pairs of the short ones."""
        read = sum(causal_pairs(len(columns), len(columns)) for columns in self.columns)
        return read / max(sum(causal_pairs(n, n) for n in self.tokens), 1)

    def apply(self, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """What the model reads in the place of (B, n) ids that begin with the whole prompts, and its mask."""
        require(ids.shape[0] == len(self.columns), "input_ids", f"{ids.shape[0]} sequences", str(len(self.columns)))
        require(ids.shape[1] >= self.width, "input_ids", f"{ids.shape[1]} tokens", f"the {self.width} of the prompt")
        if self.length == self.width and not any(self.dropped):
            return ids, mask
        later = ids.shape[1] - self.width
        short = ids[:, :1].repeat(1, self.length + later)  # what stands under a pad is never read
        seen = torch.zeros(short.shape, dtype=torch.int64 if mask is None else mask.dtype, device=ids.device)
        for row, columns in enumerate(self.columns):
            short[row, self.length - len(columns) : self.length] = ids[row, columns.to(ids.device)]
            seen[row, self.length - len(columns) :] = 1
        if later:
            short[:, self.length :] = ids[:, self.width :]
            if mask is not None:
                seen[:, self.length :] = mask[:, self.width :]
        return short, seen

    def in_whole(self, positions: Tensor, row: int = 0) -> Tensor:
        """Positions in a short prompt or after it → those in the whole one, pads counted in both."""
        pads = self.length - len(self.columns[row])
        where = torch.cat([torch.arange(pads), self.columns[row]])  # pads are never asked for
        inside = where[positions.clamp_max(self.length - 1)]
        return torch.where(positions < self.length, inside, positions + self.width - self.length)

    def of_rows(self, rows: Sequence[int], there: int) -> Shortening:
        """Of a cache of `there` rows (a multiple of the prompts: beams), only these."""
        owners = [row * len(self.columns) // there for row in rows]
        columns = tuple(self.columns[owner] for owner in owners)
        return replace(self, columns=columns, tokens=tuple(self.tokens[owner] for owner in owners))

    def __str__(self) -> str:
        read = sum(len(columns) for columns in self.columns)
        return f"{read:,} of the prompt's {sum(self.tokens):,} tokens read, chosen by {self.method}"


def shorten(dropper: PromptDropper, lens: Lens, ids: Tensor, mask: Tensor | None) -> Shortening:
    """Let a method choose, row by row, what is read of (B, n) prompts.

    Args:
        lens: of its draft model. mask: (B, n), 0 for pads; None if there are none.

    Raises:
        CacheStateError: pads are not on the left.
    """
    seen = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    check_left_pads(seen)
    chosen, pads = [], (~seen).sum(-1).tolist()
    for row, pad in enumerate(pads):
        prompt = ids[row, pad:].cpu()
        stays = dropper.stays(len(prompt))
        one = Chosen(torch.arange(len(prompt))) if stays >= len(prompt) else dropper.choose(lens, prompt)
        assert len(one.kept) == min(stays, len(prompt)), dropper.label
        assert bool((one.kept.diff() > 0).all()), dropper.label
        chosen.append(one)
    columns = tuple(one.kept + pad for one, pad in zip(chosen, pads, strict=True))
    tokens = tuple(ids.shape[1] - pad for pad in pads)
    kept = [len(each) for each in columns]
    length = ids.shape[1] if kept == list(tokens) else max(kept)
    drafted = chosen[0].drafted if len(chosen) == 1 else None
    return Shortening(dropper.label, columns, tokens, ids.shape[1], length, drafted)


def implied_mask(ids: Tensor, kwargs: dict[str, Any], config: GenerationConfig) -> Tensor | None:
    """The mask of the prompts given to `generate`: the caller's, or what transformers makes of pad tokens."""
    if kwargs.get("attention_mask") is not None:
        mask: Tensor = kwargs["attention_mask"]
        return mask
    pad, ends = (kwargs.get(name, getattr(config, name)) for name in ("pad_token_id", "eos_token_id"))
    ends = ends if isinstance(ends, list) else [ends]
    return None if pad is None or pad in ends or not bool((ids == pad).any()) else ids.ne(pad).long()


def short_arguments(
    args: tuple[Any, ...], kwargs: dict[str, Any], short: Tensor, mask: Tensor | None, config: GenerationConfig
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `generate` with a short prompt in the place of the whole one.

    Raises:
        InvalidInputError: something else has a value per token of the whole prompt.
    """
    name = "inputs" if kwargs.get("inputs") is not None else "input_ids"
    whole: Tensor = args[0] if args else kwargs[name]
    for key, value in kwargs.items():
        per_token = isinstance(value, Tensor) and value.shape[:2] == whole.shape and value.dim() > 1
        if per_token and key not in (name, "attention_mask"):
            raise InvalidInputError(
                key, f"a value for each of {whole.shape[1]} tokens", "none: the prompt is shortened"
            )
    kwargs = {**kwargs, "attention_mask": mask}
    if kwargs.get("streamer") is not None:
        kwargs["streamer"] = _WholePrompt(kwargs["streamer"], whole)
    if kwargs.get("max_new_tokens", config.max_new_tokens) is None:
        for limit in ("max_length", "min_length"):  # of prompt and answer together, as the caller counts them
            given = kwargs.get(limit, getattr(config, limit))
            if given and (limit in kwargs or given != getattr(GenerationConfig(), limit)):
                kwargs[limit] = max(given - whole.shape[1] + short.shape[1], 0)
    if args:
        return (short, *args[1:]), kwargs
    return args, {**kwargs, name: short}


def whole_output(output: Any, whole: Tensor, length: int) -> Any:
    """What `generate` returned for short prompts of `length` columns, with the whole ones in their place."""
    sequences: Tensor = output if isinstance(output, Tensor) else output.sequences
    answers = sequences[:, length:]
    full = torch.cat([whole.repeat_interleave(len(answers) // len(whole), dim=0).to(answers.device), answers], dim=1)
    if isinstance(output, Tensor):
        return full
    output.sequences = full
    return output


class _WholePrompt:
    """A streamer that is shown the whole prompt, not the short one."""

    def __init__(self, streamer: Any, prompt: Tensor) -> None:
        self._streamer = streamer
        self._prompt: Tensor | None = prompt

    def put(self, value: Tensor) -> None:
        """The first call is the prompt's."""
        if self._prompt is not None:
            value, self._prompt = self._prompt.cpu(), None
        self._streamer.put(value)

    def end(self) -> None:
        """The text has ended."""
        self._streamer.end()
