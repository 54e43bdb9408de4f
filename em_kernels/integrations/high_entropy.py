"""Which tokens have the highest entropy, over the ranks of a process group, without gathering the tokens.

The k-th highest entropy is found by bisection: as integers, the bit patterns of floats are in the order of the floats,
and 32 counts, each summed over the ranks, give the 32 bits of the threshold. Counts are int64, so that any number of
tokens is right. Tokens whose entropy is the threshold itself are taken in the order of ranks and places.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from em_kernels.arguments.checks import as_float

# The key of a masked token, below the key of every number.
_MASKED = -(2**31)


@torch.no_grad()
def high_entropy_mask(
    entropy: Tensor,
    mask: Tensor | None = None,
    *,
    share: float = 0.2,
    process_group: "dist.ProcessGroup | None" = None,
) -> Tensor:
    """Marks the share of the tokens with the highest entropy, for losses on these tokens alone (arXiv 2506.01939).

    Of n tokens that count, over all ranks, round(share n) are marked, and at least 1 where n is not 0.

    Args:
        entropy: (...), any float dtype; ranked in float32. A NaN ranks highest.
        mask: (...), bool, integer or float; 0 marks a token that does not count. None counts every token.
        share: in (0, 1].
        process_group: the ranks whose tokens are ranked together, each with tokens of its own, of any shape; every rank
            must call. None ranks this process's tokens alone.

    Returns:
        (...), bool.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    share = _share(share)
    if not entropy.is_floating_point():
        raise TypeError(f"entropy has dtype {entropy.dtype}, expected a float dtype")
    if mask is not None and mask.shape != entropy.shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}, expected that of entropy, {tuple(entropy.shape)}")
    keys = _ordered_integers(entropy)
    if mask is not None:
        keys = torch.where(mask != 0, keys, _MASKED)

    def count(chosen: Tensor) -> Tensor:
        number = chosen.sum()
        if process_group is not None:
            dist.all_reduce(number, group=process_group)
        return number

    tokens = count(keys != _MASKED)
    wanted = (tokens.double() * share).round().long().clamp(min=1).minimum(tokens)
    # The largest key that at least `wanted` tokens reach is built bit by bit, from the highest to the lowest.
    threshold = torch.full_like(tokens, _MASKED)
    for bit in reversed(range(32)):
        higher = threshold + (1 << bit)
        threshold = torch.where(count(keys >= higher) >= wanted, higher, threshold)
    above, ties = keys > threshold, keys == threshold
    left = wanted - count(above) - _on_lower_ranks(ties.sum(), process_group)
    return above | (ties & (ties.flatten().cumsum(0).view_as(ties) <= left))


def _ordered_integers(values: Tensor) -> Tensor:
    """int32, in the order of the values in float32; a NaN is the largest."""
    values = values.float()
    # Adding 0 makes 0 of -0, whose bits differ.
    bits = (torch.where(values.isnan(), torch.inf, values) + 0.0).view(torch.int32)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _on_lower_ranks(number: Tensor, process_group: "dist.ProcessGroup | None") -> Tensor | int:
    """The sum of a number over the ranks before this one."""
    if process_group is None:
        return 0
    rank = dist.get_rank(process_group)
    numbers_of_ranks = number.new_zeros(dist.get_world_size(process_group))
    numbers_of_ranks[rank] = number
    dist.all_reduce(numbers_of_ranks, group=process_group)
    return numbers_of_ranks[:rank].sum()


def _share(share: Any) -> float:
    number = as_float("share", share)
    if not 0 < number <= 1:
        raise ValueError(f"share is {number}, expected a number above 0 and at most 1")
    return number
