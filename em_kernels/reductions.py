"""What the losses make of the rows' entropies: their weighted mean, sum, or the entropies themselves."""

import torch
from torch import Tensor

from em_kernels import inputs
from em_kernels.ops.operators import statistics_dtype

_REDUCTIONS = ("mean", "sum", "none")


def check_reduction(reduction: str, num_items: int | Tensor | None) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction is {reduction!r}, expected one of {', '.join(map(repr, _REDUCTIONS))}")
    if num_items is None:
        return
    if reduction != "mean":
        raise ValueError(f"num_items_in_batch is the divisor of reduction='mean', given with reduction={reduction!r}")
    if isinstance(num_items, Tensor):
        if num_items.dim() != 0:
            raise ValueError(f"num_items_in_batch has shape {tuple(num_items.shape)}, expected an int or a 0-d tensor")
        if inputs.values_visible(num_items) and num_items.item() < 0:
            raise ValueError(f"num_items_in_batch is {num_items.item()}, expected at least 0")
        return
    if isinstance(num_items, bool) or not isinstance(num_items, (int, torch.SymInt)):
        raise TypeError(f"num_items_in_batch is a {type(num_items).__name__}, expected an int or a 0-d tensor")
    if num_items < 0:
        raise ValueError(f"num_items_in_batch is {num_items}, expected at least 0")


def divisor_of(
    reduction: str, source: Tensor, weight: Tensor | None, num_items: int | Tensor | None
) -> tuple[Tensor | None, int]:
    """What the sum over source.shape[:-1] is divided by: a tensor that stays on the device, times a number."""
    if reduction != "mean":
        return None, 1
    dtype = statistics_dtype(source.dtype)
    if isinstance(num_items, Tensor):
        return num_items.detach().to(source.device, dtype, non_blocking=True), 1
    if num_items is None and weight is not None:
        return weight.sum(dtype=dtype), 1
    count = source.shape[:-1].numel() if num_items is None else num_items
    return None, count if count != 0 else 1


def reduce(
    entropy: Tensor, weight: Tensor | None, divisor: Tensor | None, count: int, reduction: str, shape: torch.Size
) -> Tensor:
    """The loss of the rows' entropies, which are 0 where masked; of `shape` with "none". A divisor of 0 counts as 1."""
    if weight is not None and weight.is_floating_point():
        entropy = entropy * weight
    if reduction == "none":
        return entropy.view(shape)
    loss = entropy.sum() / count
    return loss if divisor is None else loss / torch.where(divisor == 0, 1, divisor)
