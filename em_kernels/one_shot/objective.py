"""The loss of one optimiser step and its gradient: the mean entropy of every token that was generated for it.

With H_t the entropy of softmax(logits_t / temperature), the distribution that token t was drawn from, and N the number
of generated tokens of all completions of the step, on all processes, the loss is (1/N) sum_t H_t.
"""

import contextlib
import inspect
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from em_kernels import entropy_loss, linear_entropy_loss, linear_token_stats, token_entropy
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.head import OutputHead
from em_kernels.one_shot.model import compute_in
from em_kernels.one_shot.rollout import Rollout

# In nats. A token with less has all but one in a thousand of its probability on one word of the vocabulary: it is
# decided, and gets next to no gradient.
DECIDED = 0.01


@dataclass(frozen=True)
class StepStats:
    """What a step did, over all processes.

    Attributes:
        loss: the mean entropy at the training temperature, in nats; what is minimised.
        entropy: the mean entropy at temperature 1, the model's own distribution, in nats.
        decided: the share of tokens whose entropy at temperature 1 is below 0.01 nats.
        tokens: the number of generated tokens.
    """

    loss: float
    entropy: float
    decided: float
    tokens: int


def accumulate_gradient(
    accelerator: Any,
    model: Any,
    rollout: Rollout,
    *,
    temperature: float,
    micro_batch_size: int,
    head: OutputHead | None = None,
    dtype: str = "float32",
    show_progress: bool = False,
) -> StepStats:
    """Adds the gradient of the step's loss to the parameters, the same for any micro-batch size and process count.

    Args:
        accelerator: the Accelerator that prepared `model`.
        model: the prepared model.
        rollout: this process's completions; as many on every process.
        temperature: of the loss.
        micro_batch_size: completions per forward and backward pass.
        head: the model's output projection, for the loss on hidden states; None takes the loss on logits.
        dtype: what the model computes in, "float32" or "bfloat16".
        show_progress: a bar over the micro-batches.

    Raises:
        UsageError: the loss is not finite.
    """
    set_mode(accelerator.unwrap_model(model))
    tokens = accelerator.reduce(rollout.completion_mask.sum(), "sum")
    # Gradients are averaged over processes, not summed, so the divisor is one process's share of the tokens.
    share = tokens / accelerator.num_processes
    sums = torch.zeros(3, device=rollout.input_ids.device)
    parts = list(rollout.micro_batches(micro_batch_size))
    for i, part in enumerate(tqdm(parts, desc="training", unit="micro-batch", leave=False, disable=not show_progress)):
        last = i == len(parts) - 1
        with contextlib.nullcontext() if last else accelerator.no_sync(model):
            sums += _backward(model, part, temperature, share, head, dtype)
    loss, entropy, decided = accelerator.reduce(sums, "sum").tolist()
    if not math.isfinite(loss):
        raise UsageError(f"the loss is {loss}: the model has diverged, lower the learning rate")
    count = int(tokens)
    return StepStats(loss / accelerator.num_processes, entropy / count, decided / count, count)


def _backward(
    model: Any, part: Rollout, temperature: float, share: Tensor, head: OutputHead | None, dtype: str
) -> Tensor:
    """One micro-batch: its loss, sum of entropies and count of decided tokens. What is large dies with the call."""
    mask = part.completion_mask
    with compute_in(dtype, part.input_ids.device):
        if head is None:
            logits = completion_logits(model, part)
            entropy = token_entropy(logits, mask=mask)[mask]
            loss = entropy_loss(logits, mask, temperature=temperature, num_items_in_batch=share, inplace_backward=True)
        else:
            hidden = completion_hidden(model, part, head)[mask]
            entropy = _entropy(hidden, head)
            loss = linear_entropy_loss(hidden, **head.arguments(temperature), num_items_in_batch=share)
    loss.backward()
    return torch.stack([loss.detach(), entropy.sum(), (entropy < DECIDED).sum()])


@torch.no_grad()
def _entropy(hidden: Tensor, head: OutputHead) -> Tensor:
    return linear_token_stats(hidden, **head.arguments(1.0)).entropy


def completion_logits(model: Any, rollout: Rollout) -> Tensor:
    """The logits each generated token was drawn from, those at the position before it: (batch, completion, V)."""
    return _forward(model, rollout).logits[:, -rollout.completion_mask.shape[1] :]


def completion_hidden(model: Any, rollout: Rollout, head: OutputHead) -> Tensor:
    """The hidden states that `completion_logits` are made of: (batch, completion, D)."""
    with head.bypassed() as given:
        _forward(model, rollout)
    return given[0][:, -rollout.completion_mask.shape[1] :]


def _forward(model: Any, rollout: Rollout) -> Any:
    # The last token predicts one that was never drawn. Without it, the last `length` positions are those wanted, the
    # prompt's last token, from which the first token was drawn, included.
    attention_mask = rollout.attention_mask[:, :-1]
    arguments = {
        "position_ids": (attention_mask.cumsum(1) - 1).clamp(min=0),
        "logits_to_keep": rollout.completion_mask.shape[1],
    }
    accepted = inspect.signature(getattr(model, "module", model).forward).parameters
    return model(
        input_ids=rollout.input_ids[:, :-1],
        attention_mask=attention_mask.long(),
        use_cache=False,
        **{name: value for name, value in arguments.items() if name in accepted},
    )


def set_mode(model: Any) -> None:
    """Without dropout, and with activation checkpointing where it is on."""
    # Not training mode: dropout would score another distribution than the one the tokens were drawn from.
    model.eval()
    for module in model.modules():
        # A layer only checkpoints if its own flag says training; the flags below it, which dropout looks at, stay.
        if getattr(module, "gradient_checkpointing", False):
            module.training = True
