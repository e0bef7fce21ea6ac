"""From the trained network to a folder that transformers loads without any code of ours."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sparing.models.recipe.network import Network, Shape
from sparing.models.recipe.tokenization import BOS, EOS, MAX_LENGTH, PAD, save_pretrained


def llama_config(shape: Shape, tokenizer: Tokenizer) -> LlamaConfig:
    """Return the configuration of the same network in transformers."""
    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_width,
        max_position_embeddings=MAX_LENGTH,
        rms_norm_eps=shape.epsilon,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )


def export(network: Network, tokenizer: Tokenizer, folder: Path) -> None:
    """Write configuration, weights (float32 safetensors) and tokenizer to folder."""
    config = llama_config(network.shape, tokenizer)
    model = LlamaForCausalLM(config)
    weights = {name: tensor.detach().to(torch.float32) for name, tensor in network.state_dict().items()}
    model.load_state_dict(weights | {"lm_head.weight": weights["model.embed_tokens.weight"]})
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(folder)
    save_pretrained(tokenizer, folder)
