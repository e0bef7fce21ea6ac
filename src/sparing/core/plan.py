"""Plan: what stays, per layer, sequence and KV head, with its accounting. Printable, saveable, comparable."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from sparing.errors import InputFileError, InvalidInputError, OutputError

_FORMAT = "sparing-plan-1"


@dataclass(frozen=True)
class LayerPlan:
    """What one layer keeps.

    Attributes:
        layer: the index of the layer in the cache.
        seen: (rows,) tokens seen when the plan was made, pads not counted.
        kept: [row][kv_head] → sorted int64 positions in the sequence, pads counted (cache positions).
    """

    layer: int
    seen: tuple[int, ...]
    kept: list[list[Tensor]]

    def share(self, row: int = 0) -> list[float]:
        """Share of the seen tokens that each KV head keeps, of one sequence."""
        return [len(head) / max(self.seen[row], 1) for head in self.kept[row]]


@dataclass(frozen=True)
class Plan:
    """What a whole cache keeps.

    Attributes:
        method: the method that made it, as text.
        layers: one entry per compressed layer, in order.
    """

    method: str
    layers: list[LayerPlan]

    @property
    def tokens_kept(self) -> int:
        """Kept (sequence, layer, KV head, token) entries."""
        return sum(len(head) for layer in self.layers for row in layer.kept for head in row)

    @property
    def tokens_seen(self) -> int:
        """All such entries that were there to keep."""
        return sum(seen * len(row) for layer in self.layers for seen, row in zip(layer.seen, layer.kept, strict=True))

    @property
    def share(self) -> float:
        """Kept over seen, in [0, 1]; 1 when nothing was seen."""
        return self.tokens_kept / self.tokens_seen if self.tokens_seen else 1.0

    def overlap(self, other: Plan) -> list[list[float]]:
        """Jaccard overlap of the kept sets, [layer][kv_head], over the first sequence.

        Raises:
            InvalidInputError: the plans are of different layers or heads.
        """
        if [(p.layer, len(p.kept[0])) for p in self.layers] != [(p.layer, len(p.kept[0])) for p in other.layers]:
            raise InvalidInputError("other", other.method, "a plan of the same layers and KV heads")
        table = []
        for mine, theirs in zip(self.layers, other.layers, strict=True):
            pairs = zip(mine.kept[0], theirs.kept[0], strict=True)
            table.append([_jaccard(set(a.tolist()), set(b.tolist())) for a, b in pairs])
        return table

    def __str__(self) -> str:
        lines = [f"{self.method}: keeps {self.tokens_kept} of {self.tokens_seen} entries ({self.share:.1%})"]
        for layer in self.layers:
            shares = "  ".join(f"{share:6.1%}" for share in layer.share())
            lines.append(f"  layer {layer.layer:>3}  heads {shares}")
        return "\n".join(lines)

    def save(self, path: str | Path) -> None:
        """Write the plan as one safetensors file.

        Raises:
            OutputError: the file cannot be written.
        """
        tensors: dict[str, Tensor] = {}
        for layer in self.layers:
            tensors[f"{layer.layer}.seen"] = torch.tensor(layer.seen)
            for row, heads in enumerate(layer.kept):
                for head, kept in enumerate(heads):
                    tensors[f"{layer.layer}.{row}.{head}"] = kept.cpu().clone()
        try:
            save_file(tensors, str(path), metadata={"format": _FORMAT, "method": self.method})
        except (OSError, SafetensorError) as error:
            raise OutputError(path, f"cannot be written ({error})") from error

    @classmethod
    def load(cls, path: str | Path) -> Plan:
        """Read a plan written by `save`.

        Raises:
            InputFileError: the file is missing or is no plan.
        """
        try:
            with safe_open(str(path), framework="pt") as file:
                metadata = file.metadata() or {}
            tensors = load_file(str(path))
        except (OSError, SafetensorError) as error:
            raise InputFileError(path, f"not a readable plan ({error})") from error
        if metadata.get("format") != _FORMAT:
            raise InputFileError(path, "not a plan", "write one with Plan.save")
        try:
            indices = sorted(int(name.removesuffix(".seen")) for name in tensors if name.endswith(".seen"))
            return cls(metadata["method"], [_layer_from(tensors, index) for index in indices])
        except (KeyError, ValueError) as error:
            raise InputFileError(path, f"a plan with parts missing ({error})", "write one with Plan.save") from error


def _layer_from(tensors: dict[str, Tensor], index: int) -> LayerPlan:
    seen = tuple(tensors[f"{index}.seen"].tolist())
    heads = sum(name.startswith(f"{index}.0.") for name in tensors)
    kept = [[tensors[f"{index}.{row}.{head}"] for head in range(heads)] for row in range(len(seen))]
    return LayerPlan(index, seen, kept)


def _jaccard(a: set[int], b: set[int]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0
