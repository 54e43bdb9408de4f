"""What a policy is asked to complete, and what comes back."""

from collections.abc import Hashable
from dataclasses import dataclass


@dataclass(frozen=True)
class Request:
    """A prompt to complete.

    Attributes:
        key: what tells the request from others.
        prompt: the prompt.
        seed: the seed of the draws of its completion.
    """

    key: Hashable
    prompt: str
    seed: int


@dataclass(frozen=True)
class Generated:
    """The completion of a request.

    Attributes:
        key: the key of the request.
        text: the completion without special tokens, up to the text that ends it.
        tokens: the number of tokens, the one that ended the completion included.
        truncated: whether the completion has the greatest length and nothing has ended it.
    """

    key: Hashable
    text: str
    tokens: int
    truncated: bool
