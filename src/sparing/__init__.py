"""sparing finds what matters in a transformer's context and spends memory and compute only there.

Importing the package imports neither torch nor transformers; its names are loaded when first used.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.5.0"

_HOME = {
    "use": "sparing.session",
    "Session": "sparing.session",
    "Evict": "sparing.core.method",
    "Method": "sparing.core.method",
    "parse_method": "sparing.core.parsing",
    "Plan": "sparing.core.plan",
    "Uniform": "sparing.core.allocate",
    "Pyramid": "sparing.core.allocate",
    "Proportional": "sparing.core.allocate",
    "AdaptiveHeads": "sparing.core.allocate",
    "GlobalTopK": "sparing.core.allocate",
    "BlockTopK": "sparing.methods.prefill.block_top_k",
    "AnchorAttention": "sparing.methods.prefill.anchorattention",
    "Sale": "sparing.methods.prefill.sale",
    "HyperAttention": "sparing.methods.prefill.hyper_attention",
    "S2Attention": "sparing.methods.prefill.s2_attention",
    "Neighborhood": "sparing.methods.prefill.neighborhood",
    "GRAT": "sparing.methods.prefill.grat",
    "LongHeadsPrefill": "sparing.methods.prefill.longheads",
    "DeltaLLMPrefill": "sparing.methods.prefill.deltallm",
    "sparse_attention": "sparing.prefilling",
    "SpAtten": "sparing.methods.prefill.spatten",
    "XAttention": "sparing.methods.prefill.xattention",
    "ProxyAttn": "sparing.methods.prefill.proxyattn",
    "DHSA": "sparing.methods.prefill.dhsa",
    "DHSACosine": "sparing.methods.prefill.dhsa",
    "DHSABlocks": "sparing.methods.prefill.dhsa",
    "VerticalSlash": "sparing.methods.prefill.vertical_slash",
    "AShape": "sparing.methods.prefill.a_shape",
    "TriShape": "sparing.methods.prefill.a_shape",
    "FlexPrefill": "sparing.methods.prefill.flexprefill",
    "BlockSparse": "sparing.core.prefill",
    "SparsePrefill": "sparing.core.prefill",
    "SparingError": "sparing.errors",
    "score": "sparing.scoring",
    "calibrate": "sparing.scoring",
    "Scores": "sparing.core.scores",
    "agree": "sparing.core.scores",
    "edit": "sparing.editing",
    "fold": "sparing.editing",
    "save_edited": "sparing.editing",
    "ablate": "sparing.editing",
    "head_outputs": "sparing.editing",
    "ScaleHeads": "sparing.core.edits",
    "BiasHeads": "sparing.core.edits",
    "AblateHeads": "sparing.core.edits",
    "UniformHeads": "sparing.methods.heads.uniform_heads",
    "BiasFirstToken": "sparing.methods.heads.zerotuning",
    "RedistributeSinks": "sparing.methods.heads.act",
    "Random": "sparing.methods.kv.random",
    "StreamingLLM": "sparing.methods.kv.streaming_llm",
    "H2O": "sparing.methods.kv.h2o",
    "SnapKV": "sparing.methods.kv.snapkv",
    "PyramidKV": "sparing.methods.kv.pyramidkv",
    "AdaKV": "sparing.methods.kv.adakv",
    "TOVA": "sparing.methods.kv.tova",
    "Knorm": "sparing.methods.kv.knorm",
    "KeyDiff": "sparing.methods.kv.keydiff",
    "ExpectedAttention": "sparing.methods.kv.expected_attention",
    "ThinK": "sparing.methods.kv.think",
    "Leverage": "sparing.methods.kv.leverage",
    "Quest": "sparing.methods.kv.quest",
    "RefreshKV": "sparing.methods.kv.refreshkv",
    "LongHeads": "sparing.methods.kv.longheads",
    "ActQKV": "sparing.methods.kv.actqkv",
    "DeltaLLM": "sparing.methods.kv.deltallm",
    "Compactor": "sparing.methods.kv.leverage",
    "CriticalKV": "sparing.methods.kv.criticalkv",
    "ChunkKV": "sparing.methods.kv.chunkkv",
    "CaM": "sparing.methods.kv.cam",
    "EMS": "sparing.methods.kv.ems",
    "KVzip": "sparing.methods.kv.kvzip",
    "SpecKV": "sparing.methods.kv.speckv",
    "SpecKVPC": "sparing.methods.prefill.specpc",
    "SpecPC": "sparing.methods.prefill.specpc",
    "Scissorhands": "sparing.methods.kv.scissorhands",
    "Rerotate": "sparing.core.actions",
    "FullHeads": "sparing.core.allocate_heads",
    "RazorAttention": "sparing.methods.kv.razor_attention",
    "load": "sparing.recipe",
    "position_invariant": "sparing.segments",
    "rerank": "sparing.reranking",
    "rerank_many": "sparing.reranking",
    "reorder_for_long_context": "sparing.reranking",
    "ICR": "sparing.methods.rerank.icr",
    "QRHeadRanker": "sparing.methods.rerank.qrhead",
    "FIRST": "sparing.methods.rerank.first",
    "Recipe": "sparing.recipe",
    "DuoAttention": "sparing.methods.kv.duo_attention",
    "HeadKV": "sparing.methods.kv.headkv",
    "CompressKV": "sparing.methods.kv.compresskv",
    "TaskKV": "sparing.methods.kv.task_kv",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'sparing' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
