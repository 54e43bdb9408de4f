"""What the losses make of the rows' entropies: their weighted mean, their sum, or the entropies themselves."""

import torch
from torch import Tensor

from em_kernels.arguments.checks import as_integer, values_visible
from em_kernels.arguments.tokens import Source, Tokens
from em_kernels.ops.types import Divisor

_REDUCTIONS = ("mean", "sum", "none")


def divisor_of(reduction: str, num_items: int | Tensor | None, tokens: Tokens, source: Source) -> Divisor:
    """The divisor of "mean", num_items_in_batch or where that is None, the sum of the weights; 1 of the others."""
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(map(repr, _REDUCTIONS))}")
    if num_items is not None:
        if reduction != "mean":
            raise ValueError(
                f"num_items_in_batch is the divisor of reduction='mean', given with reduction={reduction!r}"
            )
        return _given_divisor(num_items, source)
    if reduction != "mean":
        return Divisor()
    if tokens.token_weight is not None:
        return Divisor(of_weights=True)
    return Divisor(number=_at_least_1(tokens.shape.numel()))


def reduced(entropy: Tensor, reduction: str, divisor: Divisor, tokens: Tokens) -> Tensor:
    """The loss of the rows' entropies, which are 0 where masked; of the tokens' shape with "none"."""
    weight = tokens.token_weight
    if reduction != "none":
        return divisor.reduced(entropy, weight)
    return (entropy if weight is None or weight.dtype == torch.bool else entropy * weight).view(tokens.shape)


def _given_divisor(num_items: int | Tensor, source: Source) -> Divisor:
    expected = "an int or a tensor of one element"
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items_in_batch has shape {tuple(num_items.shape)}, expected {expected}")
        if values_visible(num_items) and num_items.item() < 0:
            raise ValueError(f"num_items_in_batch is {num_items.item()}, expected at least 0")
        total = num_items.detach().reshape(()).to(source.tensor.device, source.dtype, non_blocking=True)
        return Divisor(total.resolve_neg())
    count = as_integer("num_items_in_batch", num_items, expected)
    if count < 0:
        raise ValueError(f"num_items_in_batch is {count}, expected at least 0")
    return Divisor(number=_at_least_1(count))


def _at_least_1(count: int) -> int:
    # `count or 1` would ask torch.compile for a truth that a count it does not know has none of.
    return count if count != 0 else 1
