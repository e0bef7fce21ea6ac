"""Documents that were read and compressed once, to be asked many times."""

from __future__ import annotations

import hashlib
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from sparing.adapters.cache import EvictingCache
from sparing.serve.memory import MemoryBudget
from sparing.serve.refusals import Refusal
from sparing.serve.usage import Usage


@dataclass(eq=False)
class Document:
    """One compressed document.

    Attributes:
        key: what clients call it by. token_ids: all of its tokens. cache: never fed; answers go on from clones.
        shares: per token, the share of all (compressed layer, KV head) pairs that keep it.
        users: accepted requests that have not made their clone yet; until then it stays.
    """

    key: str
    token_ids: Sequence[int]
    cache: EvictingCache
    usage: Usage
    shares: Sequence[float]
    created: int = field(default_factory=lambda: int(time.time()))
    users: int = 0


class Documents:
    """Compressed documents by key, the one that was used last at the end.

    Args:
        memory: what they are held in, together with the requests.
    """

    def __init__(self, memory: MemoryBudget) -> None:
        self._memory = memory
        self._known: OrderedDict[str, Document] = OrderedDict()
        self._deleted: set[Document] = set()  # still needed by requests that were accepted before

    def __len__(self) -> int:
        return len(self._known)

    @property
    def held(self) -> int:
        """Bytes of all documents."""
        return sum(self._memory.of(document) for document in (*self._known.values(), *self._deleted))

    @property
    def free(self) -> int:
        """Bytes that are free, or would be if all documents that nobody waits for gave way."""
        return self._memory.free + sum(map(self._memory.of, self._unused))

    def all(self) -> list[Document]:
        """Every document, the one that was used last at the end."""
        return list(self._known.values())

    def find(self, key: str) -> Document | None:
        """The document, which counts as used; None if there is none (any more)."""
        if key in self._known:
            self._known.move_to_end(key)
        return self._known.get(key)

    def get(self, key: str) -> Document:
        """As `find`.

        Raises:
            Refusal: unknown key.
        """
        document = self.find(key)
        if document is None:
            message = f"no document has the key {key!r}: it was never read, deleted, or gave way to others"
            raise Refusal(404, f"{message}; send its text to /v1/documents again", "document_not_found", "cache_key")
        return document

    def add(self, owner: object, document: Document) -> None:
        """Keep a document that a request has read; its bytes were promised to that request."""
        self._memory.hand_over(owner, document, document.usage.bytes_kept)
        self._known[document.key] = document

    def delete(self, document: Document) -> None:
        """Forget a document; its bytes go once nobody waits for them."""
        del self._known[document.key]
        self._deleted.add(document)
        self._drop_unused()

    def pin(self, document: Document) -> None:
        """A request was accepted that will make a clone."""
        document.users += 1

    def unpin(self, document: Document) -> None:
        """It has made it, or will not any more."""
        document.users -= 1
        self._drop_unused()

    def make_room(self, size: int) -> None:
        """Forget documents that nobody waits for, least recently used first, until so many bytes are free.

        Nothing is forgotten if that would not be enough.
        """
        if self.free < size:
            return
        for document in self._unused:
            if self._memory.free >= size:
                return
            self.delete(document)

    @property
    def _unused(self) -> list[Document]:
        return [document for document in self._known.values() if not document.users]

    def _drop_unused(self) -> None:
        for document in [each for each in self._deleted if not each.users]:
            self._deleted.remove(document)
            self._memory.release(document)


def key_of(identity: str, token_ids: Sequence[int]) -> str:
    """What a document is called: a hash of its tokens, the model and the method."""
    text = f"{identity} {' '.join(map(str, token_ids))}"
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def kept_shares(cache: EvictingCache, tokens: int) -> list[float]:
    """Per token of a prompt, the share of all (compressed layer, KV head) pairs that keep it."""
    read = tokens if cache.shortening is None else cache.shortening.length
    shares = torch.ones(read)
    if cache.plan is not None:
        heads = [head for layer in cache.plan.layers for head in layer.kept[0]]
        shares = torch.bincount(torch.cat(heads), minlength=read) / len(heads)
    if cache.shortening is not None:
        shares = torch.zeros(tokens).index_copy_(0, cache.shortening.columns[0].cpu(), shares)
    return shares.tolist()
