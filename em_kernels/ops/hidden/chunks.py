"""The chunks of tokens, and the one piece of memory that each chunk's logits are made in.

Masked rows are left out of the matmuls where the host can see the mask, on the CPU. Elsewhere to know their number
would be a synchronisation, and shapes that depend on it could not be captured in a graph: the matmuls run at full size,
over zeros in the masked rows, which the kernels do not read.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from em_kernels.ops import types
from em_kernels.ops.hidden import matmul
from em_kernels.ops.hidden.head import Head
from em_kernels.ops.types import RowIndex

# Rows of a chunk are a multiple of this where there are as many: the tiles of matmul kernels.
ROWS = 128
# A row of the scratch starts at a multiple of this many elements, so that matmul kernels find it aligned.
_ALIGNED = 64


class Chunks:
    """An iteration over (rows, hidden states) of a chunk at a time, the masked rows left out or 0."""

    def __init__(self, hidden: Tensor, head: Head, kept: Tensor | None, chunk_size: int) -> None:
        self.hidden, self.head, self.kept = hidden, head, kept
        self.rows = kept.nonzero().squeeze(-1) if kept is not None and types.host_sees(kept) else None
        self.count = len(hidden) if self.rows is None else len(self.rows)
        # Equal chunks rather than a small last one.
        size = -(-self.count // max(1, -(-self.count // chunk_size)))
        whole = -(-size // ROWS) * ROWS
        self.size = max(1, min(whole, self.count) if whole <= chunk_size else size)
        self._logits: Tensor | None = None
        self._slope: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[RowIndex, Tensor]]:
        for start in range(0, self.count, self.size):
            if self.rows is not None:
                index: RowIndex = self.rows[start : start + self.size]
                yield index, self.hidden[index]
                continue
            index = slice(start, min(start + self.size, self.count))
            h = self.hidden[index]
            # Garbage times a gradient of 0 would be NaN in the gradient of the weight.
            yield index, h if self.kept is None else h.masked_fill(~self.kept[index].unsqueeze(-1), 0)

    def logits(self, h: Tensor, *, with_slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """A chunk's logits, and the derivative of the softcap where there is one; the next chunk overwrites both."""
        weight, bias, softcap, dtype = self.head
        vocab = len(weight)
        if self._logits is None:
            self._logits = h.new_empty(self.size, -(-vocab // _ALIGNED) * _ALIGNED, dtype=dtype)
        z = self._logits[: len(h), :vocab]
        matmul.project(h, weight, bias, out=z)
        if softcap is None:
            return z, None
        torch.tanh(z.div_(softcap), out=z)
        slope = None
        if with_slope:
            if self._slope is None:
                self._slope = torch.empty_like(self._logits)
            slope = torch.mul(z, z, out=self._slope[: len(h), :vocab]).neg_().add_(1)
        return z.mul_(softcap), slope
