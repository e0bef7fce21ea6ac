"""One context and its first question, to look at: what each method kept of it and answered."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparing.adapters.cache import EvictingCache
from sparing.compare.cells import Cell, Contestant
from sparing.compare.store import read_json, write_json_atomic
from sparing.loading import LoadedModel
from sparing.tasks import Sample

# Enough for any example that a person would look at; larger ones are left out of the report.
MAX_EXAMPLE_ENTRIES = 400_000


@dataclass
class Example:
    """A context as tokens, and per method what it kept at its least budget. `facts`: as the report wants them."""

    facts: dict[str, Any]
    methods: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def of(cls, cell: Cell, sample: Sample, loaded: LoadedModel) -> Example:
        """An example without methods yet."""
        question = sample.questions[0]
        return cls(
            {
                "model": loaded.fingerprint,
                "sample": sample.name,
                "task": cell.task.label,
                "mode": cell.mode,
                "length": cell.length or sample.length,
                "question": question.text,
                "answer": ", ".join(question.answers),
                "tokens": [loaded.tokenizer.decode([token]) for token in sample.context_ids],
            }
        )

    def add(self, contestant: Contestant, cache: EvictingCache, output: str, layers: int) -> None:
        """Remember what a method kept and answered, unless it did so at a smaller budget already."""
        plan = cache.plan
        if plan is None or plan.tokens_kept > MAX_EXAMPLE_ENTRIES:
            return
        kept: list[Any] = [None] * layers
        short = cache.shortening
        for layer in plan.layers:
            kept[layer.layer] = [(short.in_whole(head) if short else head).tolist() for head in layer.kept[0]]
        self._add(contestant.name, {"keep": contestant.keep, "share": plan.share, "output": output, "kept": kept})

    def _add(self, name: str, entry: dict[str, Any]) -> None:
        if name not in self.methods or entry["share"] < self.methods[name]["share"]:
            self.methods[name] = entry

    def save(self, path: Path) -> None:
        """Write it, together with what the file says of other methods on the same context.

        Raises:
            InputFileError: the file is damaged. OutputError: it can't be written.
        """
        known = read_json(path) or {}
        if known == self.facts | {"methods": known.get("methods")}:
            for name, entry in known["methods"].items():
                self._add(name, entry)
        write_json_atomic(path, self.facts | {"methods": self.methods})
