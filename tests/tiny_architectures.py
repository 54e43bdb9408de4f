"""Tiny models with random weights of many architectures, whose vocabulary is that of the tiny model."""

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_SHAPE = {
    "vocab_size": 257,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    # Weights this large give far from uniform distributions.
    "initializer_range": 0.3,
    "init_std": 0.3,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "tie_word_embeddings": False,
}
_SLIDING = ["sliding_attention", "full_attention"]

# The windows are shorter than the tests' sequences.
OF_KEYS_AND_VALUES: dict[str, dict[str, Any]] = {
    "llama": {},
    "gpt2": {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "bloom": {"n_layer": 2, "n_head": 4},
    "gpt_neox": {},
    "mistral": {"sliding_window": 6},
    "qwen3": {},
    "gemma2": {"sliding_window": 6, "layer_types": _SLIDING},
    "gemma3_text": {"sliding_window": 6, "layer_types": _SLIDING},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
}
OTHERS: dict[str, dict[str, Any]] = {
    "phi3": {},
    "mamba": {"state_size": 4, "num_layers": 2},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 64, "block_types": ["recurrent", "attention"]},
    "jamba": {"num_experts": 2, "attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
}


def tiny_architecture(name: str) -> Any:
    """A model with so many end tokens that its completions end, each at a length of its own."""
    config = AutoConfig.for_model(name, **{**_SHAPE, **OF_KEYS_AND_VALUES.get(name, {}), **OTHERS.get(name, {})})
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config).eval()
    model.generation_config.eos_token_id = list(range(0, 257, 16))
    return model
