"""The one thread that owns the model: requests take turns, a chunk of a prompt or a token at a time."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from queue import Empty, SimpleQueue

import torch

from sparing.core.method import Method
from sparing.errors import SparingError
from sparing.loading import LoadedModel
from sparing.serve.documents import Document
from sparing.serve.events import Begun, Ended, Event
from sparing.serve.memory import Costs
from sparing.serve.refusals import Refusal, internal, shutting_down
from sparing.serve.runner import Runner, Steps
from sparing.session import use

log = logging.getLogger("sparing.serve")


class Job:
    """A request that was accepted.

    Attributes:
        steps: what it does, as a generator.
        document, max_tokens: what it goes on from, and how many tokens it may write (for the accounting).
        events: what has become of it, for the route that waits.
        cancelled: set by the event loop when nobody waits for it any more.
        accepted, began: when it was accepted and first worked on (the monotonic clock). has_text: whether it has
            written anything.
    """

    def __init__(self, steps: Steps, document: Document | None = None, max_tokens: int = 0) -> None:
        self.steps, self.document, self.max_tokens = steps, document, max_tokens
        self.events: asyncio.Queue[Event] = asyncio.Queue()
        self.cancelled = False
        self.accepted, self.has_text = time.monotonic(), False
        self.began: float | None = None
        self._running: Iterator[None] | None = None

    def advance(self, runner: Runner, post: Callable[[Event], None]) -> bool:
        """Take one step; False if it was the last."""
        if self._running is None:
            post(Begun())
            self._running = self.steps(runner, post)
        return next(self._running, self._running) is None

    def close(self) -> None:
        """Let go of everything that its steps hold."""
        self._running = None
        self.steps = lambda runner, post: iter(())


class Worker:
    """Runs jobs on a model in a thread of its own.

    Args:
        slots: jobs that take turns; more wait.

    Attributes:
        is_ending: True once it takes no more jobs.
    """

    def __init__(self, loaded: LoadedModel, method: Method, slots: int) -> None:
        self._loaded, self._method, self._slots = loaded, method, slots
        self.is_ending = False
        self._inbox: SimpleQueue[Job | None] = SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._live: list[Job] = []
        self._ready: Future[Costs] = Future()
        self._post: Callable[[Job, Event], None] = lambda job, event: None
        self._thread = threading.Thread(target=self._run, name="sparing-model", daemon=True)

    def start(self) -> Costs:
        """Put the method on the model; returns what prompts cost.

        Raises:
            SparingError: the method cannot work on this model.
        """
        self._thread.start()
        return self._ready.result()

    def listen(self, post: Callable[[Job, Event], None]) -> None:
        """Who is told of events, in this thread."""
        self._post = post

    def submit(self, job: Job) -> None:
        """Take one more job; never blocks."""
        self._inbox.put(job)

    def end(self) -> None:
        """End all jobs after the step that is running, and take the method off the model; does not wait for it."""
        self.is_ending = True
        self._inbox.put(None)

    def stop(self) -> None:
        """As `end`, and wait."""
        self.end()
        self._thread.join()

    def _run(self) -> None:
        try:
            with use(self._loaded.model, self._method) as session, torch.inference_mode():
                runner = Runner(self._loaded, session)
                self._ready.set_result(runner.measure())
                while self._receive():
                    self._round(runner)
                for job in (*self._live, *self._waiting):
                    self._end(job, shutting_down())
        except Exception as error:
            if self._ready.done():
                raise
            self._ready.set_exception(error)

    def _receive(self) -> bool:
        """Take in new jobs, waiting for one if there is nothing to do; False if it is time to stop."""
        try:
            while True:
                job = self._inbox.get(block=not (self._live or self._waiting))
                if job is None:
                    return False
                self._waiting.append(job)
        except Empty:
            return True

    def _round(self, runner: Runner) -> None:
        """One step of every live job."""
        for job in [job for job in self._waiting if job.cancelled]:
            self._waiting.remove(job)
            self._end(job)
        while self._waiting and len(self._live) < self._slots:
            self._live.append(self._waiting.popleft())
        still_live = []
        for job in self._live:
            if self._step(job, runner):
                still_live.append(job)
        self._live = still_live

    def _step(self, job: Job, runner: Runner) -> bool:
        failure = None
        try:
            if not job.cancelled and job.advance(runner, lambda event: self._post(job, event)):
                return True
        except SparingError as error:
            failure = Refusal(400, str(error), "refused_by_sparing")
        except Exception:
            # The traceback would hold on to the cache, so it ends here.
            log.exception("a request failed")
            failure = internal()
        self._end(job, failure)
        return False

    def _end(self, job: Job, failure: Refusal | None = None) -> None:
        job.close()
        self._post(job, Ended(failure))
