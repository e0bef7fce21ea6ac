"""Driving a model by hand: the same tokens, call by call, so that two runs can be compared at every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from sparing.adapters.cache import EvictingCache
from sparing.core.method import Method
from sparing.session import Session, use
from sparing.testing.models import VOCABULARY

PROMPT = 64
STEPS = 4


@dataclass(frozen=True)
class Prompt:
    """A batch of token sequences, left-padded to one length.

    Attributes:
        ids: (B, n) tokens. mask: (B, n) int64, 0 for pads.
        forced: (B, steps) tokens that are decoded after it, whatever the model would say.
    """

    ids: Tensor
    mask: Tensor
    forced: Tensor

    @property
    def length(self) -> int:
        """Tokens of the longest sequence."""
        return self.ids.shape[1]

    @property
    def pads(self) -> list[int]:
        """Left pads of every row."""
        return [int(n) for n in (self.mask == 0).sum(-1)]

    def split(self, method: Method) -> list[Prompt]:
        """The batch; for a method that replays prompts, every row on its own, with its pads."""
        if not method.parts().scorer.replays:
            return [self]
        parts = [slice(row, row + 1) for row in range(self.ids.shape[0])]
        return [Prompt(self.ids[part], self.mask[part], self.forced[part]) for part in parts]

    def row(self, index: int) -> Prompt:
        """One row on its own, without its pads."""
        part, first = slice(index, index + 1), self.pads[index]
        return Prompt(self.ids[part, first:], self.mask[part, first:], self.forced[part])


def random_prompt(*lengths: int, steps: int = STEPS, seed: int = 0) -> Prompt:
    """Random sequences of the given lengths (one of `PROMPT` tokens if none is given), left-padded with token 0."""
    lengths = lengths or (PROMPT,)
    generator = torch.Generator().manual_seed(seed)
    rows = [torch.randint(1, VOCABULARY, (n,), generator=generator) for n in lengths]
    longest = max(lengths)
    ids = torch.stack([torch.nn.functional.pad(row, (longest - len(row), 0)) for row in rows])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(row), (longest - len(row), 0)) for row in rows])
    forced = torch.stack(
        [torch.randint(1, VOCABULARY, (steps,), generator=torch.Generator().manual_seed(1000 + n)) for n in lengths]
    )
    return Prompt(ids, mask, forced)


class Driver:
    """Feeds a model tokens through one cache and keeps mask and positions straight."""

    def __init__(self, model: PreTrainedModel, cache: Cache) -> None:
        self.model, self.cache = model, cache
        self.mask: Tensor | None = None

    @torch.no_grad()
    def feed(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Logits (B, q, V) of new tokens."""
        mask, positions = self.follow(ids, mask)
        output = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=self.cache)
        logits: Tensor = output.logits
        return logits

    def follow(self, ids: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The whole mask and the new tokens' position ids, once `ids` have come."""
        new = torch.ones_like(ids) if mask is None else mask
        self.mask = new if self.mask is None else torch.cat([self.mask, new], dim=1)
        positions = (self.mask.cumsum(-1) - 1).clamp_min(0)[:, -ids.shape[1] :]
        return self.mask, positions

    def read(self, prompt: Prompt, chunks: Sequence[int] = ()) -> Tensor:
        """Read a prompt, announced to the cache, in chunks of the given sizes (default: at once)."""
        if isinstance(self.cache, EvictingCache):
            self.cache.expect_prompt(prompt.length)
        sizes = list(chunks) or [prompt.length]
        parts = zip(prompt.ids.split(sizes, dim=1), prompt.mask.split(sizes, dim=1), strict=True)
        return torch.cat([self.feed(ids, mask) for ids, mask in parts], dim=1)

    def decode(self, prompt: Prompt) -> list[Tensor]:
        """Logits (B, V) after each forced token."""
        return [self.feed(prompt.forced[:, [step]])[:, -1] for step in range(prompt.forced.shape[1])]


@dataclass(frozen=True)
class Run:
    """What came of a run.

    Attributes:
        session: the session, left. cache: its cache. logits: after the prompt and after each forced token.
    """

    session: Session
    cache: EvictingCache
    logits: list[Tensor]


def run_method(model: PreTrainedModel, method: Method, prompt: Prompt, chunks: Sequence[int] = ()) -> Run:
    """Prompt and forced tokens through a compressed cache."""
    with use(model, method) as session:
        cache = session.new_cache()
        driver = Driver(model, cache)
        logits = [driver.read(prompt, chunks)]
        cache.report()  # carries out the eviction that is due
        logits += driver.decode(prompt)
    return Run(session, cache, logits)


def run_untouched(model: PreTrainedModel, prompt: Prompt, chunks: Sequence[int] = ()) -> list[Tensor]:
    """The same with transformers' own cache."""
    driver = Driver(model, DynamicCache(config=model.config))
    return [driver.read(prompt, chunks), *driver.decode(prompt)]
