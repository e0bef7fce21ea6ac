"""Reading a context once, compressing it in many ways, and answering from what is left."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch

from sparing.adapters.cache import EvictingCache
from sparing.core.method import Evict, Method
from sparing.core.placement import input_device
from sparing.loading import LoadedModel
from sparing.methods.kv.streaming_llm import Recency
from sparing.session import Session

# Nothing dropped: the gate of every comparison. (The scorer is never asked.)
FULL = Evict(keep=1.0, scorer=Recency())


@dataclass(frozen=True)
class Reading:
    """A prompt that was read in full.

    Attributes:
        cache: holds everything; what scorers observed is in it. Compress it with `compress`.
        next_logits: (vocabulary,) logits after the prompt's last token.
        seconds: of the forward, without the time that scorers took; and of the draft model, if it shortens the prompt.
    """

    cache: EvictingCache
    next_logits: torch.Tensor
    seconds: float


@dataclass(frozen=True)
class Compressed:
    """A cache after eviction.

    Attributes:
        seconds: reading, plus this method's own observing, scoring and evicting.
        read: the share of what is stored that each answer so far has read, of methods that read a part.
    """

    cache: EvictingCache
    seconds: float
    read: list[float] = field(default_factory=list)

    def note_read(self, cache: EvictingCache) -> None:
        """Add the share that an answer's own copy of the cache has read."""
        share = cache.report().read_share
        if share is not None:
            self.read.append(share)


@dataclass(frozen=True)
class Output:
    """An answer. `token_ids`: generated. `decode_seconds`, `decode_steps`: of the single-token forwards."""

    token_ids: list[int]
    decode_seconds: float
    decode_steps: int


class Engine:
    """Runs one loaded model inside a session.

    Args:
        loaded: the model.
        session: an entered session on that model; its own method does not matter here.
    """

    def __init__(self, loaded: LoadedModel, session: Session) -> None:
        self.model, self.tokenizer, self.session = loaded.model, loaded.tokenizer, session
        self.device, self.stop_ids = input_device(self.model), loaded.end_ids

    @torch.inference_mode()
    def read(self, token_ids: Sequence[int], methods: Iterable[Method]) -> Reading:
        """Read a prompt once, what and as all the methods read of it, with their scorers watching."""
        cache = self.session.watching_cache(methods)
        self._synchronize()
        began = time.perf_counter()
        read = self.session.shorten(cache, torch.tensor([list(token_ids)]))[0][0].tolist()
        cache.expect_prompt(len(read))
        logits = self._forward(read, cache, last_only=True)
        self._synchronize()
        observing = sum(cache.observing_seconds.values())
        return Reading(cache, logits[-1], time.perf_counter() - began - observing)

    @torch.inference_mode()
    def compress(self, reading: Reading, method: Method) -> Compressed:
        """Evict from a copy of what was read."""
        # The first fork runs what a scorer replays, and later ones find it done: each is charged for all of it, once.
        observed = reading.cache.observing_seconds
        scorer = None if method.keeps_all else method.parts().scorer
        before = 0.0 if scorer is None else observed[scorer]
        self._synchronize()
        began = time.perf_counter()
        cache = reading.cache.fork(method)
        self._synchronize()
        own = time.perf_counter() - began + before
        return Compressed(cache, reading.seconds + own)

    @torch.inference_mode()
    def answer(
        self,
        compressed: Compressed,
        question_ids: Sequence[int],
        max_new_tokens: int,
        first_logits: torch.Tensor | None = None,
        on_token: Callable[[int], None] = lambda token: None,
        one_line: bool = False,
    ) -> Output:
        """Greedy answer; the compressed cache itself is left as it is.

        Args:
            on_token: called with each token as it comes, for streaming.
            one_line: stop at the line break that ends the answer.
            question_ids: tokens after the compressed prompt; empty if the prompt ended with the question.
            first_logits: what the prompt's last token predicted; needed if `question_ids` is empty.
        """
        cache = compressed.cache.clone()
        logits = first_logits
        if question_ids:
            logits = self._forward(question_ids, cache, last_only=True)[-1]
        assert logits is not None
        token_ids: list[int] = []
        seconds, steps = 0.0, 0
        while True:
            token = int(logits.argmax())
            token_ids.append(token)
            on_token(token)
            ended = one_line and "\n" in self.tokenizer.decode([token]) and self._decode(token_ids).strip() != ""
            if ended or token in self.stop_ids or len(token_ids) >= max_new_tokens:
                compressed.note_read(cache)
                return Output(token_ids, seconds, steps)
            began = time.perf_counter()
            logits = self._forward([token], cache, last_only=True)[-1]
            self._synchronize()
            seconds, steps = seconds + time.perf_counter() - began, steps + 1

    @torch.inference_mode()
    def mean_loss(
        self,
        compressed: Compressed,
        question_ids: Sequence[int],
        target_ids: Sequence[int],
        first_logits: torch.Tensor | None = None,
    ) -> float:
        """Mean negative log-likelihood per target token, in nats, by teacher forcing.

        A method that drops tokens while decoding does so here too: it is fed token by token.
        """
        cache = compressed.cache.clone()
        fed = [*question_ids, *target_ids[:-1]]
        step = 1 if cache.follows_decoding else max(len(fed), 1)
        parts = [self._forward(fed[start : start + step], cache) for start in range(0, len(fed), step)]
        compressed.note_read(cache)
        if not question_ids:
            assert first_logits is not None
            parts.insert(0, first_logits[None])
        rows = torch.cat(parts)[max(len(question_ids) - 1, 0) :]
        targets = torch.tensor(target_ids, device=self.device)
        return float(torch.nn.functional.cross_entropy(rows.float(), targets))

    def text(self, output: Output) -> str:
        """The answer as text, special tokens left out."""
        return self._decode(output.token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        decoded: str = self.tokenizer.decode(token_ids, skip_special_tokens=True)
        return decoded

    def _forward(self, token_ids: Sequence[int], cache: EvictingCache, last_only: bool = False) -> torch.Tensor:
        """(tokens, vocabulary) logits, or only the last row."""
        ids = torch.tensor([list(token_ids)], device=self.device)
        result: torch.Tensor = self.model(
            ids, past_key_values=cache, use_cache=True, logits_to_keep=1 if last_only else 0
        ).logits[0]
        return result

    def _synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
