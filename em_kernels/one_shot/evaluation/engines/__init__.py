"""Engines: what completes prompts, a model in the process (`Policy.complete`) or a server (`server`)."""

from collections.abc import Iterator, Sequence
from typing import Protocol

from em_kernels.one_shot.policy.generation import Generated, Request
from em_kernels.one_shot.policy.sampling import Sampling


class Engine(Protocol):
    def __call__(self, requests: Sequence[Request], sampling: Sampling, *, description: str) -> Iterator[Generated]:
        """Completes every request and yields the completions in the order in which they end."""
        ...


__all__ = ["Engine"]
