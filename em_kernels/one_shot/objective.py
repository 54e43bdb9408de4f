"""The loss of one optimiser step and its gradient: the mean entropy of every token that was generated for the step.

With H_t the entropy of softmax(logits_t / temperature), the distribution that token t was drawn from, and N the number
of generated tokens in all completions of the step, on all processes, the loss is (1/N) sum_t H_t.
"""

import contextlib
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
        policy: the policy; the loss is taken on hidden states if the policy has a head, and on logits otherwise.
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
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(policy.prepared):
            sums += _backward(policy, part, count, temperature, share)
    loss, entropy, decided = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss}: the model has diverged, lower the learning rate")
    total = int(tokens)
    return StepStats(loss / accelerator.num_processes, entropy / total, decided / total, total)


def _backward(policy: Policy, part: Rollout, count: int, temperature: float, share: Tensor) -> Tensor:
    """Runs the backward pass of one micro-batch, which has `count` generated tokens.

    Returns its loss, sum of entropies and number of decided tokens.

    The logits are local to the call, so that those of one micro-batch are freed before the next are made.
    """
    mask = part.completion_mask
    with policy.computing():
        if policy.head is None:
            logits = policy.completion_logits(part)
            entropy = token_entropy(logits, mask=mask)
            loss = entropy_loss(logits, mask, temperature=temperature, num_items_in_batch=share, inplace_backward=True)
        else:
            hidden = policy.completion_hidden(part)
            entropy = linear_token_entropy(hidden, mask=mask, token_count=count, **policy.head.arguments(1.0))
            loss = linear_entropy_loss(
                hidden,
                mask=mask,
                token_count=count,
                num_items_in_batch=share,
                **policy.head.arguments(temperature),
            )
    loss.backward()
    return torch.stack([loss.detach(), entropy.sum(), ((entropy < DECIDED) & mask).sum()])
