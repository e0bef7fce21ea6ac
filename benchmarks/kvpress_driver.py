"""kvpress at work, in an environment of its own: started by compare_kvpress.py, one JSON line in, one out.

Uses kvpress' public API as its documentation does: `with press(model): model(prompt, past_key_values=cache)`, then
decoding with explicit positions. Imports nothing of sparing.
"""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
from common import Time, bytes_held, decode, random_prompt, timed, use_threads, versions
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache

PRESSES = {
    "snapkv": lambda dropped: kvpress.SnapKVPress(dropped, window_size=32),
    "knorm": lambda dropped: kvpress.KnormPress(dropped),
    "expected_attention": lambda dropped: kvpress.ExpectedAttentionPress(dropped),
    "adakv": lambda dropped: kvpress.AdaKVPress(kvpress.SnapKVPress(dropped, window_size=32)),
}


@dataclass
class Contestant:
    """A model with its cache. kvpress keeps state on the modules, so everyone has modules of its own."""

    model: Any
    press: Any
    cache: Any = None
    position: int = 0
    token: Any = None
    prefills: list[Time] = field(default_factory=list)

    def prefill(self, cache: Any, prompt: torch.Tensor) -> Time:
        """Read the prompt into a new cache, under the press if there is one."""
        self.cache, self.position, self.token = cache, prompt.shape[1], torch.zeros(1, 1, dtype=torch.int64)

        def work() -> None:
            if self.press is None:
                self.model(prompt, past_key_values=cache, logits_to_keep=1)
                return
            with self.press(self.model):
                self.model(prompt, past_key_values=cache, logits_to_keep=1)

        with torch.no_grad():
            return timed(work)

    def decode(self, steps: int) -> Time:
        """Decode some tokens."""

        def work() -> None:
            self.token = decode(self.model, self.cache, self.position, steps, self.token)

        time = timed(work)
        self.position += steps
        return time


def twin(model: Any) -> Any:
    """The same model in modules of its own, on the same weights."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def main() -> None:
    """Answer requests until the input ends."""
    setting = json.loads(sys.stdin.readline())
    use_threads(setting["threads"])
    base = AutoModelForCausalLM.from_pretrained(setting["model"], attn_implementation="sdpa").eval()
    prompt = random_prompt(setting["tokens"], setting["seed"])
    found = {name: Contestant(twin(base), None) for name in ("dynamic", "static")}
    for method, keep in setting["methods"]:
        found[f"{method} {keep:g}"] = Contestant(twin(base), PRESSES[method](1 - keep))
    print(json.dumps({"versions": versions("kvpress", "torch", "transformers"), "names": list(found)}), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        each = found[request["name"]]
        if request["do"] == "prefill":
            static = StaticCache(config=base.config, max_cache_len=setting["tokens"] + setting["room"])
            cache = static if request["name"] == "static" else DynamicCache()
            time = each.prefill(cache, prompt)
        else:
            time = each.decode(request["steps"])
        print(json.dumps({"wall": time.wall, "cpu": time.cpu, "bytes": bytes_held(each.cache)}), flush=True)


if __name__ == "__main__":
    main()
