"""The event loop's side of the server: who is let in, what they hold, and what becomes of them."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import math
import time
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from starlette.types import Receive

from sparing.core.method import Method
from sparing.core.ranker import Ranker, parse_ranker
from sparing.loading import LoadedModel
from sparing.serve.documents import Documents, key_of
from sparing.serve.events import Begun, DocumentRead, Done, Ended, Event, Piece, Read
from sparing.serve.memory import MemoryBudget
from sparing.serve.metrics import Metrics
from sparing.serve.prompts import Prompts
from sparing.serve.refusals import Refusal, shutting_down
from sparing.serve.runner import Completion, complete, compress, rank
from sparing.serve.sampling import Sampling
from sparing.serve.settings import Settings
from sparing.serve.streams import while_connected
from sparing.serve.worker import Job, Worker

T = TypeVar("T")

_LONGEST_WAIT = 60  # seconds that a client is told to wait at most


class Service:
    """A model that serves requests. All methods but `close` belong to the event loop.

    Args:
        method: what every request's cache is compressed with. ranker: of `/v1/rerank`; by default ICR.

    Attributes:
        name: what clients call the model. A folder's own name, not where it lies.

    Raises:
        SparingError: the method cannot work on this model.
    """

    def __init__(self, loaded: LoadedModel, method: Method, settings: Settings, ranker: Ranker | None = None) -> None:
        self.loaded, self.method, self.settings = loaded, method, settings
        self.ranker = ranker or parse_ranker("icr")
        self.worker = Worker(loaded, method, settings.max_concurrent)
        self.costs = self.worker.start()
        self.memory = MemoryBudget(settings.memory)
        self.documents = Documents(self.memory)
        folder = Path(loaded.name).expanduser()
        self.name = folder.resolve().name if folder.is_dir() else loaded.name
        self.created = int(time.time())
        self.prompts = Prompts(copy.deepcopy(loaded.tokenizer))  # another thread decodes with the original
        self.metrics = Metrics(self)
        self._accepted: dict[Job, None] = {}  # in order
        self._seconds = 0.0  # that a request is worked on, as a moving mean
        self._tokenizing = ThreadPoolExecutor(1, "sparing-tokenizer")
        self._encoding = 0  # requests whose texts are there, or wait for it

    def connect(self) -> None:
        """Events go to this loop from now on."""
        loop = asyncio.get_running_loop()

        def post(job: Job, event: Event) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits any more
                loop.call_soon_threadsafe(self._note, job, event)

        self.worker.listen(post)

    def close(self) -> None:
        """Stop working; the model is as it was found."""
        self.worker.stop()
        self._tokenizing.shutdown()

    @property
    def live(self) -> int:
        """Requests that are being worked on."""
        return sum(job.began is not None for job in self._accepted)

    @property
    def waiting(self) -> int:
        """Accepted requests that are not."""
        return len(self._accepted) - self.live

    async def tokenize(self, encode: Callable[..., T], *given: Any) -> T:
        """Run a method of `prompts` without holding up other requests.

        Raises:
            Refusal: too many wait for that already.
        """
        self._check_queue(self._encoding)
        self._encoding += 1
        try:
            return await asyncio.get_running_loop().run_in_executor(self._tokenizing, encode, *given)
        finally:
            self._encoding -= 1

    def check_model(self, name: str) -> None:
        """Refuse another model than the one that is served.

        Raises:
            Refusal: it is another.
        """
        if name != self.name:
            raise Refusal(404, f"the model {name!r} is not served here; {self.name!r} is", "model_not_found", "model")

    # -- letting in ---------------------------------------------------------------------------------------------

    def start_completion(
        self, token_ids: Sequence[int], cache_key: str | None, limit: int | None, default: int, stop: Sequence[str],
        sampling: Sampling,
    ) -> Job:  # fmt: skip
        """Begin an answer.

        Args:
            cache_key: of the document that it goes on from, if any.
            limit: tokens that it may have at most; without, `default`, or as many as the model has room for.

        Raises:
            Refusal: no such document, too long for the model, too large for the memory, or too much at the moment.
        """
        # Looked up last: while the tokenizer ran the document may have given way to another one. And looked up here:
        # a route that waits for the answer would hold on to a document that is deleted meanwhile.
        document = None if cache_key is None else self.documents.get(cache_key)
        known = 0 if document is None else len(document.token_ids)
        max_tokens = limit or max(1, min(default, self.room(known + len(token_ids))))
        self._check_length(len(token_ids), max_tokens, "max_tokens", known)
        if document is None:
            held = self.costs.reading(len(token_ids))
            size = held + self.costs.growing(held, max_tokens)
        else:
            held = document.usage.bytes_kept
            size = held + self.costs.growing(held, len(token_ids) + max_tokens)
        asked = Completion(token_ids, document, max_tokens, stop, sampling)
        job = Job(lambda runner, post: complete(runner, asked, post), document, max_tokens)
        self._let_in(job, size)
        return job

    def start_document(self, key: str, token_ids: list[int]) -> Job:
        """Begin to read a document.

        Raises:
            Refusal: as `start_completion`.
        """
        self._check_length(len(token_ids), 1, "text")
        job = Job(lambda runner, post: compress(runner, key, token_ids, post))
        self._let_in(job, self.costs.reading(len(token_ids)))
        return job

    def start_ranking(self, query: str, documents: Sequence[str], tokens: int) -> Job:
        """Begin to rank documents, in a prompt of so many tokens.

        Raises:
            Refusal: as `start_completion`.
        """
        self._check_length(tokens, 0, "documents")
        job = Job(lambda runner, post: rank(runner, self.ranker, query, documents, post))
        self._let_in(job, self.costs.growing(0, tokens))  # nothing of it is compressed
        return job

    async def answer(self, job: Job, receive: Receive, work: Coroutine[Any, Any, T]) -> T | None:
        """The result of what waits for a job; None, and the job is cancelled, if the client goes away before.

        Raises:
            Refusal: the job failed.
        """
        try:
            return await while_connected(receive, work)
        finally:
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """Nobody waits for it any more; if it has not ended, it does before its next step."""
        job.cancelled = True

    def key_of(self, token_ids: list[int]) -> str:
        """What a document of these tokens is called here."""
        return key_of(f"{self.loaded.fingerprint} {self.method.label} {self.method.keep}", token_ids)

    def room(self, tokens: int) -> int:
        """How many tokens an answer may have after so many of prompt."""
        return 2**31 if self.loaded.max_length is None else self.loaded.max_length - tokens

    def _check_length(self, given: int, new_tokens: int, param: str, known: int = 0) -> None:
        """Refuse nothing, and too much: so many tokens, behind those of a document."""
        if given == 0:
            raise Refusal(400, "there is no token in it", "invalid_value", param)
        tokens = known + given
        if self.room(tokens) < new_tokens:
            message = f"{tokens} tokens and {new_tokens} to be written are more than the {self.loaded.max_length}"
            raise Refusal(400, f"{message} that the model was made for", "context_length_exceeded", param)

    def _check_queue(self, requests: int) -> None:
        if requests >= self.settings.max_concurrent + self.settings.max_queue:
            message = f"{requests} requests are being worked on or wait already"
            raise Refusal(429, message, "queue_full", retry_after=self._retry_after(1))

    def _let_in(self, job: Job, size: int) -> None:
        """Promise a job its bytes and a place."""
        if self.worker.is_ending:
            raise shutting_down()
        if size > self.memory.limit:
            message = f"needs up to {size:,} bytes of cache, more than all {self.memory.limit:,} of this server"
            raise Refusal(413, f"{message}; shorten the prompt, or ask for fewer tokens", "memory_budget_exceeded")
        self._check_queue(len(self._accepted))
        if job.document is not None:
            self.documents.pin(job.document)
        self.documents.make_room(size)
        if not self.memory.reserve(job, size):
            self._unpin(job)
            message = f"needs up to {size:,} bytes of cache, and {max(self.memory.free, 0):,} are free now"
            raise Refusal(429, message, "memory_full", retry_after=self._retry_after(self._ends_until(size)))
        self._accepted[job] = None
        self.worker.submit(job)

    def _ends_until(self, size: int) -> int:
        """How many of the accepted requests, in order, have to end until so many bytes are free, or can be made so."""
        free = self.documents.free
        for ends, job in enumerate(self._accepted, 1):
            free += self.memory.of(job)
            if free >= size:
                return ends
        return max(1, len(self._accepted))

    def _retry_after(self, ends: int) -> int:
        """Seconds in which so many requests end, at the pace of the latest ones."""
        seconds = ends * self._seconds / max(1, min(self.live, self.settings.max_concurrent))
        return min(max(1, math.ceil(seconds)), _LONGEST_WAIT)

    # -- what becomes of them -----------------------------------------------------------------------------------

    def _note(self, job: Job, event: Event) -> None:
        """An event has come from the worker."""
        match event:
            case Begun():
                job.began = time.monotonic()
            case Piece() if not job.has_text:
                job.has_text = True
                self.metrics.first_text(time.monotonic() - job.accepted)
            case Read(usage):
                self._unpin(job)  # its clone is made
                held = usage.bytes_kept
                self.memory.resize(job, held + self.costs.growing(held, job.max_tokens))
                self.metrics.prompt_read(usage)
            case DocumentRead(document):
                self.metrics.prompt_read(document.usage)
                if self.documents.find(document.key) is None:  # else another request was faster
                    self.documents.add(job, document)
            case Done(_, tokens):
                self.metrics.written(tokens)
            case Ended():
                self._unpin(job)
                self.memory.release(job)
                self._accepted.pop(job)
                if job.began is not None and not job.cancelled:
                    seconds = time.monotonic() - job.began
                    self._seconds = seconds if not self._seconds else 0.8 * self._seconds + 0.2 * seconds
        job.events.put_nowait(event)

    def _unpin(self, job: Job) -> None:
        document, job.document = job.document, None
        if document is not None:
            self.documents.unpin(document)
