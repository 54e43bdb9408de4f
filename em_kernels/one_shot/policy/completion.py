"""A completion in the making, and what it takes to make one."""

import contextlib
import random
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.policy.stops import Stops


@dataclass(frozen=True)
class Decoding:
    """What all completions of a call share.

    Attributes:
        model: the model.
        sampling: the settings of sampling.
        stops: what ends a completion.
        padding: the id of the token that pads.
        computing: makes the context in which the model computes.
    """

    model: Any
    sampling: Sampling
    stops: Stops
    padding: int
    computing: Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass
class Completion:
    """The tokens drawn so far after one prompt.

    Attributes:
        prompt: the token ids of the prompt.
        uniform: the numbers of the draws, one a token, which are those of the completion's own seed.
        ids: the token ids of the completion, up to and including the one that ends it.
        logprobs: the log-probability of each of them at temperature 1 and without filters, in nats; empty where it was
            not measured.
        ended: whether a token or a text ended the completion.
        key: what tells the completion from others.
    """

    prompt: list[int]
    uniform: random.Random
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    ended: bool = False
    key: Hashable = None

    @property
    def logprob(self) -> float | None:
        """The mean log-probability of the tokens, or None where it was not measured."""
        return sum(self.logprobs) / len(self.logprobs) if self.logprobs else None

    def extend(self, ids: Sequence[int], stops: Stops, logprobs: Sequence[float] = ()) -> None:
        """Takes newly drawn tokens, of which those after the end of the completion are left out."""
        checked = len(self.ids)
        self.ids += ids
        self.logprobs += logprobs
        length = stops.length(self.ids, checked)
        if length is not None:
            self.ended = True
            del self.ids[length:], self.logprobs[length:]


def padded(rows: Sequence[Sequence[int]], padding: int, *, left: bool) -> tuple[Tensor, Tensor]:
    """The rows as one tensor, padded on one side, and its bool mask that is False on padding, each (rows, longest)."""
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), padding)
    mask = torch.zeros((len(rows), longest), dtype=torch.bool)
    for i, row in enumerate(rows):
        where = slice(longest - len(row), longest) if left else slice(len(row))
        ids[i, where], mask[i, where] = torch.tensor(row), True
    return ids, mask


def seen_tokens(rows: Sequence[Sequence[int]], vocabulary: int, device: torch.device) -> Tensor:
    """A bool mask, (rows, vocabulary), that is True on the tokens of each row."""
    seen = torch.zeros((len(rows), vocabulary), dtype=torch.bool)
    for i, row in enumerate(rows):
        seen[i, torch.tensor(row)] = True
    return seen.to(device)


def check_context(model: Any, prompt_tokens: int, max_new_tokens: int) -> None:
    """Checks that the longest prompt and its completion fit the model's context.

    Raises:
        UsageError: the two do not fit.
    """
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and prompt_tokens + max_new_tokens > context:
        raise UsageError(
            f"the longest prompt has {prompt_tokens} tokens and max_new_tokens is {max_new_tokens}, together more than "
            f"the model's context of {context} tokens"
        )
