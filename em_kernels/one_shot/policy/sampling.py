"""The parts of sampling: the model's context and stop tokens, generation settings, seeds, and the progress bar."""

import contextlib
import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from em_kernels.one_shot.errors import UsageError


def check_context(model: Any, chats: Any, max_new_tokens: int) -> None:
    """Checks that the longest of the chats and its completion fit the model's context.

    Raises:
        UsageError: the two do not fit.
    """
    prompt = chats["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt + max_new_tokens > context:
        raise UsageError(
            f"the longest prompt has {prompt} tokens and max_new_tokens is {max_new_tokens}, together more than the "
            f"model's context of {context} tokens"
        )


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end a completion: the model's, or the tokenizer's where the model names none."""
    end = model.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        return []
    return [end] if isinstance(end, int) else list(end)


def generated_tokens(completions: Tensor, end: list[int]) -> Tensor:
    """A bool mask of the (batch, completion) ids, True up to and including the first of the `end` tokens of a row."""
    is_end = torch.isin(completions, torch.tensor(end, device=completions.device))
    return is_end.cumsum(1) - is_end.int() == 0


def derive_seed(*parts: int) -> int:
    """A seed for each combination of run, step and rank, unrelated to the seeds of neighbouring combinations."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


@contextlib.contextmanager
def bare_generation_settings(model: Any, *, end: list[int], padding: int | None) -> Iterator[None]:
    """Replaces the model's generation settings, until the block ends, by ones that name these tokens and nothing else.

    Transformers takes whatever a call of generate() leaves unset from the model's settings, so arguments of the call
    alone would not do.
    """
    own = model.generation_config
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=padding)
    try:
        yield
    finally:
        model.generation_config = own


@contextlib.contextmanager
def token_bar(tokens: int, description: str, *, show: bool) -> Iterator[StoppingCriteriaList]:
    """A progress bar over `tokens` tokens, in the form of stopping criteria that move the bar and stop nothing."""
    with tqdm(total=tokens, desc=description, unit="token", leave=False, disable=not show) as bar:
        yield StoppingCriteriaList([_Progress(bar)])


class _Progress(StoppingCriteria):
    """Moves the bar by one: generate() calls its stopping criteria once per generated token."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.bar.update(1)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
