"""Completions by a decoding loop in which those that have ended make place for others.

A prompt's cache is made once for all of its completions. Every few tokens, the completions that have ended leave the
batch and new ones take their places. Each token is drawn as in `sampling`, so that a completion is the same in any
company, up to rounding.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from em_kernels import token_stats
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import cache as rows_of
from em_kernels.one_shot.policy.completion import Completion, Decoding, padded, seen_tokens
from em_kernels.one_shot.policy.sampling import draw

# Between two looks at which completions have ended; until the second look, those that have are carried along. With the
# built-in model and 8 places, 16 word problems took 25.0 CPU seconds at 1, 24.5 at 4, 24.1 at 8 and 25.2 at 16.
_STEPS = 8
# Prompts of more tokens than this together are taken in parts, because their activations are large.
_PREFILL_TOKENS = 4096


def decode(
    decoding: Decoding, completions: Iterable[Completion], at_once: int, tick: Callable[[int], Any]
) -> Iterator[Completion]:
    """Completes, and yields each completion when it has ended or has its greatest length.

    Args:
        decoding: the model and the settings.
        completions: completions without tokens, which are taken as places become free.
        at_once: the number of places.
        tick: called with the number of tokens that each completion in the making has grown by.

    Raises:
        UsageError: the model's logits are not finite.
    """
    batch, pending = _Batch(decoding), iter(completions)
    while True:
        new = list(islice(pending, at_once - len(batch.completions)))
        for part in _parts(new):
            batch.add(part)
        if new:
            tick(1)
        yield from batch.drop_finished()
        if batch.completions:
            tick(batch.advance())
            yield from batch.drop_finished()
        elif not new:
            return


def _parts(completions: Sequence[Completion]) -> Iterator[list[Completion]]:
    """The completions in parts, each with few enough tokens of prompts for one forward pass."""
    part: list[Completion] = []
    for completion in completions:
        prompts = {tuple(of_part.prompt) for of_part in [*part, completion]}
        if part and len(prompts) * max(map(len, prompts)) > _PREFILL_TOKENS:
            yield part
            part = []
        part.append(completion)
    if part:
        yield part


@dataclass(frozen=True)
class _Read:
    """Prompts that the model has read, one a row: the last of them, their cache, and the logits after each."""

    prompt: tuple[int, ...]
    cache: Any
    attended: Tensor
    logits: Tensor


class _Batch:
    """Completions in the making, one a row; the cache holds all of their tokens but the last."""

    def __init__(self, decoding: Decoding) -> None:
        self.decoding = decoding
        self.model, self.sampling = decoding.model, decoding.sampling
        self.device = decoding.model.device
        accepted = inspect.signature(decoding.model.forward).parameters
        self.accepts_positions, self.accepts_keep = ("position_ids" in accepted, "logits_to_keep" in accepted)
        self.completions: list[Completion] = []
        self.cache: Any = None
        self.attended = torch.empty(0, 0, dtype=torch.bool)
        self.last = torch.empty(0, dtype=torch.int64)
        self.seen: Tensor | None = None
        self.last_read: _Read | None = None

    @torch.no_grad()
    def add(self, new: list[Completion]) -> None:
        """Draws the first token of each of the completions and adds their rows to the batch."""
        places = {prompt: i for i, prompt in enumerate(dict.fromkeys(tuple(c.prompt) for c in new))}
        rows = torch.tensor([places[tuple(completion.prompt)] for completion in new], device=self.device)
        read = self._read(list(places))
        seen = None
        if self.sampling.repetition_penalty != 1:
            seen = seen_tokens([completion.prompt for completion in new], read.logits.shape[1], self.device)
        drawn, logprob = self._draw(read.logits[rows], self._uniform(new, 1)[:, 0], seen)
        self._take(new, drawn[:, None], logprob[:, None])
        cache, attended = rows_of.select(read.cache, rows, read.attended.shape[1]), read.attended[rows]
        if not self.completions:
            self.completions, self.cache, self.attended, self.last, self.seen = new, cache, attended, drawn, seen
            return
        columns = max(self.attended.shape[1], attended.shape[1])
        rows_of.add(self.cache, cache, columns)
        self.attended = torch.cat([_widened(mask, columns) for mask in (self.attended, attended)])
        self.last = torch.cat([self.last, drawn])
        if self.seen is not None and seen is not None:
            self.seen = torch.cat([self.seen, seen])
        self.completions = [*self.completions, *new]

    def _read(self, prompts: list[tuple[int, ...]]) -> "_Read":
        """The prompts as the model has read them; the last of them is remembered for more completions of it."""
        if self.last_read is not None and prompts == [self.last_read.prompt]:
            return self.last_read
        cache = rows_of.new_cache(self.model)
        ids, attended = (x.to(self.device) for x in padded(prompts, self.decoding.padding, left=True))
        logits = self._forward(ids, attended, cache)
        length = len(prompts[-1])
        last = rows_of.select(cache, torch.tensor([len(prompts) - 1]), length)
        self.last_read = _Read(prompts[-1], last, attended[-1:, -length:], logits[-1:])
        return _Read(prompts[-1], cache, attended, logits)

    @torch.no_grad()
    def advance(self) -> int:
        """Draws the next tokens of all completions, and returns how many of each."""
        left = self.sampling.max_new_tokens - max(len(completion.ids) for completion in self.completions)
        steps = min(_STEPS, left)
        uniform = self._uniform(self.completions, steps)
        drawn, logprobs = [], []
        for step in range(steps):
            self.attended = functional.pad(self.attended, (0, 1), value=True)
            logits = self._forward(self.last[:, None], self.attended, self.cache)
            self.last, logprob = self._draw(logits, uniform[:, step], self.seen)
            drawn.append(self.last)
            logprobs.append(logprob)
        self._take(self.completions, torch.stack(drawn, dim=1), torch.stack(logprobs, dim=1))
        return steps

    @torch.no_grad()
    def drop_finished(self) -> list[Completion]:
        """Takes the completions that are done out of the batch, and with them the columns that only they attend to."""
        most = self.sampling.max_new_tokens
        done = [completion.ended or len(completion.ids) == most for completion in self.completions]
        finished = [completion for completion, is_done in zip(self.completions, done, strict=True) if is_done]
        if finished:
            self.completions = [c for c, is_done in zip(self.completions, done, strict=True) if not is_done]
            if not self.completions:
                self.cache = None
                return finished
            rows = torch.tensor([i for i, is_done in enumerate(done) if not is_done], device=self.device)
            columns = max(len(c.prompt) + len(c.ids) for c in self.completions) - 1
            self.cache = rows_of.select(self.cache, rows, columns)
            self.attended, self.last = self.attended[rows, -columns:], self.last[rows]
            self.seen = None if self.seen is None else self.seen[rows]
        return finished

    def _forward(self, ids: Tensor, attended: Tensor, cache: Any) -> Tensor:
        """The logits after the last of the tokens, (rows, V)."""
        optional: dict[str, Any] = {}
        if self.accepts_positions:
            optional["position_ids"] = (attended.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        if self.accepts_keep:
            optional["logits_to_keep"] = 1
        with self.decoding.computing():
            output = self.model(
                input_ids=ids, attention_mask=attended.long(), past_key_values=cache, use_cache=True, **optional
            )
        return output.logits[:, -1]

    def _draw(self, logits: Tensor, uniform: Tensor, seen: Tensor | None) -> tuple[Tensor, Tensor]:
        """The next tokens, and their log-probabilities at temperature 1."""
        drawn, largest = draw(logits, self.sampling, uniform, seen)
        self.largest = largest
        if seen is not None:
            seen.scatter_(1, drawn[:, None], True)
        logprob = token_stats(logits, drawn).logprob
        assert logprob is not None
        return drawn, logprob

    def _uniform(self, completions: Sequence[Completion], steps: int) -> Tensor:
        numbers = [[completion.uniform.random() for _ in range(steps)] for completion in completions]
        return torch.tensor(numbers, dtype=torch.float64).to(self.device)

    def _take(self, completions: Sequence[Completion], drawn: Tensor, logprobs: Tensor) -> None:
        # A NaN among the logits stays in the cache, so that it is enough to look at the last ones.
        if not bool(self.largest.isfinite().all()):
            raise UsageError("the model's logits are not finite: it has diverged, lower the learning rate")
        for completion, ids, of_ids in zip(completions, drawn.tolist(), logprobs.tolist(), strict=True):
            completion.extend(ids, self.decoding.stops, of_ids)


def _widened(mask: Tensor, columns: int) -> Tensor:
    return functional.pad(mask, (columns - mask.shape[1], 0))
