"""The loss of one optimiser step and its gradient: the mean entropy of every token that was generated for the step.

With H_t the entropy of softmax(logits_t / temperature), the distribution that token t was drawn from, and N the number
of generated tokens in all completions of the step, on all processes, the loss is (1/N) sum_t H_t.
"""

import math

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from em_kernels import entropy_loss, linear_entropy_loss, linear_token_entropy, token_entropy
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.metrics import DECIDED, StepStats
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.scoring import set_scoring_mode
from em_kernels.one_shot.sharding import micro_batch


def accumulate_gradient(
    accelerator: Accelerator,
    policy: Policy,
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int,
    show_progress: bool = False,
) -> StepStats:
    """Adds the gradient of the step's loss to the parameters, the same for any micro-batch size and process count.

    Args:
        accelerator: the Accelerator that prepared the policy's model.
        policy: the policy; the loss is taken inside its head, on hidden states, or on logits if it has no head.
        rollout: the completions of this process. Every process has the same number of completions.
        temperature: the temperature of the loss.
        micro_batch_size: completions per forward and backward pass.
        show_progress: whether to show a progress bar over the micro-batches.

    Raises:
        UsageError: the loss is not finite.
    """
    set_scoring_mode(policy.model)
    tokens = accelerator.reduce(rollout.completion_mask.sum(), "sum")
    # Gradients are averaged over processes, not summed, so the divisor is one process's share of the tokens.
    share = tokens / accelerator.num_processes
    sums = torch.zeros(3, device=rollout.input_ids.device)
    # Counted before the first forward pass, so that the host waits for the device here and in no micro-batch.
    parts = [(part, int(part.completion_mask.sum())) for part in rollout.micro_batches(micro_batch_size)]
    for i, (part, count) in enumerate(
        tqdm(parts, desc="training", unit="micro-batch", leave=False, disable=not show_progress)
    ):
        with micro_batch(accelerator, policy.prepared, last=i == len(parts) - 1) as backward:
            loss, *others = _loss(policy, part, count, temperature, share)
            backward(loss)
            sums += torch.stack([loss.detach(), *others])
            # The logits of one micro-batch, which the loss holds, are freed before the next are made.
            del loss
    loss, entropy, decided = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss}: the model has diverged, lower the learning rate")
    total = int(tokens)
    return StepStats(loss / accelerator.num_processes, entropy / total, decided / total, total)


def _loss(
    policy: Policy, part: Rollout, count: int, temperature: float, share: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, sum of entropies and number of decided tokens of a micro-batch of `count` generated tokens."""
    mask, head = part.completion_mask, policy.head
    if head is None:
        with policy.computing():
            logits = policy.completion_logits(part)
            entropy = token_entropy(logits, mask=mask)
            loss = entropy_loss(logits, mask, temperature=temperature, num_items_in_batch=share, inplace_backward=True)
    else:
        made: list[Tensor] = []

        def loss_of(hidden: Tensor) -> Tensor:
            made.append(linear_token_entropy(hidden, mask=mask, token_count=count, **head.arguments(1.0)))
            return linear_entropy_loss(
                hidden, mask=mask, token_count=count, num_items_in_batch=share, **head.arguments(temperature)
            )

        loss = policy.inside_head(part, loss_of)
        entropy = made[0]
    return loss, entropy.sum(), ((entropy < DECIDED) & mask).sum()
