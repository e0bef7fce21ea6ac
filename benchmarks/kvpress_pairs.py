"""The methods that sparing and kvpress 0.5.5 both have: sparing's side of each, and why the two keep other tokens.

kvpress' side is in kvpress_driver.py.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Pair:
    """A method that both have.

    Attributes:
        spec: sparing's side.
        why: why other tokens are kept, if they are.
        aligned: sparing's side of the aligned comparison, if it is another.
    """

    spec: str
    why: str = ""
    aligned: str = ""


BORDER = "At the ends of the pooled stretch kvpress divides by the whole kernel, sparing by the neighbours that exist"
SKETCH = "another random sketch (kvpress with another seed differs from itself as well)"
METHODS = {
    "snapkv": Pair("snapkv", BORDER),
    "knorm": Pair("knorm(recent=0)"),
    "expected_attention": Pair("expected_attention"),
    "adakv": Pair("snapkv+adaptive(floor=0.2)", BORDER),
    "streaming_llm": Pair("streaming_llm(moment=prefill_end)"),
    "pyramidkv": Pair(
        "pyramidkv(beta=10)",
        "In kvpress a layer's budget includes the window; in sparing the window comes on top, so layers differ less. "
        "Pooling as in snapkv. Aligned, budgets still differ by rounding: kvpress' per layer, sparing's per head",
        "snapkv+pyramid(beta=10,window=0)",
    ),
    "tova": Pair("tova(moment=prefill_end)"),
    "h2o": Pair(
        "h2o(recent=0,moment=prefill_end)",
        "kvpress divides a token's sum of attention by the number of rows that see it, sparing (as the paper) does not",
    ),
    "keydiff": Pair("keydiff(recent=0)"),
    "leverage": Pair("leverage", f"{SKETCH.capitalize()}; sparing always keeps the first 8 and last 4 tokens"),
    "compactor": Pair(
        "compactor",
        f"{SKETCH.capitalize()}; kvpress leaves 1/sqrt(d) out of the logits, starts its chunks after the first 8 "
        "tokens, pads the last one, standardises over all heads together, and pools as in snapkv",
        "compactor(sketch=0)",
    ),
    "chunkkv": Pair(
        "chunkkv",
        "In kvpress all heads of a layer keep the same chunks and only whole ones, so the budget is not used up; "
        "in sparing each head chooses. Aligned: per head, in chunks of 8, which fit window and budget",
        "chunkkv(size=8)",
    ),
    "criticalkv": Pair("criticalkv", BORDER),
    "random": Pair("random", "Independent draws: chance, k / (2 - k) for a kept share k"),
    "kvzip": Pair("kvzip"),
    "duo": Pair("duo", "sparing spends the budget to the last token, so some windows are one token longer"),
    "think": Pair(
        "think(channels=0.625)",
        "Tokens: as snapkv. Channels: kvpress sums squared norms over the group, sparing (as the paper) the norms",
    ),
}
DRAWN = ("leverage", "compactor", "random")  # kvpress takes these from torch's global generator
