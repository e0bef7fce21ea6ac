"""What the tests of tasks share and a fresh process can import in no time."""

from __future__ import annotations

import hashlib
import re

from sparing import tasks

# Every task, and some with other options.
VARIANTS = (
    *tasks.names(),
    "needle_single:haystack=noise",
    "needle_multikey:haystack=needles:keys=3",
    "needle_multivalue:values_are=word",
    "variable_tracking:haystack=text:chains=1",
    "kv_retrieval:values_are=word",
)


class Letters:
    """A tokenizer that needs nothing but Python: a token a byte, 256 in front."""

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the bytes of text."""
        return [256] * add_special_tokens + list(text.encode())

    def decode(self, token_ids: list[int]) -> str:
        """Return the text of bytes."""
        return bytes(token for token in token_ids if token < 256).decode()


def fingerprint() -> str:
    """Return a digest of one sample of every variant."""
    digest = hashlib.sha256()
    for name in VARIANTS:
        digest.update(repr(tasks.get(name).sample(Letters(), 2048, 7, 3)).encode())
    return digest.hexdigest()


def needles_in(text: str) -> list[tuple[str, str]]:
    """Read every needle: (key, value) in the order of the text."""
    return re.findall(r"The special magic \w+ for ([a-z]+ [a-z]+) is: ([a-z0-9 ]+)\.", text)
