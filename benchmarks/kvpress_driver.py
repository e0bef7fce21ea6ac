"""kvpress at work, in an environment of its own: started by compare_kvpress.py, one JSON line in, one out.

Uses kvpress' public API as its documentation does: `with press(model): model(prompt, past_key_values=cache)`, then
decoding with explicit positions. Imports nothing of sparing.
"""

from __future__ import annotations

import copy
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import kvpress
import torch
from common import Time, bytes_held, decode, random_prompt, timed, use_threads, versions
from kvpress.utils import get_prerope_key_states, get_prerope_query_states
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, DynamicCache, PreTrainedTokenizerFast, StaticCache
from transformers.models.llama.modeling_llama import rotate_half

# Of sparing's snapkv, adaptive allocator, criticalkv and duo.
WINDOW, FLOOR, FIRST_STAGE, DUO_SINKS, DUO_RECENT = 32, 0.2, 0.5, 16, 64


def beside_window(share: float, dropped: float, tokens: int) -> float:
    """The share of all kept tokens that is the window and `share` of the others."""
    kept = (1 - dropped) * tokens
    return min((WINDOW + share * (kept - WINDOW)) / kept, 1.0)


def random_gates(config: Any) -> torch.Tensor:
    """(layers, KV heads) numbers in [0, 1) that stand for learned gates."""
    generator = torch.Generator().manual_seed(0)
    return torch.rand(config.num_hidden_layers, config.num_key_value_heads, generator=generator)


