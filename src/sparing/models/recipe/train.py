"""Training: a curriculum of stages, AdamW and Muon, checkpoints from which a run goes on as if never stopped."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

from sparing.models.recipe.data import batch
from sparing.models.recipe.network import Network, Shape, rotations
from sparing.models.recipe.samples import Source

MAX_POSITION = 8192
ADAM_RATE, MUON_RATE = 3e-3, 0.02
SEED = 0


@dataclass(frozen=True)
class Stage:
    """A stretch of training on samples of one length (tokens), with learning rates times `rate`.

    The rate goes linearly from that of the stage's begin to `end_rate` at its end.
    """

    length: int
    tokens: int
    mix: dict[str, float]
    rate: float = 1.0
    end_rate: float = 1.0
    batch_tokens: int = 8192
    shifted: float = 0.5


INDUCTION = {"copy": 0.35, "pairs": 0.45, "text": 0.2}
MIXED = {"needle": 0.35, "json": 0.12, "recall": 0.12, "pairs": 0.1, "copy": 0.06, "text": 0.25}
FULL = {"needle": 0.35, "json": 0.15, "recall": 0.1, "quote": 0.1, "many": 0.08, "copy": 0.02, "text": 0.2}
LONG = {"needle": 0.4, "json": 0.22, "recall": 0.12, "quote": 0.1, "many": 0.06, "text": 0.1}
KEYED = {"needle": 0.32, "json": 0.36, "recall": 0.14, "quote": 0.08, "many": 0.04, "text": 0.06}

CURRICULUM: tuple[Stage, ...] = (
    Stage(64, 4_000_000, INDUCTION, shifted=0.0),
    Stage(128, 3_300_000, MIXED),
    Stage(256, 3_000_000, MIXED),
    Stage(512, 2_300_000, FULL),
    Stage(1024, 2_100_000, LONG, 1.0, 0.67),
    Stage(1024, 3_400_000, KEYED, 0.67, 0.25),
    Stage(2048, 2_200_000, KEYED, 0.25, 0.0),
)


def draw_positions(rng: random.Random, length: int, shifted: float) -> torch.Tensor:
    """Return positions (length,) that rise, at random with up to three jumps, within `MAX_POSITION`.

    So short samples show the distances of long ones (PoSE: Zhu et al. 2023, arXiv:2309.10400).
    """
    positions = np.arange(length)
    if rng.random() < shifted:
        cuts = [0, *sorted(rng.sample(range(1, length), rng.randint(1, 3)))]
        room = MAX_POSITION - length
        for cut, offset in zip(cuts, sorted(rng.randint(0, room) for _ in cuts), strict=True):
            positions[cut:] = np.arange(cut, length) + offset
    return torch.from_numpy(positions)


class Trainer:
    """Holds everything that changes during training; `save` and `load` keep all of it."""

    def __init__(self, source: Source, shape: Shape, seed: int, compiled: bool = False) -> None:
        torch.manual_seed(seed)
        self.source, self.shape = source, shape
        self.network = Network(shape)
        self.rng = random.Random(seed)
        self.stage, self.done, self.total = 0, 0, 0
        self.optimizers = _optimizers(self.network)
        if compiled:
            self.network.model.compile(dynamic=False)

    def step(self, stage: Stage) -> float:
        """Train on one batch and return its loss."""
        rate = stage.rate + (stage.end_rate - stage.rate) * self.done / stage.tokens
        rate *= min(1.0, (self.total + stage.batch_tokens) / (100 * stage.batch_tokens))
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = group["full_rate"] * rate
        size = max(1, stage.batch_tokens // stage.length)
        ids, weights = batch(self.source, self.rng, size, stage.length, stage.mix)
        turns = rotations(draw_positions(self.rng, stage.length, stage.shifted), self.shape)
        loss = self.network.loss(torch.from_numpy(ids), torch.from_numpy(weights / weights.sum()), *turns)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.network.zero_grad(set_to_none=True)
        self.done += size * stage.length
        self.total += size * stage.length
        return loss.item()

    def run(self, stages: Sequence[Stage], folder: Path, every: float = 120.0) -> None:
        """Train the stages that are not done yet; log and save to folder every so many seconds."""
        folder.mkdir(parents=True, exist_ok=True)
        losses: list[float] = []
        clock = start = time.monotonic()
        while self.stage < len(stages):
            stage = stages[self.stage]
            losses.append(self.step(stage))
            if self.done >= stage.tokens:
                self.stage, self.done = self.stage + 1, 0
            if time.monotonic() - clock > every or self.done == 0:
                self._log(folder, stage, float(np.mean(losses)), time.monotonic() - start)
                self.save(folder / "checkpoint.pt")
                clock = time.monotonic()
                losses = []

    def _log(self, folder: Path, stage: Stage, loss: float, seconds: float) -> None:
        row = {"stage": self.stage, "length": stage.length, "tokens": self.total, "loss": round(loss, 4)}
        row |= {"seconds": round(seconds)}
        print(json.dumps(row), flush=True)
        with (folder / "training.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def save(self, path: Path) -> None:
        """Write weights, optimizer states, counters and the state of the random generator."""
        state = {
            "network": self.network.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "counters": (self.stage, self.done, self.total),
            "rng": self.rng.getstate(),
            "shape": asdict(self.shape),
        }
        torch.save(state, path.with_suffix(".part"))
        path.with_suffix(".part").replace(path)

    def load(self, path: Path) -> None:
        """Go back to what `save` wrote."""
        state = torch.load(path, weights_only=False)
        self.network.load_state_dict(state["network"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.stage, self.done, self.total = state["counters"]
        self.rng.setstate(state["rng"])


def _optimizers(network: Network) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for embeddings and norms."""
    matrices = [p for name, p in network.named_parameters() if p.dim() == 2 and "embed" not in name]
    others = [p for name, p in network.named_parameters() if p.dim() != 2 or "embed" in name]
    adam = torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    muon = torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.02, momentum=0.95)
    for optimizer, rate in ((adam, ADAM_RATE), (muon, MUON_RATE)):
        for group in optimizer.param_groups:
            group["full_rate"] = rate
    return [adam, muon]
