"""Low-rank adapters (LoRA): few parameters that are trained in the body of a model whose own parameters stay.

PEFT injects them into the model, which keeps its class, its forward and its head.
"""

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from em_kernels.one_shot.errors import UsageError


def check_peft(wanted_by: str) -> None:
    """Raises UsageError if the package peft is not installed; the message says what needs it."""
    if importlib.util.find_spec("peft") is None:
        raise UsageError(f"{wanted_by} needs the package peft (pip install 'em_kernels[peft]')")


def is_adapter(source: Path) -> bool:
    """Whether a folder holds an adapter, and not a model."""
    return (source / "adapter_config.json").is_file()


def tokenizer_source(source: Path) -> str:
    """The folder or name of the tokenizer of an adapter: its own if it was saved with one, otherwise its model's."""
    if (source / "tokenizer_config.json").is_file():
        return str(source)
    return json.loads((source / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]


def add_adapter(model: Any, rank: int) -> None:
    """Adds an adapter to each torch.nn.Linear but the head, with no effect yet, and freezes everything else.

    Raises:
        UsageError: the model has an adapter already, or peft is not installed.
    """
    if has_adapter(model):
        raise UsageError(f"lora_rank is {rank}, but the model has an adapter already, expected 0")
    check_peft(f"lora_rank {rank}")
    from peft import LoraConfig

    # At an alpha of twice the rank the adapter's product counts twice, as is usual.
    model.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"))


def train_adapter(model: Any) -> None:
    """Makes the adapter that a model was loaded with trainable; Transformers loads it frozen."""
    model.set_adapter(model.active_adapters())


def has_adapter(model: Any) -> bool:
    return getattr(model, "_hf_peft_config_loaded", False)


def hold_frozen_in(model: Any, dtype: torch.dtype) -> None:
    """Converts the frozen parameters: no update could be lost in them, and autocast would convert them at each use."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
