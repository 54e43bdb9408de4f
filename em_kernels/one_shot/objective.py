"""The loss of one optimiser step and its gradient: the mean entropy of every token that was generated for the step.

With H_t the entropy of softmax(logits_t / temperature), the distribution that token t was drawn from, and N the number
of generated tokens in all completions of the step, on all processes, the loss is (1/N) sum_t H_t. The average over
sequences is (1/B) sum_i (1/N_i) sum_t H_it in place of it, with B completions of N_i tokens.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor

from em_kernels import TokenStats, entropy_loss, linear_entropy_loss
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.metrics import DECIDED, StepStats
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.scoring import set_scoring_mode
from em_kernels.one_shot.progress import progress
from em_kernels.one_shot.sharding import micro_batch
from em_kernels.one_shot.token_scores import statistics_in_head, statistics_of_logits


def accumulate_gradient(
    accelerator: Accelerator,
    policy: Policy,
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int,
    average: str = "tokens",
    show_progress: bool = False,
) -> StepStats:
    """Adds the gradient of the step's loss to the parameters, the same for any micro-batch size and process count.

    Args:
        accelerator: the Accelerator that prepared the policy's model.
        policy: the policy; the loss is taken inside its head, on hidden states, or on logits if it has no head.
        rollout: the completions of this process. Every process has the same number of completions.
        temperature: the temperature of the loss.
        micro_batch_size: completions per forward and backward pass.
        average: "tokens" or "sequences": what the loss is a mean over.
        show_progress: whether to show progress over the micro-batches.

    Raises:
        UsageError: the loss is not finite.
    """
    set_scoring_mode(policy.model)
    tokens = accelerator.reduce(rollout.completion_mask.sum(), "sum")
    # Gradients are averaged over processes, not summed, so the divisor is one process's share of what is averaged over.
    of_one = tokens / accelerator.num_processes if average == "tokens" else tokens.new_tensor(len(rollout.input_ids))
    sums = torch.zeros(4, device=rollout.input_ids.device)
    # Counted before the first forward pass, so that the host waits for the device here and in no micro-batch.
    parts = [(part, int(part.completion_mask.sum())) for part in rollout.micro_batches(micro_batch_size)]
    with progress(len(parts), "training", "micro-batches", show=show_progress) as bar:
        for i, (part, count) in enumerate(parts):
            weights = part.completion_mask if average == "tokens" else _sequence_weights(part.completion_mask)
            with micro_batch(accelerator, policy.prepared, last=i == len(parts) - 1) as backward:
                loss, stats = _loss(policy, part, weights, count, temperature, of_one)
                backward(loss)
                sums += torch.stack([loss.detach(), *_sums(stats, part.completion_mask)])
                # The logits of one micro-batch, which the loss holds, are freed before the next are made.
                del loss
            bar.update(1)
    loss, entropy, decided, logprob = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss}: the model has diverged, lower the learning rate")
    total = int(tokens)
    return StepStats(loss / accelerator.num_processes, entropy / total, decided / total, logprob / total, total)


def _sequence_weights(mask: Tensor) -> Tensor:
    """The weight of each token where each completion has a weight of 1 in all."""
    return mask / mask.sum(1, keepdim=True).clamp(min=1)


def _loss(
    policy: Policy, part: Rollout, weights: Tensor, count: int, temperature: float, divisor: Tensor
) -> tuple[Tensor, TokenStats]:
    """The loss of a micro-batch of `count` generated tokens, and the statistics of its tokens at temperature 1."""
    head = policy.head
    if head is None:
        with policy.computing():
            logits = policy.completion_logits(part)
            stats = statistics_of_logits(logits, part)
            loss = entropy_loss(
                logits, weights, temperature=temperature, num_items_in_batch=divisor, inplace_backward=True
            )
        return loss, stats
    made: list[TokenStats] = []

    def loss_of(hidden: Tensor) -> Tensor:
        made.append(statistics_in_head(head, hidden, part, count))
        return linear_entropy_loss(
            hidden, mask=weights, token_count=count, num_items_in_batch=divisor, **head.arguments(temperature)
        )

    return policy.inside_head(part, loss_of), made[0]


def _sums(stats: TokenStats, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of entropies, the number of decided tokens and the sum of log-probabilities."""
    assert stats.logprob is not None
    return stats.entropy.sum(), ((stats.entropy < DECIDED) & mask).sum(), stats.logprob.sum()
