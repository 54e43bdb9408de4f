"""A model's own completions, with the logits that each of their tokens was drawn from."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed

_PROMPTS_AT_ONCE = 32
_LOGITS_BYTES = 2**28


class Scored(NamedTuple):
    """Tokens that a model has generated, and what they were drawn from.

    Attributes:
        logits: (tokens, V) float32, the raw logits: before temperature, penalties and filters.
        ids: (tokens,), the tokens.
    """

    logits: Tensor
    ids: Tensor


@torch.no_grad()
def score_own_completions(
    policy: Policy, prompts: Sequence[str], sampling: Sampling, *, seed: int, description: str
) -> Iterator[Scored]:
    """Samples a completion of each prompt, and yields the generated tokens with their logits, some at a time.

    Raises:
        UsageError: a prompt cannot be put to the model.
    """
    policy.check(prompts, sampling.max_new_tokens)
    for start in range(0, len(prompts), _PROMPTS_AT_ONCE):
        batch = prompts[start : start + _PROMPTS_AT_ONCE]
        rollout = policy.sample(
            batch,
            sampling,
            seed=derive_seed(seed, start),
            description=f"{description}: prompts {start + 1} to {start + len(batch)} of {len(prompts)}",
        )
        row_bytes = 4 * rollout.completion_mask.shape[1] * policy.model.config.get_text_config().vocab_size
        for part in rollout.micro_batches(max(1, _LOGITS_BYTES // row_bytes)):
            logits = policy.completion_logits(part)[part.completion_mask]
            yield Scored(logits.float(), torch.cat(part.completion_ids()))
