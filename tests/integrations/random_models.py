"""Models of real architectures with a few thousand random weights."""

import os
from typing import Any, cast

# No test may depend on a network. The hub's client reads the variable once, when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers as t

VOCABULARY = 61
_SIZE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # Weights this large give far from uniform distributions; at a uniform one, the entropy has no gradient.
    "initializer_range": 0.3,
}


def llama() -> Any:
    return _model("LlamaForCausalLM", t.LlamaConfig(**_SIZE))


def gemma2() -> Any:
    """A model with a softcap of its logits."""
    return _model("Gemma2ForCausalLM", t.Gemma2Config(**_SIZE, head_dim=8, final_logit_softcapping=2.0))


def granite() -> Any:
    """A model that divides its logits."""
    return _model("GraniteForCausalLM", t.GraniteConfig(**_SIZE, logits_scaling=2.0))


def mixtral() -> Any:
    """A mixture of experts with an auxiliary loss."""
    config = t.MixtralConfig(**_SIZE, num_local_experts=4, output_router_logits=True, router_aux_loss_coef=0.5)
    return _model("MixtralForCausalLM", config)


def gpt2() -> Any:
    """A model whose head is its embedding."""
    config = t.GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    return _model("GPT2LMHeadModel", config)


def labelled_batch() -> dict[str, torch.Tensor]:
    """Two rows of tokens, of which one is padded on the left; a prompt and the padding have no labels."""
    tokens = torch.randint(3, VOCABULARY, (2, 8))
    attended = torch.ones_like(tokens)
    attended[1, :2] = 0
    labels = tokens.clone()
    labels[0, :3] = labels[1, :4] = -100
    return {"input_ids": tokens, "attention_mask": attended, "labels": labels}


def _model(name: str, config: Any) -> Any:
    torch.manual_seed(0)
    # Dropout would give two calls two results.
    return cast(Any, getattr(t, name))(config).eval()
