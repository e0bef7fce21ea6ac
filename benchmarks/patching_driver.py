"""One library patching heads, in a process of its own: started by patching.py, one JSON line in, one out.

The library is the first argument: "sparing", or "transformer_lens" from an environment without sparing.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from common import timed, use_threads, versions
from torch import Tensor

SHORT = 8  # tokens of the runs that load what libraries load late


class Sparing:
    """All heads by the two scorers."""

    packages = ("sparing", "torch", "transformers")

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        from transformers import AutoModelForCausalLM

        self.model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
        self.works = {name: self._scorer(f"{name}_patching") for name in ("activation", "attribution")}

    def _scorer(self, scorer: str) -> Callable[..., Tensor]:
        import sparing
        from sparing.core.samples import PairSample

        def work(clean: Tensor, corrupt: Tensor, answer: int, wrong: int) -> Tensor:
            sample = PairSample(tuple(clean[0].tolist()), tuple(corrupt[0].tolist()), answer, wrong)
            return sparing.score(self.model, scorer, data=[sample]).values

        return work


class TransformerLens:
    """All heads by `patching`; to first order by its caches and one product, and by its `attribution_patch`."""

    packages = ("transformer-lens", "torch", "transformers")

    def __init__(self, folder: str, dtype: torch.dtype) -> None:
        from transformer_lens.model_bridge import TransformerBridge

        self.model = TransformerBridge.boot_transformers(folder, dtype=dtype, device="cpu").eval()
        self.names = [f"blocks.{layer}.attn.hook_z" for layer in range(self.model.cfg.n_layers)]
        self.works = {
            "activation": self.activation, "activation of 2 layers": partial(self.activation, layers=2),
            "attribution": self.attribution, "tool": self.tool,
        }  # fmt: skip

    def activation(self, clean: Tensor, corrupt: Tensor, answer: int, wrong: int, layers: int | None = None) -> Tensor:
        """A cache of the clean run, and a forward per head (of the first layers, if so many are given)."""
        from transformer_lens import patching

        difference = _difference(answer, wrong)
        with torch.no_grad():
            logits, cache = self.model.run_with_cache(clean, names_filter=self.names)
            first = difference(logits)
            del logits  # of all positions: the largest tensor of all
            second = difference(self.model(corrupt))
            metric = lambda logits: (difference(logits) - second) / (first - second)  # noqa: E731
            sites: dict[str, Any] = {}
            if layers is not None:
                heads = patching.make_df_from_ranges((layers, self.model.cfg.n_heads), ("layer", "head"))
                sites = {"index_axis_names": None, "index_df": heads}
            return patching.get_act_patch_attn_head_out_all_pos(self.model, corrupt, cache, metric, **sites)

    def attribution(self, clean: Tensor, corrupt: Tensor, answer: int, wrong: int) -> Tensor:
        """Its own caches of activations and gradients of these hooks only, and the product of whole tensors.

        The embedding is among the hooks because without it no gradient is computed at all.
        """
        from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

        names, difference = ["hook_embed", *self.names], _difference(answer, wrong)
        with torch.no_grad():
            first = cache_activation_and_gradient(self.model, clean, difference, names, compute_gradient=False)
        second = cache_activation_and_gradient(self.model, corrupt, difference, names)
        scores = [
            ((first.activations[name] - second.activations[name]) * second.gradients[name]).sum((0, 1, 3))
            for name in self.names
        ]
        return torch.stack(scores) / (first.metric - second.metric)

    def tool(self, clean: Tensor, corrupt: Tensor, answer: int, wrong: int) -> Tensor:
        """`attribution_patch` as it is: every position of every head, every MLP and the embedding."""
        from transformer_lens.tools.analysis.attribution_patching import attribution_patch

        difference = _difference(answer, wrong)
        scores = torch.zeros(self.model.cfg.n_layers, self.model.cfg.n_heads, dtype=torch.float64)
        for node, effect in attribution_patch(self.model, clean, corrupt, difference).node_scores.items():
            if node.kind == "attn_head_out":
                scores[node.layer, node.head] += effect
        with torch.no_grad():
            return scores / (difference(self.model(clean)) - difference(self.model(corrupt)))


def _difference(answer: int, wrong: int) -> Callable[[Tensor], Tensor]:
    return lambda logits: logits[0, -1, answer] - logits[0, -1, wrong]


def _status(name: str) -> int:
    """A line of this process' status, in bytes: "VmRSS" is the memory it has now, "VmHWM" the most it had."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[name].split()[0]) * 1024


def _settle() -> None:
    """Give free memory back and begin a new peak."""
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")


def main() -> None:
    """Answer requests until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    with contextlib.redirect_stdout(sys.stderr):
        setting = json.loads(sys.stdin.readline())
        os.sched_setaffinity(0, {setting["core"]})
        use_threads(1)
        kind = {"sparing": Sparing, "transformer_lens": TransformerLens}[sys.argv[1]]
        side: Any = kind(setting["folder"], getattr(torch, setting["dtype"]))
        for parameter in side.model.parameters():
            parameter.sum()  # weights are mapped from the file: have them in memory
        pairs = {
            name: (torch.tensor([pair["clean"]]), torch.tensor([pair["corrupt"]]), pair["answer"], pair["wrong"])
            for name, pair in setting["pairs"].items()
        }
        clean, corrupt, *tokens = next(iter(pairs.values()))
        for work in side.works.values():
            work(clean[:, -SHORT:], corrupt[:, -SHORT:], *tokens)
        _settle()
        loaded = _status("VmRSS")
        print(json.dumps({"versions": versions(*side.packages), "loaded": loaded}), file=answers, flush=True)
        for line in sys.stdin:
            request = json.loads(line)
            work = partial(side.works[request["do"]], *pairs[request["pair"]])
            _settle()
            if request.get("peak"):  # as in real life, with garbage collection
                work()
                answer = {"peak": _status("VmHWM") - loaded}
            else:
                found: list[Tensor] = []
                time = timed(lambda: found.append(work()))  # noqa: B023
                answer = {"wall": time.wall, "cpu": time.cpu, "scores": found[0].tolist()}
            print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
