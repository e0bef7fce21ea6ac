"""A small GPT-2 whose heads do what they are told: weights written by hand, so that every score has a known answer.

The residual stream has four slots of 64 numbers, each a one-hot vector or zero:

| slot | holds |
|---|---|
| token | which token stands here (token embedding) |
| place | where it stands (position embedding) |
| before | which token stands before it; a head with `says="before"` writes it |
| next | which token comes next; a head with `says="next"` writes it, and the unembedding reads nothing else |

Heads are 64 wide, one slot. Query and key of a head each read one slot, so q · k is 1 where they hold the same and 0
elsewhere; times `SHARPNESS` that gives a key that matches e^40 times the mass of one that does not. Rows without a
match attend to everything alike. Values always are the tokens. Layer norms are set so that they give back what they
get (slots hold a single 1 each, so mean and variance are known), and MLPs add nothing.

In `copying_model`, layer 0 tells every token what stands before it. In layer 1 a head looks from a token to the place
behind its earlier copy (its `before` is the same token) and says what stands there: an induction head, which makes the
model repeat what followed a token earlier. Row 0 can only see itself, so there the first token counts as before itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

SLOT = 64
SLOTS = {"token": 0, "place": 1, "before": 2, "next": 3}
WIDTH = SLOT * len(SLOTS)
NUM_HEADS = 4
SHARPNESS = 40.0
# Logit of the token that is said; all others have 0.
CONFIDENCE = 12.0


@dataclass(frozen=True)
class PlantedHead:
    """What a head asks for, looks at, and says.

    Attributes:
        query: (WIDTH, SLOT) map of a row to what it asks for. key: (WIDTH, SLOT) map of a token to what it offers.
        asks_always: (SLOT,) added to every query.
        says: the slot that gets the tokens it looks at; None to say nothing.
    """

    query: Tensor
    key: Tensor
    asks_always: Tensor
    says: str | None = None


def distance(tokens: int, says: str | None = None) -> PlantedHead:
    """Looks at the token so many places back; rows that have none so far back look at the first token."""
    query = _nothing()
    for place in range(SLOT):
        query[_of("place", place), max(place - tokens, 0)] = 1.0
    return PlantedHead(query, _read("place"), torch.zeros(SLOT), says)


def match(key: str, says: str | None = None) -> PlantedHead:
    """Looks at tokens whose slot `key` ("token" or "before") holds the row's own token, a token itself included."""
    return PlantedHead(_read("token"), _read(key), torch.zeros(SLOT), says)


def columns(weights: Mapping[int, float]) -> PlantedHead:
    """Looks at fixed places, from every row alike: place → share (in all 1); rows before the last of them see fewer."""
    key, always = _nothing(), torch.zeros(SLOT)
    always[0] = 1.0
    for place, weight in weights.items():
        key[_of("place", place), 0] = 1 + math.log(weight) / SHARPNESS
    return PlantedHead(_nothing(), key, always)


def uniform() -> PlantedHead:
    """Looks at everything alike."""
    return PlantedHead(_nothing(), _nothing(), torch.zeros(SLOT))


# The heads of `copying_model` by (layer, head).
PREVIOUS, AT_THREE, UNIFORM, SINK = ((0, head) for head in range(4))
INDUCTION, ECHO, UNIFORM_TOO, AT_TWENTY = ((1, head) for head in range(4))


def copying_model(dtype: torch.dtype = torch.float32) -> Any:
    """Two layers with the heads named above; it goes on as the context did after the last token's earlier copy.

    At most 64 tokens of context; token ids below 64.
    """
    first = [distance(1, says="before"), distance(3), uniform(), columns({0: 1.0})]
    return planted_model([first, [match("before", says="next"), match("token"), uniform(), distance(20)]], dtype)


def planted_model(layers: Sequence[Sequence[PlantedHead]], dtype: torch.dtype = torch.float32) -> Any:
    """A GPT-2 in evaluation mode with the given heads, four a layer.

    The norm of layer l expects l + 2 ones in the stream: token, place, and what one head of each earlier layer said.
    Where less has been said, the norm scales everything; attention is the same as long as its matches are clear.
    """
    config = GPT2Config(
        vocab_size=SLOT, n_positions=SLOT, n_embd=WIDTH, n_layer=len(layers), n_head=NUM_HEADS, n_inner=4,
        tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        model: Any = GPT2LMHeadModel(config)
    model.to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
        model.transformer.wte.weight.copy_(_read("token").T)
        model.transformer.wpe.weight.copy_(_read("place").T)
        for number, (block, heads) in enumerate(zip(model.transformer.h, layers, strict=True)):
            _give_back(block.ln_1, ones=number + 2)
            _plant(block.attn, heads)
        _give_back(model.transformer.ln_f, ones=len(layers) + 2)
        model.lm_head.weight.copy_(CONFIDENCE * _read("next").T)
    return model


def _plant(attention: Any, heads: Sequence[PlantedHead]) -> None:
    """Write the heads of a layer; Conv1D weights are (in, out), and out is all queries, all keys, all values."""
    assert len(heads) == NUM_HEADS, f"{len(heads)} heads for a layer of {NUM_HEADS}"
    strength = SHARPNESS * math.sqrt(SLOT)  # undoes the attention's own division
    for number, head in enumerate(heads):
        query, key, value = (_slot(part * NUM_HEADS + number) for part in range(3))
        attention.c_attn.weight[:, query] = strength * head.query
        attention.c_attn.bias[query] = strength * head.asks_always
        attention.c_attn.weight[:, key] = head.key
        attention.c_attn.weight[:, value] = _read("token")
        if head.says is not None:
            attention.c_proj.weight[_slot(number), _slot(SLOTS[head.says])] = torch.eye(SLOT)


def _give_back(norm: nn.LayerNorm, ones: int) -> None:
    """Make a layer norm the identity for vectors of so many ones among zeros."""
    mean = ones / WIDTH
    norm.weight.fill_(math.sqrt(mean - mean**2 + norm.eps))
    norm.bias.fill_(mean)


def _slot(number: int) -> slice:
    return slice(number * SLOT, (number + 1) * SLOT)


def _of(slot: str, entry: int) -> int:
    return SLOTS[slot] * SLOT + entry


def _nothing() -> Tensor:
    return torch.zeros(WIDTH, SLOT)


def _read(slot: str) -> Tensor:
    """(WIDTH, SLOT) map of the stream to one of its slots."""
    reading = _nothing()
    reading[_slot(SLOTS[slot])] = torch.eye(SLOT)
    return reading
