"""The chunks of tokens, and the memory that the logits and their gradient are made in, one chunk after another.

A chunk is what the gradients' matmuls take at a time. The more rows it has, the fewer times the sum that makes the
weight's gradient is read and written. Where the gradient of the logits has memory of its own, in 16 bits, the float32
logits are made in parts of a chunk, so that of each row of a chunk little more than that gradient is held.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from em_kernels.ops.hidden import matmul
from em_kernels.ops.hidden.head import Head

# Rows and columns of the result that one multiprocessor makes at a time, in the kernels that cuBLAS takes for large
# bfloat16 matmuls on an H100, and the number of its multiprocessors. A constant, because ranks that share a vocabulary
# must cut the tokens alike.
_TILE_ROWS, _TILE_COLUMNS, _MULTIPROCESSORS = 128, 256, 132
# A part is a quarter of a chunk, or so many rows: with fewer, the matmul that makes the logits waits for the weight.
_PARTS, _SMALLEST_PART = 4, 256
# A row of the scratch starts at a multiple of this many elements, so that matmul kernels find it aligned.
_ALIGNED = 64


class Chunks:
    """The rows of hidden states in chunks, and each chunk in parts, as slices.

    `in_parts` allows more than one part a chunk.
    """

    def __init__(self, hidden: Tensor, head: Head, chunk_size: int, *, in_parts: bool) -> None:
        self.hidden, self.head = hidden, head
        self.size = rows_of_a_chunk(len(hidden), hidden.shape[1], chunk_size)
        self.gradient_dtype = matmul.gradient_dtype(head.weight, head.logits_dtype)
        self.in_place = self.gradient_dtype == head.logits_dtype
        self.part_size = rows_of_a_part(self.size) if in_parts and not self.in_place else self.size
        self._logits: Tensor | None = None
        self._gradient: Tensor | None = None

    def __len__(self) -> int:
        return -(-len(self.hidden) // self.size)

    def __iter__(self) -> Iterator[slice]:
        return _slices(0, len(self.hidden), self.size)

    def parts(self, chunk: slice) -> Iterator[slice]:
        return _slices(chunk.start, chunk.stop, self.part_size)

    def logits(self, part: slice) -> Tensor:
        """The logits of a part before the softcap; those of the next part overwrite them."""
        weight, bias, _, _ = self.head
        z = self._memory_of_logits()[: part.stop - part.start, : len(weight)]
        matmul.project(self.hidden[part], weight, bias, out=z)
        return z

    def gradient(self, chunk: slice) -> Tensor:
        """The memory of the gradient of a chunk's logits: that of the logits, where the matmuls take their dtype."""
        if self._gradient is None:
            self._gradient = self._memory_of_logits() if self.in_place else self._memory(self.size, self.gradient_dtype)
        return self._gradient[: chunk.stop - chunk.start, : len(self.head.weight)]

    def _memory_of_logits(self) -> Tensor:
        if self._logits is None:
            self._logits = self._memory(self.part_size, self.head.logits_dtype)
        return self._logits

    def _memory(self, rows: int, dtype: torch.dtype) -> Tensor:
        return self.hidden.new_empty(rows, padded(len(self.head.weight)), dtype=dtype)


def rows_of_a_chunk(rows: int, dim: int, most: int) -> int:
    """How many rows a chunk has, the last one perhaps fewer: `most` at most, and about as many in each."""
    equal = -(-rows // max(1, -(-rows // most)))
    whole = (-(-equal // multiple) * multiple for multiple in _multiples(dim))
    return max(1, min(rows, next(size for size in whole if size <= most)))


def rows_of_a_part(rows: int) -> int:
    quarter = rows // _PARTS
    return min(rows, max(_SMALLEST_PART, quarter - quarter % _TILE_ROWS))


def rows_that_fit(scratch: int, vocab: int, dim: int, *, logits: int, gradient: int, product: int) -> int:
    """How many rows a chunk has at most, of whole tiles of the matmuls, for its memory to be within `scratch` bytes.

    `logits`, `gradient` and `product` are the bytes of a logit, of an entry of its gradient, 0 where it is made in the
    logits, and of an entry of the product that hidden's gradient is rounded from.
    """
    of_logits, of_row = padded(vocab) * logits, padded(vocab) * gradient + dim * product
    rows = scratch // (of_row + of_logits)
    if gradient > 0:
        quarters = scratch // (of_row + of_logits // _PARTS)
        smallest = (scratch - _SMALLEST_PART * of_logits) // of_row
        rows = quarters if quarters >= _PARTS * _SMALLEST_PART else max(rows, smallest)
    rows = max(1, rows)
    return rows - rows % next(multiple for multiple in _multiples(dim) if multiple <= rows)


def padded(vocab: int) -> int:
    return -(-vocab // _ALIGNED) * _ALIGNED


def _multiples(dim: int) -> tuple[int, int, int]:
    """The numbers of rows of which a chunk is to have a multiple, if it may: those of a wave, of a tile, any.

    The product that makes hidden's gradient, (rows, V) by (V, D), has few tiles, each of which takes the whole length
    of V: at 2,688 rows and D = 4096 they are 21 * 16 = 336, and 132 multiprocessors take three waves for what fills
    two and a half. A wave is of 8 * 128 = 1024 rows there. The other two products have V / 256 tiles for each 128 rows
    or columns: dozens of waves, of which the last one matters little.
    """
    tiles_in_a_wave = max(1, _MULTIPROCESSORS // -(-dim // _TILE_COLUMNS))
    return _TILE_ROWS * tiles_in_a_wave, _TILE_ROWS, 1


def _slices(start: int, stop: int, size: int) -> Iterator[slice]:
    return (slice(i, min(i + size, stop)) for i in range(start, stop, size))
