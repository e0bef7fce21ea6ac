"""Tiny random models of every structure that matters, built from configurations: nothing is downloaded.

Each has two or three layers, a hidden size of at most 64 and a vocabulary of 64; the same name and seed give the
same weights. What they say is noise; what they do with keys, masks, positions and caches is what real models do.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from sparing.errors import UnknownNameError

VOCABULARY = 64


@dataclass(frozen=True)
class TinyModel:
    """A tiny model and what a check may expect of it.

    Attributes:
        model_type: as transformers calls it.
        settings: builds the configuration's fields, on top of the common ones.
        whole_tokens: True if it caches something else than what its attention sees (latent attention), so that
            only whole tokens can be evicted. Methods that need keys per head may refuse it.
        rotates: True if its keys are cached rotated, so that they can be turned to other positions.
        recurrent: True if some layers carry a state instead of keys, so that chunks and pads pass through them.
        tolerance: how well float64 logits agree with a reference in float64; larger where the model itself
            falls back to float32.
    """

    model_type: str
    settings: Callable[[], dict[str, Any]]
    whole_tokens: bool = False
    rotates: bool = True
    recurrent: bool = False
    tolerance: float = 1e-9


def _common() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.3,
        "pad_token_id": 0,
        "bos_token_id": None,
        "eos_token_id": None,
        "tie_word_embeddings": False,
    }


def _layers(*kinds: str) -> dict[str, Any]:
    return {"layer_types": list(kinds), "num_hidden_layers": len(kinds)}


_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}


def _gpt2() -> dict[str, Any]:
    return {"n_embd": 32, "n_layer": 2, "n_head": 4, "max_position_embeddings": 1024, "n_inner": 48}


def _deepseek() -> dict[str, Any]:
    return {
        "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8,
        "v_head_dim": 8, "moe_intermediate_size": 16, "n_routed_experts": 4, "num_experts_per_tok": 2, "n_group": 1,
        "topk_group": 1, "first_k_dense_replace": 1, "n_shared_experts": 1, "head_dim": 8,
    }  # fmt: skip


def _jamba() -> dict[str, Any]:
    return {
        "num_hidden_layers": 3, "attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 2,
        "num_experts": 1, "num_experts_per_tok": 1, "mamba_d_state": 4, "mamba_dt_rank": 4, "mamba_expand": 1,
    }  # fmt: skip


def _qwen3_next() -> dict[str, Any]:
    return {
        **_layers("linear_attention", "full_attention"), "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 8, "linear_value_head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16, "decoder_sparse_step": 1,
    }  # fmt: skip


TINY_MODELS: dict[str, TinyModel] = {
    "llama": TinyModel("llama", dict),
    "qwen3": TinyModel("qwen3", dict),
    "gemma3": TinyModel(
        "gemma3_text",
        lambda: {**_layers("sliding_attention", "full_attention", "full_attention"), "sliding_window": 16},
    ),
    "mistral": TinyModel("mistral", lambda: {"sliding_window": None}),
    "phi3": TinyModel(
        "phi3",
        lambda: {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5},
            "sliding_window": None,
        },
    ),
    "gpt2": TinyModel("gpt2", _gpt2, rotates=False),
    "mixtral": TinyModel("mixtral", lambda: {**_EXPERTS, "sliding_window": None}),
    "gpt_oss": TinyModel(
        "gpt_oss",
        lambda: {**_EXPERTS, **_layers("full_attention", "sliding_attention"), "sliding_window": 16},
        tolerance=1e-5,  # eager attention, whose softmax is in float32
    ),
    "deepseek_v3": TinyModel("deepseek_v3", _deepseek, whole_tokens=True, tolerance=1e-5),
    "jamba": TinyModel("jamba", _jamba, rotates=False, recurrent=True, tolerance=1e-5),
    "qwen3_next": TinyModel("qwen3_next", _qwen3_next, recurrent=True, tolerance=1e-5),
}


def tiny_config(name: str, **changes: Any) -> Any:
    """The configuration of a tiny model, with fields changed if wished.

    Raises:
        UnknownNameError: no such tiny model.
    """
    if name not in TINY_MODELS:
        raise UnknownNameError("tiny model", name, TINY_MODELS)
    spec = TINY_MODELS[name]
    return CONFIG_MAPPING[spec.model_type](**{**_common(), **spec.settings(), **changes})


def tiny_model(name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> Any:
    """Build a tiny model in evaluation mode; the global random state is left as it was.

    Args:
        name: one of `TINY_MODELS`.
        changes: fields of the configuration to change.

    Raises:
        UnknownNameError: no such tiny model.
    """
    config = tiny_config(name, **changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Experts one by one: the fused ones do not offer float64.
        experts = {"experts_implementation": "eager"} if hasattr(config, "_experts_implementation") else {}
        model: Any = AutoModelForCausalLM.from_config(config, **experts).eval()
        for parameter_name, parameter in model.named_parameters():
            if parameter_name.endswith("sinks"):
                torch.nn.init.normal_(parameter)
    return model.to(dtype)
