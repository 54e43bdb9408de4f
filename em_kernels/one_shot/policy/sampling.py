"""The settings of sampling, and the draws: the next token of each completion from its logits and its own seed."""

import hashlib
import math
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import TopKLogitsWarper, TopPLogitsWarper

from em_kernels.one_shot.errors import UsageError

FILTER_NOTE = (
    "Note: top_p, top_k and repetition_penalty change the distribution that tokens are drawn from; the loss scores "
    "softmax(logits / temperature), without them."
)


@dataclass(frozen=True)
class Sampling:
    """How completions are drawn: from softmax(logits / temperature), unless a filter is set.

    Args:
        temperature: the temperature of the softmax; None takes the most likely token.
        max_new_tokens: the longest completion, in tokens.
        top_p: draws from the most likely tokens whose probabilities add up to this; 1 draws from all.
        top_k: draws from this many of the most likely tokens; 0 draws from all.
        repetition_penalty: what the positive logits of tokens of the prompt and the completion so far are divided by,
            and their negative logits multiplied by (arXiv 1909.05858); 1 changes none.

    Raises:
        UsageError: a setting is out of range; the message names the setting.
    """

    temperature: float | None
    max_new_tokens: int
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        for name, least in (("max_new_tokens", 1), ("top_k", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise UsageError(f"{name} is {value!r}, expected an integer of at least {least}")
        for name, most in (("temperature", math.inf), ("top_p", 1.0), ("repetition_penalty", math.inf)):
            value = getattr(self, name)
            if name == "temperature" and value is None:
                continue
            number = isinstance(value, int | float) and not isinstance(value, bool)
            if not (number and 0 < value <= most and math.isfinite(value)):
                expected = f"above 0 and at most {most:g}" if math.isfinite(most) else "above 0"
                raise UsageError(f"{name} is {value!r}, expected a finite number {expected}")

    @property
    def filtered(self) -> bool:
        """Whether tokens are drawn from another distribution than softmax(logits / temperature)."""
        return self.top_p < 1 or self.top_k > 0 or self.repetition_penalty != 1


def derive_seed(*parts: int) -> int:
    """A seed for each combination of numbers, such as run, step and rank, unrelated to those of neighbouring ones."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "little")


def draw(logits: Tensor, sampling: Sampling, uniform: Tensor, seen: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Draws a token for each row, which depends on the row alone.

    The token is the first whose cumulative probability is above the row's uniform number.

    Args:
        logits: (rows, V) logits.
        sampling: the settings of sampling.
        uniform: (rows,) numbers of [0, 1), float64; unused where the most likely token is taken.
        seen: (rows, V), bool, True on the tokens that the repetition penalty is for; None without a penalty.

    Returns:
        The token ids and the largest logits, each (rows,). A row whose largest logit is not finite has no distribution,
        and its token means nothing.
    """
    logits = logits.float()
    if seen is not None:
        penalty = sampling.repetition_penalty
        logits = torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)
    largest, most_likely = logits.max(dim=-1)
    if sampling.temperature is None:
        return most_likely, largest
    # At a tiny temperature, logits that are not first brought to at most 0 would overflow.
    scaled = (logits - largest[:, None]) / sampling.temperature
    if sampling.top_k > 0:
        scaled = TopKLogitsWarper(sampling.top_k)(None, scaled)
    if sampling.top_p < 1:
        scaled = TopPLogitsWarper(sampling.top_p)(None, scaled)
    # Apple's GPUs have no float64.
    exact = torch.float32 if logits.device.type == "mps" else torch.float64
    cumulative = scaled.softmax(dim=-1).cumsum(dim=-1, dtype=exact)
    total = cumulative[:, -1:]
    # In float32 a number can round to 1, which leads to no token; it has to stay below the total.
    target = torch.minimum(uniform[:, None].to(exact) * total, torch.nextafter(total, torch.zeros_like(total)))
    return torch.searchsorted(cumulative, target, right=True)[:, 0].clamp(max=logits.shape[1] - 1), largest
