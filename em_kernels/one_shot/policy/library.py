"""Completions by Transformers' generate(), which knows every model's cache: a batch at a time, until all have ended."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)

from em_kernels.one_shot.policy.completion import Completion, Decoding, padded, seen_tokens
from em_kernels.one_shot.policy.sampling import Sampling, draw
from em_kernels.one_shot.policy.sharded import is_sharded
from em_kernels.one_shot.policy.stops import Stops


def complete_by_generate(decoding: Decoding, batch: Sequence[Completion], tick: Callable[[int], Any]) -> None:
    """Completes the batch.

    Args:
        decoding: the model and the settings.
        batch: completions without tokens.
        tick: called with the number of tokens that each completion has grown by.
    """
    model = decoding.model
    prompts = [completion.prompt for completion in batch]
    input_ids, attended = (tensor.to(model.device) for tensor in padded(prompts, decoding.padding, left=True))
    with torch.no_grad(), decoding.computing(), _bare_generation_settings(decoding):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=attended.long(),
            max_new_tokens=decoding.sampling.max_new_tokens,
            use_cache=True,
            do_sample=False,
            # The steps of a sharded model gather parameters, so every process takes as many as the slowest.
            synced_gpus=is_sharded(model),
            logits_processor=LogitsProcessorList([_Draw(decoding.sampling, batch)]),
            stopping_criteria=StoppingCriteriaList([_Progress(tick, decoding.stops, input_ids.shape[1])]),
        )
    for completion, ids in zip(batch, output[:, input_ids.shape[1] :].tolist(), strict=True):
        completion.extend(ids, decoding.stops)


@contextlib.contextmanager
def _bare_generation_settings(decoding: Decoding) -> Iterator[None]:
    """Replaces the model's generation settings, until the block ends, by ones that name the end tokens alone.

    Transformers takes whatever a call of generate() leaves unset from the model's settings, so arguments of the call
    alone would not do.
    """
    own = decoding.model.generation_config
    decoding.model.generation_config = GenerationConfig(
        eos_token_id=sorted(decoding.stops.tokens), pad_token_id=decoding.padding
    )
    try:
        yield
    finally:
        decoding.model.generation_config = own


class _Draw(LogitsProcessor):
    """Leaves each row the token that its own seed draws, which generate() then takes as the most likely."""

    def __init__(self, sampling: Sampling, batch: Sequence[Completion]) -> None:
        self.sampling, self.batch = sampling, batch
        self.seen: Tensor | None = None

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        if self.sampling.repetition_penalty != 1:
            if self.seen is None:
                prompts = [completion.prompt for completion in self.batch]
                self.seen = seen_tokens(prompts, scores.shape[1], scores.device)
            else:
                self.seen.scatter_(1, input_ids[:, -1:], True)
        uniform = torch.tensor([completion.uniform.random() for completion in self.batch], dtype=torch.float64)
        tokens, _ = draw(scores, self.sampling, uniform.to(scores.device), self.seen)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


class _Progress(StoppingCriteria):
    """Stops a row whose text ends it, and counts: generate() calls its stopping criteria once a token."""

    def __init__(self, tick: Callable[[int], Any], stops: Stops, prompt: int) -> None:
        self.tick, self.stops, self.prompt = tick, stops, prompt

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        self.tick(1)
        if not self.stops.texts:
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
        completions = input_ids[:, self.prompt :].tolist()
        ended = [self.stops.length(ids, len(ids) - 1) is not None for ids in completions]
        return torch.tensor(ended, device=input_ids.device)
