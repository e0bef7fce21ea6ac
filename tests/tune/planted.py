"""A model that isn't one: what each method scores at each size is planted, so that the best choice is known."""

from __future__ import annotations

import hashlib
from collections import Counter

from sparing.compare.cells import Observation
from sparing.compare.worker import Facts
from sparing.errors import MethodRefusedError

FULL_BYTES = 1_000_000
# Method → the share of the cache from which on it loses nothing; below, it loses in proportion.
NEEDS = {"kvzip": 0.2, "snapkv": 0.5, "tova": 0.9, "knorm": 4.0}


def share_of(contestant):
    """What a contestant holds: its budget, or in codes half or a quarter of it and a tenth of that."""
    keep = contestant.keep
    share = float(str(keep).removesuffix("B")) / FULL_BYTES if isinstance(keep, str) else keep
    for bits in (8, 4):
        if f"bits={bits}" in contestant.name:
            share *= bits / 16 * 1.1
    return share


def chance(contestant):
    """Of a right answer."""
    if contestant.is_full:
        return 1.0
    base = contestant.name.split("&")[-1].strip().split("(")[0].split("+")[0]
    return min(1.0, contestant.keep / NEEDS[base]) if isinstance(contestant.keep, float) else 1.0


class PlantedObserver:
    """In the place of an `Observer`; `reads` counts how often which context was read by whom."""

    full_score = 1.0
    made = None

    def __init__(self, spec, cells, seed, folder, cluster=None):
        self.spec, self.cells, self.seed = spec, list(cells), seed
        made_with = {"sparing": "0", "hardware": {"cpu": "none", "gpu": None}}
        self.facts = Facts("planted", "a planted model", 16, [], [], made_with)
        self.reads = Counter()
        PlantedObserver.made = self

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None

    def introduce(self, contestants):
        return {c: MethodRefusedError(c.name, "is refused here") for c in contestants if c.name.startswith("tova")}

    def parameters(self, contestant):
        return repr(contestant)

    def observe(self, wanted):
        for cell, index, contestants in wanted:
            for contestant in contestants:
                self.reads[contestant, cell, index] += 1

    def get(self, contestant, cell, index):
        assert (contestant, cell, index) in self.reads, "never read"
        right = self._draw(cell, index) < chance(contestant)
        score = (1.0 if right else 0.0) * self.full_score
        held = FULL_BYTES if contestant.is_full else int(share_of(contestant) * FULL_BYTES)
        slow = 0.01 + 0.02 * held / FULL_BYTES
        return Observation([score], [FULL_BYTES], [held], [0.5], slow * 10, 10, 0, [])

    @staticmethod
    def _draw(cell, index):
        """The same for everybody: a hard context is hard for all."""
        return int(hashlib.sha256(f"{cell}/{index}".encode()).hexdigest()[:8], 16) / 16**8
