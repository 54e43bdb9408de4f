"""A model in this process as an engine."""

import functools
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoConfig

from em_kernels.one_shot.evaluation.engines import Engine
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.adapter import is_adapter
from em_kernels.one_shot.policy.chat import ChatFormat
from em_kernels.one_shot.policy.model import load_model, not_loaded


def check_model(source: str, *, trust_remote_code: bool) -> None:
    """Reads the configuration of a model, which takes a moment where the model itself takes minutes.

    Raises:
        UsageError: there is no such model.
    """
    if is_adapter(Path(source)):
        return
    try:
        AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        raise not_loaded(source, error) from error


def load_engine(
    source: str | None,
    *,
    chat: ChatFormat,
    dtype: str,
    concurrency: int,
    prompts: Sequence[str],
    max_new_tokens: int,
    trust_remote_code: bool,
) -> Engine:
    """Loads a model onto this machine's accelerator, or the CPU where there is none.

    Args:
        source: what `load_model` takes.
        chat: how a prompt becomes the text that the model completes.
        dtype: the dtype of the model's parameters, "float32" or "bfloat16".
        concurrency: the number of completions that are in the making at once.
        prompts: the prompts that the engine will be asked to complete.
        max_new_tokens: the longest completion, in tokens.
        trust_remote_code: whether the model's repository may run code of its own.

    Raises:
        UsageError: the model cannot be loaded, or a prompt does not fit its template or its context.
    """
    policy = load_policy(source, chat=chat, dtype=dtype, trust_remote_code=trust_remote_code)
    policy.check(prompts, max_new_tokens)
    return functools.partial(policy.complete, at_once=concurrency)


def load_policy(source: str | None, *, chat: ChatFormat, dtype: str, trust_remote_code: bool) -> Policy:
    """The model as `load_engine` loads it, for what takes more of it than completions."""
    model, tokenizer = load_model(source, trust_remote_code=trust_remote_code)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    return Policy(model.to(device, getattr(torch, dtype)), tokenizer, chat=chat)
