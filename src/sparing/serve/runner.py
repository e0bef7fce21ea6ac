"""What the worker's thread does with the model: reading prompts and writing answers, a step at a time.

`complete` and `compress` are generators, one for each request. Between two steps others have their turn; closing a
generator frees its cache.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from sparing.adapters.cache import EvictingCache
from sparing.adapters.lens import ModelLens
from sparing.core.placement import input_device
from sparing.core.ranker import Ranker
from sparing.loading import LoadedModel
from sparing.reranking import rank_through
from sparing.serve.documents import Document, kept_shares
from sparing.serve.events import DocumentRead, Done, Event, Piece, Ranking, Read
from sparing.serve.memory import Costs
from sparing.serve.sampling import Sampler, Sampling
from sparing.serve.text import TextStream, decoder
from sparing.serve.usage import Usage
from sparing.session import Session

# Tokens of a prompt that are read in one step; for so long the tokens of other requests wait.
CHUNK = 512
# Tokens of the longer of the two prompts on which costs are measured.
_MEASURED = 256

Post = Callable[[Event], None]
Steps = Callable[["Runner", Post], Iterator[None]]


class Runner:
    """A model inside a session.

    Args:
        session: an entered session on the loaded model.
    """

    def __init__(self, loaded: LoadedModel, session: Session) -> None:
        self.model, self.tokenizer, self.session = loaded.model, loaded.tokenizer, session
        self.device, self.end_ids = input_device(self.model), loaded.end_ids
        self._longest = min(_MEASURED, (loaded.max_length or _MEASURED + 1) - 1)

    @cached_property
    def lens(self) -> ModelLens:
        """How rankers see the model; first asked for in a paused session, since making it runs the model."""
        return ModelLens(self.model, self.tokenizer)

    def forward(self, token_ids: Tensor, cache: EvictingCache) -> Tensor:
        """(vocabulary,) logits after the last of (1, n) tokens."""
        logits: Tensor = self.model(token_ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
        return logits[0, -1]

    def feed(self, token_ids: Tensor, cache: EvictingCache, chunk: int = CHUNK) -> Generator[None, None, Tensor]:
        """Read (1, n) tokens, `chunk` in a step; returns the logits after the last one."""
        logits = self.forward(token_ids[:, :chunk], cache)
        for start in range(chunk, token_ids.shape[1], chunk):
            yield
            logits = self.forward(token_ids[:, start : start + chunk], cache)
        return logits

    def read(self, token_ids: Sequence[int]) -> Generator[None, None, tuple[EvictingCache, Tensor, Usage]]:
        """Read a prompt and compress it; returns the cache, the logits after the prompt, and what it came to."""
        cache, prompt = self._begin(self.tensor(token_ids))
        # What is sparse in the attention of a whole prompt may be another thing in its parts.
        chunk = CHUNK if self.session.method.reading is None else prompt.shape[1]
        logits = yield from self.feed(prompt, cache, chunk)
        return cache, logits, Usage.of(cache, len(token_ids))

    def measure(self) -> Costs:
        """What a prompt costs at most. Everything that compiles on first use does so here.

        Raises:
            MethodRefusedError, UnsupportedModelError: the method cannot work on this model.
        """
        random = torch.Generator().manual_seed(0)
        size = (1, self._longest)
        token_ids = torch.randint(self.model.get_input_embeddings().num_embeddings, size, generator=random)
        found, full, lanes = [], 0, 0
        for tokens in (self._longest // 2, self._longest):
            cache, prompt = self._begin(token_ids[:, :tokens].to(self.device))
            self.forward(prompt, cache)
            lanes, whole = sum(layer.kv_heads for layer in cache.evicting), cache.bytes_kept
            # Methods that free nothing hold more afterwards than before.
            found.append((prompt.shape[1], max(whole, cache.report().bytes_kept)))
            full = cache.bytes_full // tokens  # those that a method has dropped unread count as well
            self.forward(prompt[:, :1], cache)
        return Costs.fitted(found[0], found[1], full, lanes)

    def tensor(self, token_ids: Sequence[int]) -> Tensor:
        """(1, n) on the model's device."""
        return torch.tensor([list(token_ids)], device=self.device)

    def _begin(self, token_ids: Tensor) -> tuple[EvictingCache, Tensor]:
        """A new cache, and what the model reads into it."""
        cache = self.session.new_cache()
        self.session.cache = None  # the session would hold on to it after its request has ended
        prompt = self.session.shorten(cache, token_ids)[0]
        cache.expect_prompt(prompt.shape[1])
        return cache, prompt


@dataclass
class Completion:
    """One answer that is to be written.

    Attributes:
        token_ids: of the prompt, or of what follows the document.
        document: what the answer is about, held compressed; taken out once it is not needed any more.
        max_tokens, stop: see `TextStream`. sampling: see `Sampler`.
    """

    token_ids: Sequence[int]
    document: Document | None
    max_tokens: int
    stop: Sequence[str]
    sampling: Sampling


def complete(runner: Runner, asked: Completion, post: Post) -> Iterator[None]:
    """Write one answer: `Read`, a `Piece` for every bit of text, `Done`."""
    if asked.document is None:
        cache, logits, usage = yield from runner.read(asked.token_ids)
    else:
        known, cache = len(asked.document.token_ids), asked.document.cache.clone()
        asked.document = None
        logits = yield from runner.feed(runner.tensor(asked.token_ids), cache)
        usage = Usage.of(cache, known + len(asked.token_ids), known)
    post(Read(usage))
    sampler = Sampler(asked.sampling)
    stream = TextStream(decoder(runner.tokenizer), runner.end_ids, asked.stop, asked.max_tokens)
    while True:
        token = sampler.draw(logits)
        text, reason = stream.push(token)
        if text:
            post(Piece(text))
        if reason is not None:
            post(Done(reason, stream.tokens))
            return
        yield
        logits = runner.forward(runner.tensor([token]), cache)


def rank(runner: Runner, ranker: Ranker, query: str, documents: Sequence[str], post: Post) -> Iterator[None]:
    """Rank documents: `Ranking`. The model is its own meanwhile, since no cache is compressed here."""
    with runner.session.paused():
        [ranked] = rank_through(runner.lens, [query], documents, ranker)
    post(Ranking(ranked))
    yield from ()


def compress(runner: Runner, key: str, token_ids: Sequence[int], post: Post) -> Iterator[None]:
    """Read a document before any question is known: `DocumentRead`."""
    cache, _, usage = yield from runner.read(token_ids)
    post(DocumentRead(Document(key, token_ids, cache, usage, kept_shares(cache, len(token_ids)))))
