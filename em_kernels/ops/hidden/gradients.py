"""The gradients of hidden states, weight and bias, summed over chunks from each chunk's gradient of the logits.

The gradients of weight and bias are summed in float32 over all chunks and rounded once, and so is each row of hidden's.
The first chunk writes a sum and the others add to it: the weight's, which may be gigabytes, is never cleared, and what
it is divided by is in the logits' gradient already. The narrow copy of it is allocated when the chunks' memory is free.

With a tolerance, a row all of whose entries of the logits' gradient are no larger than it is left out of both matmuls,
and so is a column that is so in all rows of its chunk; the rest is gathered. The size of the rest has to be known, on a
GPU at the price of a synchronisation a chunk. Single columns rather than groups of them are left out: in 512 tokens of
a real model's own completions at temperature 0.5, entries above 1e-6 lie in 6 % of the columns, but in 79 % of the
groups of 64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.ops import sharded
from em_kernels.ops.hidden import matmul
from em_kernels.ops.hidden.head import Head
from em_kernels.ops.hidden.kept import KeptRows, first_set
from em_kernels.ops.types import Needs, statistics_dtype

# Measured on the CPU, 640 tokens of SmolLM2-135M's head: with a tenth of the columns the two matmuls take 0.15 of their
# time, gathers included, with half 0.53, with three quarters 0.79. A GPU's gathers cost more of its matmuls' time.
_LARGEST_SHARE_WORTH_COMPACTING = 0.5
# The most that is gathered at a time of the gradient, of the weight, and of the weight's gradient each.
GATHERED_BYTES = 32 << 20


class Gradients(NamedTuple):
    """The gradient of each operand; an empty tensor where none is needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def allocate(hidden: Tensor, weight: Tensor, needs: Needs) -> "Gradients":
        dtype = _result_dtype(hidden)
        return Gradients(
            hidden.new_empty(hidden.shape if needs.hidden else (0,), dtype=dtype),
            weight.new_empty(weight.shape if needs.weight else (0,), dtype=dtype),
            weight.new_empty(weight.shape[0] if needs.bias else 0, dtype=dtype),
        )


