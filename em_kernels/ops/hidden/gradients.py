"""The gradients of hidden states, weight and bias, summed over chunks from each chunk's gradient of the logits.

The gradients of weight and bias are summed in float32 over all chunks and rounded once. Those of 16-bit hidden states
come from float32 products and are rounded once, too.

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
from em_kernels.ops.types import Needs, RowIndex, statistics_dtype

# Measured on the CPU, 640 tokens of SmolLM2-135M's head: with a tenth of the columns the two matmuls take 0.15 of their
# time, gathers included, with half 0.53, with three quarters 0.79. A GPU's gathers cost more of its matmuls' time.
_LARGEST_SHARE_WORTH_COMPACTING = 0.5
# The most that is gathered at a time of the gradient, of the weight, and of the weight's gradient each.
_GATHERED_BYTES = 32 << 20


class Gradients(NamedTuple):
    """The gradient of each operand; an empty tensor where none is needed."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor

    @staticmethod
    def allocate(hidden: Tensor, weight: Tensor, needs: Needs) -> "Gradients":
        """float32 for float16, in which a mean's gradient underflows until a loss scale has multiplied it."""
        dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
        return Gradients(
            hidden.new_empty(hidden.shape if needs.hidden else (0,), dtype=dtype),
            weight.new_empty(weight.shape if needs.weight else (0,), dtype=dtype),
            weight.new_empty(weight.shape[0] if needs.bias else 0, dtype=dtype),
        )


class Totals:
    """The gradients as they are summed over the chunks.

    Args:
        hidden, head: the operands.
        needs: which of them need a gradient.
        scale: what multiplies every gradient in the end; None for 1.
        tolerance: entries of the logits' gradient up to it may be left out; None leaves out nothing.
        group: the ranks that hold the other rows of the weight, '' for none.
    """

    def __init__(
        self,
        hidden: Tensor,
        head: Head,
        needs: Needs,
        *,
        scale: Tensor | None = None,
        tolerance: float | Tensor | None = None,
        group: str = "",
    ) -> None:
        self.head, self.needs, self.scale, self.tolerance, self.group = head, needs, scale, tolerance, group
        self.gradients = Gradients.allocate(hidden, head.weight, needs)
        for gradient in self.gradients:
            gradient.zero_()
        # Sums are made where they are returned, if that is not too narrow.
        summed = statistics_dtype(hidden.dtype)
        self.weight_total = self.gradients.weight.to(summed) if needs.weight else None
        self.bias_total = self.gradients.bias.to(summed) if needs.bias else None
        # Over ranks the gradient of the hidden states is a sum, too.
        self.hidden_total = self.gradients.hidden.to(summed) if group else self.gradients.hidden
        self._rounded: Tensor | None = None

    def add(self, index: RowIndex, h: Tensor, gradient: Tensor) -> None:
        """Adds a chunk: its rows' numbers, hidden states, and gradient of the logits, which is overwritten."""
        if self.bias_total is not None:
            self.bias_total += gradient.sum(dim=0, dtype=self.bias_total.dtype)
        if not (self.needs.hidden or self.needs.weight):
            return
        active = None if self.tolerance is None else _active(gradient, self.tolerance)
        if active is not None:
            self._add_active(index, h, gradient, *active)
            return
        if gradient.dtype != h.dtype:
            if self._rounded is None:
                self._rounded = torch.empty_like(gradient, dtype=h.dtype)
            gradient = self._rounded[: len(h)].copy_(gradient)
        if self.needs.hidden:
            self._put(index, matmul.float32_product(gradient, self.head.weight))
        if self.weight_total is not None:
            matmul.add_transposed_product(self.weight_total, gradient, h)

    def finish(self) -> Gradients:
        """The gradients, scaled, summed over ranks, and in their own dtypes."""
        if self.needs.hidden and self.group:
            sharded.sum_over_ranks_(self.hidden_total, self.group)
        totals = (self.hidden_total if self.needs.hidden else None, self.weight_total, self.bias_total)
        for total, gradient in zip(totals, self.gradients, strict=True):
            if total is None:
                continue
            # Each row of hidden's gradient has been scaled when its chunk was done.
            if self.scale is not None and total is not self.hidden_total:
                total.mul_(self.scale)
            if total is not gradient:
                gradient.copy_(total)
        return self.gradients

    def _add_active(self, index: RowIndex, h: Tensor, gradient: Tensor, rows: Tensor, columns: Tensor) -> None:
        h = h[rows]
        product = h.new_zeros(h.shape, dtype=statistics_dtype(h.dtype))
        # No more at a time than a quarter of the chunk's logits, however small a chunk was asked for.
        gathered = min(_GATHERED_BYTES, gradient.numel() * gradient.element_size() // 4)
        for part in columns.split(max(1, gathered // (4 * max(*h.shape, 1)))):
            block = gradient[rows.unsqueeze(-1), part].to(h.dtype)
            if self.needs.hidden:
                product += matmul.float32_product(block, self.head.weight[part])
            if self.weight_total is not None:
                total = self.weight_total[part]
                matmul.add_transposed_product(total, block, h)
                self.weight_total[part] = total
        if self.needs.hidden:
            self._put(index.start + rows if isinstance(index, slice) else index[rows], product)

    def _put(self, index: RowIndex, product: Tensor) -> None:
        self.hidden_total[index] = (product if self.scale is None else product.mul_(self.scale)).to(
            self.hidden_total.dtype
        )


def _active(gradient: Tensor, tolerance: float | Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows and columns with an entry above the tolerance or NaN; None where they are too many to leave any out."""
    if gradient.numel() == 0:
        return None
    rows, columns = (~_within(gradient, dim, tolerance) for dim in (1, 0))
    # Both counts in one transfer; nonzero() would wait for the device once more each.
    row_count, column_count = torch.stack((rows.sum(), columns.sum())).tolist()
    if row_count * column_count > _LARGEST_SHARE_WORTH_COMPACTING * gradient.numel():
        return None
    return _places(rows, row_count), _places(columns, column_count)


def _places(flags: Tensor, count: int) -> Tensor:
    """Where the `count` True flags are, in order."""
    return flags.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _within(gradient: Tensor, dim: int, tolerance: float | Tensor) -> Tensor:
    # The two extremes need no |gradient| in memory; on the CPU they take a seventh of torch.aminmax's time. The
    # comparison is in float32, because one in 16 bits rounds the tolerance.
    lowest, highest = (x.to(statistics_dtype(x.dtype)) for x in (gradient.amin(dim), gradient.amax(dim)))
    return (lowest >= -tolerance) & (highest <= tolerance)