class GivenGates(kvpress.DuoAttentionPress):
    """`random_gates` instead of a downloaded file; as many full heads and as long windows as sparing has room for."""

    def __init__(self, dropped: float, tokens: int) -> None:
        super().__init__()
        self.kept, self.tokens = 1 - dropped, tokens

    def post_init_from_model(self, model: Any) -> None:
        """See kvpress."""
        gates = random_gates(model.config)
        heads, budget = gates.numel(), self.kept * self.tokens * gates.numel()
        full = int((budget - heads * (DUO_SINKS + DUO_RECENT)) // (self.tokens - DUO_SINKS - DUO_RECENT))
        self.sink_size = DUO_SINKS
        self.recent_size = int((budget - full * self.tokens) // (heads - full)) - DUO_SINKS
        self.streaming_mask = torch.ones_like(gates, dtype=torch.bool)
        self.streaming_mask.view(-1)[gates.flatten().argsort(descending=True)[:full]] = False
        self.head_compression_ratio = 1 - full / heads


# Constructor arguments as close to sparing's methods as they go; `dropped` is a share of the `tokens` of the prompt.
PRESSES: dict[str, Callable[[float, int], Any]] = {
    "snapkv": lambda dropped, _: kvpress.SnapKVPress(dropped, window_size=WINDOW),
    "knorm": lambda dropped, _: kvpress.KnormPress(dropped),
    "expected_attention": lambda dropped, _: kvpress.ExpectedAttentionPress(dropped),
    "adakv": lambda dropped, tokens: kvpress.AdaKVPress(
        kvpress.SnapKVPress(dropped, window_size=WINDOW), beside_window(FLOOR, dropped, tokens)
    ),
    "streaming_llm": lambda dropped, _: kvpress.StreamingLLMPress(dropped),
    "pyramidkv": lambda dropped, _: kvpress.PyramidKVPress(dropped, window_size=WINDOW, beta=10),
    "tova": lambda dropped, _: kvpress.TOVAPress(dropped),
    "h2o": lambda dropped, _: kvpress.ObservedAttentionPress(dropped),
    "keydiff": lambda dropped, _: kvpress.KeyDiffPress(dropped),
    "leverage": lambda dropped, _: kvpress.LeverageScorePress(dropped),
    "compactor": lambda dropped, _: kvpress.CompactorPress(dropped),
    "chunkkv": lambda dropped, _: kvpress.ChunkKVPress(
        kvpress.SnapKVPress(dropped, window_size=WINDOW, kernel_size=1), chunk_length=10
    ),
    "criticalkv": lambda dropped, tokens: kvpress.CriticalKVPress(
        kvpress.SnapKVPress(dropped, window_size=WINDOW), first_stage_ratio=beside_window(FIRST_STAGE, dropped, tokens)
    ),
    "random": lambda dropped, _: kvpress.RandomPress(dropped),
    "kvzip": lambda dropped, _: kvpress.KVzipPress(dropped),
    "duo": GivenGates,
    "think": lambda dropped, _: kvpress.ComposedPress(
        [kvpress.SnapKVPress(dropped, window_size=WINDOW), kvpress.ThinKPress(0.375, window_size=WINDOW)]
    ),
}
NEEDS_MAPS = {"h2o"}  # these presses read the attention maps, which only eager attention makes


# -- presses with a known difference taken out ----------------------------------------------------------------------


class BorderedSnapKV(kvpress.SnapKVPress):
    """Pooling divides by the neighbours that exist, not by the whole kernel."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        """See kvpress."""
        places = kwargs["position_embeddings"]
        rows = self.compute_window_attention(module, hidden_states, keys, self.window_size, places)
        half = self.kernel_size // 2
        votes = F.avg_pool1d(rows.mean(-2), self.kernel_size, 1, half, count_include_pad=False)
        votes = votes.unflatten(1, (keys.shape[1], -1)).mean(2)
        return F.pad(votes, (0, self.window_size), value=votes.max().item() + 1)


class BorderedPyramidKV(BorderedSnapKV, kvpress.PyramidKVPress):
    """PyramidKV with that pooling."""


class SummedAttention(kvpress.ObservedAttentionPress):
    """Sums over the rows instead of means over the rows that see a token."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        """See kvpress."""
        return attentions.sum(2).unflatten(1, (keys.shape[1], -1)).mean(2)


class Given(kvpress.ScorerPress):
    """Scores from elsewhere."""

    scores: Any = None

    def score(self, *args: Any, **kwargs: Any) -> Any:
        """See kvpress."""
        return self.scores


class ChunksPerHead(kvpress.ChunkKVPress):
    """Every KV head chooses its own chunks."""

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        """See kvpress."""
        scores = self.press.score(module, hidden_states, keys, values, attentions, kwargs)
        parts = []
        for head in range(keys.shape[1]):
            given, one = Given(self.compression_ratio), slice(head, head + 1)
            given.scores = scores[:, one]
            press = kvpress.ChunkKVPress(given, self.chunk_length)
            parts.append(press.compress(module, hidden_states, keys[:, one], values[:, one], None, kwargs))
        return tuple(torch.cat(heads, dim=1) for heads in zip(*parts, strict=True))


class SparingCompactor(kvpress.CompactorPress):
    """Logits divided by sqrt(d), chunks from the first token on, z per head, pooling over what exists."""

    def score(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        """See kvpress."""
        heads, (cos, sin) = keys.shape[1], kwargs["position_embeddings"]
        queries = get_prerope_query_states(module, hidden_states)
        queries = (queries * cos.unsqueeze(1) + rotate_half(queries) * sin.unsqueeze(1)) / module.head_dim**0.5
        repeated = keys.repeat_interleave(queries.shape[1] // heads, dim=1)
        seen = kvpress.NonCausalAttnPress.non_causal_chunked_attn(queries, repeated, self.chunk_size)
        mass = seen.unflatten(1, (heads, -1)).mean(2) * values.norm(dim=-1)
        mass = F.avg_pool1d(mass, 3, 1, 1, count_include_pad=False)
        rare = self._leverage_press.compute_leverage_scores(
            get_prerope_key_states(module, hidden_states), self.sketch_dimension
        )
        ends = slice(self.sink_size_start, -self.sink_size_end)
        z = [(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) for x in (rare[..., ends], mass[..., ends])]
        scores = self.compression_ratio * z[0] + z[1]
        return F.pad(scores, (self.sink_size_start, self.sink_size_end), value=scores.max().item() + 1)


class SummedNorms(kvpress.ThinKPress):
    """Channels by the sum over the group of |Q| |K|, not of their squares."""

    def compress(self, module: Any, hidden_states: Any, keys: Any, values: Any, attentions: Any, kwargs: Any) -> Any:
        """See kvpress."""
        queries = self.compute_window_queries(module, kwargs["hidden_states"], kwargs["position_embeddings"])
        worth = queries.norm(dim=2).unflatten(1, (keys.shape[1], -1)).sum(2) * keys.norm(dim=2)
        pruned = worth.topk(int(keys.shape[-1] * self.key_channel_compression_ratio), largest=False).indices
        return keys.scatter(-1, pruned.unsqueeze(2).expand(-1, -1, keys.shape[2], -1), 0), values


# Wider than a head: the sketch loses nothing, so that the leverage is the exact one up to the jitter.
NO_SKETCH = 512
ALIGNED: dict[str, Callable[[float, int], Any]] = {
    "snapkv": lambda dropped, _: BorderedSnapKV(dropped, window_size=WINDOW),
    "adakv": lambda dropped, tokens: kvpress.AdaKVPress(
        BorderedSnapKV(dropped, window_size=WINDOW), beside_window(FLOOR, dropped, tokens)
    ),
    "pyramidkv": lambda dropped, _: BorderedPyramidKV(dropped, window_size=WINDOW, beta=10),
    "h2o": lambda dropped, _: SummedAttention(dropped),
    "leverage": lambda dropped, _: kvpress.LeverageScorePress(dropped, sketch_dimension=NO_SKETCH),
    "compactor": lambda dropped, _: SparingCompactor(dropped, sketch_dimension=NO_SKETCH),
    "chunkkv": lambda dropped, _: ChunksPerHead(
        kvpress.SnapKVPress(dropped, window_size=WINDOW, kernel_size=1), chunk_length=8
    ),
    "criticalkv": lambda dropped, tokens: kvpress.CriticalKVPress(
        BorderedSnapKV(dropped, window_size=WINDOW), first_stage_ratio=beside_window(FIRST_STAGE, dropped, tokens)
    ),
    "think": lambda dropped, _: kvpress.ComposedPress(
        [BorderedSnapKV(dropped, window_size=WINDOW), SummedNorms(0.375, window_size=WINDOW)]
    ),
}


# -- work -----------------------------------------------------------------------------------------------------------


@dataclass
class Contestant:
    """A model with its cache. kvpress keeps state on the modules, so everyone has modules of its own."""

    model: Any
    press: Any
    needs_maps: bool = False
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

        with torch.no_grad(), self._maps():
            return timed(work)

    @contextmanager
    def _maps(self) -> Iterator[None]:
        """Eager attention for the presses that need it, while the prompt is read; decoding is by sdpa for all."""
        if self.needs_maps:
            self.model.set_attn_implementation("eager")
        yield
        self.model.set_attn_implementation("sdpa")

    def kept(self, prompt: torch.Tensor, seed: int) -> dict[str, Any]:
        """[layer][KV head] → positions, and key channels, that are left of a dense cache."""
        press, self.press = self.press, None
        self.prefill(DynamicCache(), prompt)
        dense, self.press = self.cache, press
        torch.manual_seed(seed)
        self.prefill(DynamicCache(), prompt)
        tokens, channels = [], []
        for layer, held, full in zip(self.model.model.layers, self.cache.layers, dense.layers, strict=True):
            masked = getattr(layer.self_attn, "masked_key_indices", None)
            found = [found_in(*heads) for heads in zip(held.keys[0], full.keys[0], strict=True)]
            if masked is not None:
                gone = [set(masked[2][masked[1] == head].tolist()) for head in range(len(found))]
                found = [(sorted(set(all_) - out), cols) for (all_, cols), out in zip(found, gone, strict=True)]
            tokens.append([positions for positions, _ in found])
            channels.append([columns for _, columns in found])
        return {"tokens": tokens, "channels": channels}

    def decode(self, steps: int) -> Time:
        """Decode some tokens."""

        def work() -> None:
            self.token = decode(self.model, self.cache, self.position, steps, self.token)

        time = timed(work)
        self.position += steps
        return time


def found_in(held: torch.Tensor, full: torch.Tensor) -> tuple[list[int], list[int]]:
    """Which rows of `full` (N, D) the rows of `held` are, by exact equality in the columns that are not all 0."""
    columns = (held != 0).any(0).nonzero()[:, 0]
    left = {tuple(row): position for position, row in enumerate(full[:, columns].tolist())}
    assert len(left) == len(full), "two tokens have the same key"
    return sorted(left[tuple(row)] for row in held[:, columns].tolist()), columns.tolist()


def give_tokenizer(folder: str) -> list[int]:
    """Put a tokenizer of bytes beside the model, which KVzipPress looks for; the ids that it puts before a replay."""
    letters = sorted(ByteLevel.alphabet())
    bytes_only = Tokenizer(BPE(vocab={letter: number for number, letter in enumerate(letters)}, merges=[]))
    bytes_only.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_only)
    tokenizer.save_pretrained(folder)
    # As in KVzipPress.prepare: the request, then what ends a turn where there is no chat template.
    return [*tokenizer.encode("\n\nRepeat the previous context exactly."), *tokenizer.encode("\n")]


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
        for suffix, presses in (("", PRESSES), (" aligned", ALIGNED)):
            if method in presses:
                press = presses[method](1 - keep, setting["tokens"])
                found[f"{method} {keep:g}{suffix}"] = Contestant(twin(base), press, method in NEEDS_MAPS)
    greeting = {
        "versions": versions("kvpress", "torch", "transformers"), "names": list(found),
        "instruction": give_tokenizer(setting["model"]), "gates": random_gates(base.config).tolist(),
    }  # fmt: skip
    print(json.dumps(greeting), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        print(json.dumps(answered(request, found[request["name"]], setting, prompt)), flush=True)


def answered(request: dict[str, Any], each: Contestant, setting: dict[str, Any], prompt: torch.Tensor) -> Any:
    """Do what is asked."""
    if request["do"] == "kept":
        return each.kept(prompt, request["seed"])
    if request["do"] == "prefill":
        static = StaticCache(config=each.model.config, max_cache_len=setting["tokens"] + setting["room"])
        time = each.prefill(static if request["name"] == "static" else DynamicCache(), prompt)
    else:
        time = each.decode(request["steps"])
    return {"wall": time.wall, "cpu": time.cpu, "bytes": bytes_held(each.cache)}


if __name__ == "__main__":
    main()