class Totals:
    """The gradients as they are summed over the chunks.

    Args:
        hidden, head: the operands, the rows of hidden that go into the matmuls.
        needs: which of them need a gradient.
        one_chunk: whether all rows are in one chunk.
        tolerance: entries of the logits' gradient up to it may be left out; None leaves out nothing.
        group: the ranks that hold the other rows of the weight, '' for none.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        needs: Needs,
        *,
        one_chunk: bool,
        tolerance: Tensor | None = None,
        group: str = "",
    ) -> None:
        self.head, self.needs, self.tolerance, self.group = head, needs, tolerance, group
        self.dtype, summed = _result_dtype(hidden), statistics_dtype(hidden.dtype)
        # Over ranks the gradient of the hidden states is a sum, too.
        self.hidden_total = hidden.new_empty(hidden.shape if needs.hidden else 0, dtype=summed if group else self.dtype)
        # One chunk's product may be the gradient itself.
        self.weight_dtype = self.dtype if one_chunk and matmul.rounds_once(head.weight) else summed
        self.weight_total: Tensor | None = None
        self.bias_total: Tensor | None = None

    def add(self, index: slice, h: Tensor, gradient: Tensor) -> None:
        """Adds a chunk: its rows, their hidden states, and the gradient of their logits."""
        if self.needs.bias:
            of_chunk = gradient.sum(dim=0, dtype=statistics_dtype(gradient.dtype))
            self.bias_total = of_chunk if self.bias_total is None else self.bias_total.add_(of_chunk)
        if not (self.needs.hidden or self.needs.weight):
            return
        active = None if self.tolerance is None else _active(gradient, self.tolerance)
        if active is not None:
            self._add_active(index, h, gradient, *active)
            return
        if self.needs.hidden:
            matmul.product(gradient, self.head.weight, self.hidden_total[index])
        if self.needs.weight:
            is_first = self.weight_total is None
            total = self._new_weight_total() if self.weight_total is None else self.weight_total
            matmul.transposed_product(gradient, h, total, add=not is_first)
            self.weight_total = total

    def finish(self, rows: KeptRows, scale: Tensor | None) -> Gradients:
        """The gradients times the scale, if there is one, summed over ranks, of all rows, and in their own dtypes."""
        weight, needs = self.head.weight, self.needs
        if needs.hidden and self.group:
            sharded.sum_over_ranks_(self.hidden_total, self.group)
        # Without a chunk there is no sum.
        if self.weight_total is None:
            self.weight_total = weight.new_zeros(weight.shape if needs.weight else 0, dtype=self.dtype)
        if self.bias_total is None:
            self.bias_total = weight.new_zeros(len(weight) if needs.bias else 0, dtype=self.dtype)
        totals = (self.hidden_total, self.weight_total, self.bias_total)
        if scale is not None:
            for total in totals:
                total.mul_(scale)
        hidden, weight, bias = (total.to(self.dtype) for total in totals)
        return Gradients(rows.among_all(hidden, 0) if needs.hidden else hidden, weight, bias)

    def _new_weight_total(self) -> Tensor:
        return torch.empty_like(self.head.weight, dtype=self.weight_dtype, memory_format=torch.contiguous_format)

    def _add_active(self, index: slice, h: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor) -> None:
        h = h[rows]
        product = h.new_zeros(h.shape, dtype=statistics_dtype(h.dtype))
        if self.needs.weight and self.weight_total is None:
            self.weight_total = self._new_weight_total().zero_()
        # No more at a time than a quarter of the chunk's logits, however small a chunk was asked for.
        gathered = min(GATHERED_BYTES, gradient.numel() * gradient.element_size() // 4)
        for part in columns.split(max(1, gathered // (4 * max(*h.shape, 1)))):
            block = gradient[rows.unsqueeze(-1), part]
            if self.needs.hidden:
                weight = self.head.weight[part]
                of_part = torch.empty_like(product)
                matmul.product(block, weight, of_part)
                product += of_part
            if self.weight_total is not None:
                total = self.weight_total[part]
                matmul.transposed_product(block, h, total, add=True)
                self.weight_total[part] = total
        if self.needs.hidden:
            of_chunk = self.hidden_total[index].zero_()
            of_chunk[rows] = product.to(of_chunk.dtype)


def _result_dtype(hidden: Tensor) -> torch.dtype:
    """float32 for float16, in which a mean's gradient underflows until a loss scale has multiplied it."""
    return torch.float32 if hidden.dtype == torch.float16 else hidden.dtype


def _active(gradient: Tensor, tolerance: Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows and columns with an entry above the tolerance or NaN; None where they are too many to leave any out."""
    if gradient.numel() == 0:
        return None
    # The gradient is rounded, and what was above the tolerance before must not be left out. A number of at least x is
    # rounded to at least x (1 - eps / 2), or among subnormal numbers, x less half of the smallest of them.
    limits = torch.finfo(gradient.dtype)
    tolerance = tolerance * (1 - limits.eps) - limits.smallest_normal * limits.eps
    rows, columns = (~_within(gradient, dim, tolerance) for dim in (1, 0))
    # Both counts in one transfer; nonzero() would wait for the device once more each.
    row_count, column_count = torch.stack((rows.sum(), columns.sum())).tolist()
    if row_count * column_count > _LARGEST_SHARE_WORTH_COMPACTING * gradient.numel():
        return None
    return first_set(rows, row_count), first_set(columns, column_count)


def _within(gradient: Tensor, dim: int, tolerance: Tensor) -> Tensor:
    # The two extremes need no |gradient| in memory; on the CPU they take a seventh of torch.aminmax's time. The
    # comparison is in float32, because one in 16 bits rounds the tolerance.
    lowest, highest = (x.to(statistics_dtype(x.dtype)) for x in (gradient.amin(dim), gradient.amax(dim)))
    return (lowest >= -tolerance) & (highest <= tolerance)
