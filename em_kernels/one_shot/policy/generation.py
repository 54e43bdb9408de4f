"""What a policy is asked to complete, what comes back, and the choice of what completes it."""

from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

from em_kernels.one_shot.policy.cache import rows_can_change
from em_kernels.one_shot.policy.completion import Completion, Decoding
from em_kernels.one_shot.policy.decoding import decode
from em_kernels.one_shot.policy.library import complete_by_generate


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
        logprob: the mean log-probability of the tokens at temperature 1 and without filters, in nats; None where it
            was not measured.
    """

    key: Hashable
    text: str
    tokens: int
    truncated: bool
    # The same completion in other company has another rounding.
    logprob: float | None = field(default=None, compare=False)


def finish(
    decoding: Decoding, completions: Iterable[Completion], at_once: int, tick: Callable[[int], Any]
) -> Iterator[Completion]:
    """Yields each completion when it is done, in any order.

    A model whose cache cannot drop a row completes batches of `at_once`, each of which takes as long as its longest
    completion. The tokens are the same.

    Args:
        decoding: the model and the settings.
        completions: completions without tokens, which are taken as places become free.
        at_once: the number of places.
        tick: called with the number of tokens that each completion in the making has grown by.
    """
    if rows_can_change(decoding.model):
        yield from decode(decoding, completions, at_once, tick)
        return
    pending = iter(completions)
    while batch := list(islice(pending, at_once)):
        complete_by_generate(decoding, batch, tick)
        yield from batch
