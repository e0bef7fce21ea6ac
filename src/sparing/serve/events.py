"""What the worker's thread tells the event loop about a request."""

from __future__ import annotations

from dataclasses import dataclass

from sparing.reranking import Ranked
from sparing.serve.documents import Document
from sparing.serve.refusals import Refusal
from sparing.serve.text import FinishReason
from sparing.serve.usage import Usage


@dataclass(frozen=True)
class Begun:
    """It is being worked on."""


@dataclass(frozen=True)
class Read:
    """Its prompt has been read and compressed."""

    usage: Usage


@dataclass(frozen=True)
class Piece:
    """Some more of the answer."""

    text: str


@dataclass(frozen=True)
class Done:
    """The answer is complete. `tokens`: how many were generated, the one that ended it included."""

    reason: FinishReason
    tokens: int


@dataclass(frozen=True)
class DocumentRead:
    """A document is held compressed."""

    document: Document


@dataclass(frozen=True)
class Ranking:
    """Documents have been ranked, the best first."""

    ranked: list[Ranked]


@dataclass(frozen=True)
class Ended:
    """Nothing of it is held any more. `failure`: why it ended early; None also for a client that went away."""

    failure: Refusal | None = None


Event = Begun | Read | Piece | Done | DocumentRead | Ranking | Ended
