"""The definition, in float64, slow and obvious: what every other implementation is tested against.

With y = z / tau and p = softmax(y), for one row of logits z:

    lse = log sum exp y      log p_j = y_j - lse      H = -sum p_j log p_j      V = sum p_j (log p_j + H)^2

A logit of -inf has p = 0 and contributes 0, the limit of p log p. Differentiable by autograd, to any order.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RowStatistics(NamedTuple):
    entropy: Tensor
    lse: Tensor
    logprob: Tensor | None
    varentropy: Tensor


class ExtraStatistics(NamedTuple):
    max_prob: Tensor
    top1: Tensor | None
    mean_logprob: Tensor
    collision: Tensor


def row_statistics(logits: Tensor, target: Tensor | None = None, *, temperature: float | Tensor = 1.0) -> RowStatistics:
    """Statistics of softmax(logits / temperature) along the last dimension, in float64."""
    z = logits.double()
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(-1)
    # Moving a row changes only lse; without it, lse - y would cancel. NaN for a row of all -inf or with +inf.
    largest = z.detach().amax(dim=-1, keepdim=True)
    y = (z - largest) / temperature
    logp = y - y.logsumexp(dim=-1, keepdim=True)
    p = logp.exp()
    logprob = None if target is None else logp.gather(-1, target.long().unsqueeze(-1)).squeeze(-1)
    lse = (y.logsumexp(dim=-1, keepdim=True) + largest / temperature).squeeze(-1)
    # The where precedes the product: autograd would otherwise meet 0 * inf behind a where that comes after it.
    logp = torch.where(y == -torch.inf, 0.0, logp)
    entropy = -(p * logp).sum(dim=-1)
    varentropy = (p * (logp + entropy.unsqueeze(-1)) ** 2).sum(dim=-1)
    return RowStatistics(entropy, lse, logprob, varentropy)


def extra_statistics(
    logits: Tensor, target: Tensor | None = None, *, temperature: float | Tensor = 1.0
) -> ExtraStatistics:
    """max p_j, whether the target's logit is the largest, sum_j log p_j / V and sum_j p_j^2, in float64."""
    z = logits.double()
    if isinstance(temperature, Tensor):
        temperature = temperature.double().unsqueeze(-1)
    logp = (z / temperature).log_softmax(dim=-1)
    p = logp.exp()
    top1 = None
    if target is not None:
        is_largest = z.gather(-1, target.long().unsqueeze(-1)).squeeze(-1) == z.amax(dim=-1)
        top1 = torch.where(p.sum(dim=-1).isnan(), torch.nan, is_largest.double())
    return ExtraStatistics(p.amax(dim=-1), top1, logp.mean(dim=-1), p.square().sum(dim=-1))


def entropy_loss(
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_items_in_batch: float | None = None,
) -> Tensor:
    """The entropy of softmax(logits / temperature), weighted by mask and reduced, in float64."""
    weight = torch.ones(logits.shape[:-1], dtype=torch.float64) if mask is None else mask.double()
    if mask is not None and not mask.is_floating_point():
        weight = (mask != 0).double()
    counted = weight != 0
    readable = torch.where(counted.unsqueeze(-1), logits.double(), 0.0)
    weighted = weight * row_statistics(readable, temperature=temperature).entropy
    if reduction == "none":
        return weighted
    divisor = 1.0 if reduction == "sum" else weight.sum() if num_items_in_batch is None else num_items_in_batch
    return weighted.sum() / divisor if divisor != 0 else weighted.sum()
