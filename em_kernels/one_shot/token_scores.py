"""Statistics of the tokens of completions under a policy at temperature 1: entropy, log-probability and more."""

import torch
from torch import Tensor

from em_kernels import OutputHead, TokenStats, linear_token_stats, token_stats
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.scoring import set_scoring_mode


@torch.no_grad()
def score_tokens(policy: Policy, rollout: Rollout) -> TokenStats:
    """The statistics of each token of the completions: (batch, completion), 0 on padding.

    Every process of a sharded model has to make the call.
    """
    set_scoring_mode(policy.model)
    head = policy.head
    if head is None:
        with policy.computing():
            return statistics_of_logits(policy.completion_logits(rollout), rollout)
    made: list[TokenStats] = []

    def observe(hidden: Tensor) -> Tensor:
        made.append(statistics_in_head(head, hidden, rollout, int(rollout.completion_mask.sum())))
        return hidden.new_zeros(())

    policy.inside_head(rollout, observe)
    return made[0]


@torch.no_grad()
def statistics_of_logits(logits: Tensor, rollout: Rollout) -> TokenStats:
    """The same of the logits that the tokens were drawn from."""
    return token_stats(logits, _targets(rollout), mask=rollout.completion_mask)


@torch.no_grad()
def statistics_in_head(head: OutputHead, hidden: Tensor, rollout: Rollout, count: int) -> TokenStats:
    """The same of the hidden states that the head makes those logits of, for completions of `count` tokens in all."""
    mask = rollout.completion_mask
    return linear_token_stats(hidden, target=_targets(rollout), mask=mask, token_count=count, **head.arguments(1.0))


def _targets(rollout: Rollout) -> Tensor:
    return rollout.input_ids[:, -rollout.completion_mask.shape[1] :]
