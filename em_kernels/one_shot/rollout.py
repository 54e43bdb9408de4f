"""Completions sampled from the model, and the mask of the tokens it generated."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from em_kernels.one_shot.errors import UsageError


@dataclass(frozen=True)
class Rollout:
    """Left-padded prompts, each followed by what the model generated.

    Attributes:
        input_ids: (batch, prompt + completion), the token ids.
        attention_mask: (batch, prompt + completion), bool, False on padding.
        completion_mask: (batch, completion), bool, True on generated tokens. The end-of-sequence token that ends a
            completion is one of them; the padding after it is not, even where it is the same token.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def completion_ids(self) -> list[Tensor]:
        """The generated token ids of each completion, (its length,)."""
        completions = self.input_ids[:, -self.completion_mask.shape[1] :]
        return [ids[mask] for ids, mask in zip(completions, self.completion_mask, strict=True)]

    def micro_batches(self, size: int) -> Iterator["Rollout"]:
        """The rollout in parts of at most `size` completions of similar length, without columns of only padding."""
        for rows in torch.argsort(self.completion_mask.sum(1), stable=True).split(size):
            attended = self.attention_mask[rows].any(0).nonzero()
            start, stop = int(attended[0]), int(attended[-1]) + 1
            prompt = self.input_ids.shape[1] - self.completion_mask.shape[1]
            yield Rollout(
                self.input_ids[rows, start:stop],
                self.attention_mask[rows, start:stop],
                self.completion_mask[rows, : stop - prompt],
            )


@torch.no_grad()
def sample(
    model: Any,
    tokenizer: Any,
    chats: Any,
    *,
    temperature: float | None,
    max_new_tokens: int,
    seed: int,
    description: str,
    show_progress: bool = True,
) -> Rollout:
    """Completes each chat with the model as it is: softmax(logits / temperature), no top-k, top-p or penalty.

    The author's own sampling settings are set aside, because the loss scores the distribution a token was drawn from.

    Args:
        model: a Transformers causal language model.
        tokenizer: the model's.
        chats: input_ids and attention_mask, (batch, prompt), left-padded.
        temperature: of the softmax; None takes the most likely token.
        max_new_tokens: longest completion, in tokens.
        seed: of the draws.
        description: of the progress bar.
        show_progress: whether there is one.

    Raises:
        UsageError: prompt and completion do not fit the model's context, or nothing was generated.
    """
    check_context(model, chats, max_new_tokens)
    prompt = chats["input_ids"].shape[1]
    end = stop_tokens(model, tokenizer)
    settings = {"do_sample": False} if temperature is None else {"do_sample": True, "temperature": temperature}
    model_settings = model.generation_config
    # Whatever is not set in the call is filled in from the model's own settings, so they must go for its duration.
    model.generation_config = GenerationConfig(eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    model.eval()
    torch.manual_seed(seed)
    try:
        with tqdm(total=max_new_tokens, desc=description, unit="token", leave=False, disable=not show_progress) as bar:
            input_ids = model.generate(
                input_ids=chats["input_ids"].to(model.device),
                attention_mask=chats["attention_mask"].to(model.device),
                max_new_tokens=max_new_tokens,
                top_k=0 if temperature is not None else None,
                top_p=1.0 if temperature is not None else None,
                use_cache=True,
                stopping_criteria=StoppingCriteriaList([_Progress(bar)]),
                **settings,
            )
    finally:
        model.generation_config = model_settings
    if input_ids.shape[1] == prompt:
        raise UsageError("the model generated no tokens, so there is nothing to train on")
    completion_mask = generated_tokens(input_ids[:, prompt:], end)
    attention_mask = torch.cat([chats["attention_mask"].to(model.device).bool(), completion_mask], dim=1)
    return Rollout(input_ids, attention_mask, completion_mask)


def check_context(model: Any, chats: Any, max_new_tokens: int) -> None:
    """Raises UsageError unless the longest of the chats and its completion fit the model's context."""
    prompt = chats["input_ids"].shape[1]
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt + max_new_tokens > context:
        raise UsageError(
            f"the longest prompt has {prompt} tokens and max_new_tokens is {max_new_tokens}, together more than the "
            f"model's context of {context} tokens"
        )


def generated_tokens(completions: Tensor, end: list[int]) -> Tensor:
    """True up to and including the first of the `end` tokens: (batch, completion) ids to a bool mask of that shape."""
    is_end = torch.isin(completions, torch.tensor(end, device=completions.device))
    return is_end.cumsum(1) - is_end.int() == 0


def stop_tokens(model: Any, tokenizer: Any) -> list[int]:
    """The ids of the tokens that end a completion: the model's, and where it names none, the tokenizer's."""
    end = model.generation_config.eos_token_id
    if end is None:
        end = tokenizer.eos_token_id
    if end is None:
        return []
    return [end] if isinstance(end, int) else list(end)


def derive_seed(*parts: int) -> int:
    """A seed for each combination of run, step and rank, unrelated to that of its neighbours."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


class _Progress(StoppingCriteria):
    """Stops nothing: it is called once per generated token, which is when the bar moves."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.bar.update(1)
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
