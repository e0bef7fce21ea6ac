"""Every sparse prefill method on the bundled model: score against density, as The Sparse Frontier (arXiv:2504.17768).

All methods at equal densities, the worst task beside the average, both modes, several seeds and lengths; and isoFLOP:
of what a prompt costs in all (2 P n for P parameters besides embeddings, and 4 D for every (query, key) pair of every
head that is computed), which mix of length and density answers best. What choosing costs is not in the FLOPs; it is
measured in `sparse_prefill.py`.
"""

from __future__ import annotations

import copy
import statistics
from collections import defaultdict
from typing import Any

from common import table
from frontier import ROOT, Cost, bare, options, rows, short, write_down
from matplotlib.figure import Figure

from sparing.compare.report.summary import summary
from sparing.core.pattern import causal_pairs
from sparing.loading import ModelSpec

TASKS = "needle_single,needle_multikey,kv_retrieval,perplexity"
# The bundled model reads 1 to 2 thousand tokens: blocks, windows and strides are an eighth or so of the papers'.
NAMES = (
    "a_shape(block=16,sinks=16)", "tri_shape(block=16,sinks=16,dense_last=32)", "block_top_k(block=16)",
    "vertical_slash(block=16,sinks=4,local=16)", "flexprefill(block=16)", "xattention(block=16,stride=4)",
    "xattention(block=16,stride=4)+rows", "proxyattn(block=16)", "proxyattn(block=16)+rows",
    "anchorattention(block=16)", "sale(block=16,local=16)", "dhsa(block=16,recent=16)",
    "dhsa_cosine(block=16,recent=16)", "dhsa_blocks(block=64,key_block=16)", "hyperattention(block=16)",
    "s2attention(block=16)", "neighborhood(block=16)", "grat(block=16)", "longheads_prefill(block=16)",
    "deltallm_prefill(block=16,window=32)", "spatten", "specpc(draft=bundled)",
)  # fmt: skip
OTHER_LENGTHS = "512,2048"  # for isoFLOP, one seed
OTHER_COSTS = ("specpc", "spatten", "deltallm_prefill")  # a draft, fewer tokens, a simulation: not those FLOPs
SHOWN = 6  # methods in the isoFLOP picture


def main() -> None:
    """Measure and write down."""
    given = options("sparse_frontier", NAMES, __doc__)
    found = rows(given, TASKS)
    others = copy.copy(given)
    others.lengths, others.seeds = OTHER_LENGTHS, 1
    iso = isoflop(rows(others, TASKS))
    cost = Cost("density", "density", "share of dense prefill attention computed")
    title = "Sparse prefill: score against density"
    usual = [row for row in found if str(row["length"]) == given.lengths]
    write_down("sparse_frontier", title, usual, given.seeds, cost, _iso_table(iso))
    _iso_picture(iso).savefig(ROOT / "docs" / "sparse_isoflop.svg", metadata={"Date": None})


def isoflop(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """[method, keep, length] → FLOPs of the prompt and mean score, query-aware, over the tasks that count."""
    aware = [section for section in summary(found) if section.mode == "query-aware"]
    counted = {(cell.task, cell.length) for section in aware for cell in section.counted}
    groups: dict[tuple[str, str, int], list[dict[str, Any]]] = defaultdict(list)
    for row in found:
        if row["method"].startswith(OTHER_COSTS):
            continue
        if row["mode"] == "query-aware" and (row["task"], row["length"]) in counted:
            groups[short(row["method"]), row["keep_label"], row["length"]].append(row)
    linear, per_pair = _model_costs()
    points = []
    for (method, keep, length), group in groups.items():
        density = statistics.mean(row["density"] or 1.0 for row in group)
        flops = linear * length + per_pair * density * causal_pairs(length, length)
        score = statistics.mean(row["score"] for row in group)
        points.append(
            {"method": method, "keep": keep, "length": length, "density": density, "flops": flops, "score": score}
        )
    return points


def _model_costs() -> tuple[float, float]:
    """FLOPs of a token outside attention, and of a (query, key) pair in all heads and layers."""

    model = ModelSpec(device="cpu").load().model
    config = model.config
    parameters = sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "lm_head" not in name)
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return 2 * parameters, 4 * dim * config.num_attention_heads * config.num_hidden_layers


def _iso_table(points: list[dict[str, Any]]) -> str:
    lines = [
        [p["method"], str(p["length"]), f"{p['density']:.0%}", f"{p['flops'] / 1e9:.2f}", f"{p['score']:.2f}"]
        for p in sorted(points, key=lambda p: (p["flops"], p["method"]))
    ]
    return "## isoFLOP, query-aware\n\n" + table(["method", "tokens", "density", "GFLOP", "average"], lines)


def _iso_picture(points: list[dict[str, Any]]) -> Figure:
    """Score against FLOPs: dense attention at every length, and the best methods at every density and length."""
    figure = Figure(figsize=(7.5, 4.6), layout="constrained")
    axes = figure.subplots()
    means = defaultdict(list)
    for point in points:
        means[point["method"]].append(point["score"])
    best = sorted((name for name in means if name != "full"), key=lambda name: -statistics.mean(means[name]))[:SHOWN]
    for name in ["full", *best]:
        for length in sorted({point["length"] for point in points}):
            line = sorted(
                (p["flops"] / 1e9, p["score"]) for p in points if p["method"] == name and p["length"] == length
            )
            colour = "black" if name == "full" else f"C{best.index(name)}"
            first = length == min(point["length"] for point in points)
            axes.plot(*zip(*line, strict=True), marker="s" if name == "full" else "o", markersize=5, color=colour,
                      label=("dense" if name == "full" else bare(name)) if first else None)  # fmt: skip
    ticks = [0.8, 1, 1.5, 2, 3, 4, 6, 8]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    axes.minorticks_off()
    axes.set(xlabel="GFLOP of the prompt", ylabel="average score, query-aware", ylim=(-0.03, 1.03))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return figure


if __name__ == "__main__":
    main()
