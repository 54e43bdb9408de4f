"""The chunks of tokens, and the memory that each chunk's logits and their gradient are made in, one after another."""

from collections.abc import Iterator

from torch import Tensor

from em_kernels.ops.hidden import matmul
from em_kernels.ops.hidden.head import Head

# Rows and columns of the result that one multiprocessor makes at a time, in the kernels that cuBLAS takes for large
# bfloat16 matmuls on an H100, and the number of its multiprocessors. A constant, because ranks that share a vocabulary
# must cut the tokens alike.
_TILE_ROWS, _TILE_COLUMNS, _MULTIPROCESSORS = 128, 256, 132
# A row of the scratch starts at a multiple of this many elements, so that matmul kernels find it aligned.
_ALIGNED = 64


class Chunks:
    """An iteration over (rows, hidden states) of a chunk at a time."""

    def __init__(self, hidden: Tensor, head: Head, chunk_size: int) -> None:
        self.hidden, self.head = hidden, head
        self.size = rows_of_a_chunk(len(hidden), hidden.shape[1], chunk_size)
        self._logits: Tensor | None = None
        self._gradient: Tensor | None = None

    def __len__(self) -> int:
        return -(-len(self.hidden) // self.size)

    def __iter__(self) -> Iterator[tuple[slice, Tensor]]:
        for start in range(0, len(self.hidden), self.size):
            index = slice(start, min(start + self.size, len(self.hidden)))
            yield index, self.hidden[index]

    def logits(self, h: Tensor) -> Tensor:
        """A chunk's logits before the softcap; the next chunk overwrites them."""
        weight, bias, _, dtype = self.head
        if self._logits is None:
            self._logits = h.new_empty(self.size, padded(len(weight)), dtype=dtype)
        z = self._logits[: len(h), : len(weight)]
        matmul.project(h, weight, bias, out=z)
        return z

    def memory_for_gradient(self, z: Tensor) -> Tensor:
        """Where the gradient of a chunk's logits is to be written, in the dtype in which it enters the matmuls."""
        weight = self.head.weight
        dtype = matmul.gradient_dtype(weight, z.dtype)
        if dtype == z.dtype:
            return z
        if self._gradient is None:
            self._gradient = z.new_empty(self.size, padded(len(weight)), dtype=dtype)
        return self._gradient[: len(z), : len(weight)]


def rows_of_a_chunk(rows: int, dim: int, most: int) -> int:
    """How many rows a chunk has, the last one perhaps fewer: `most` at most, and about as many in each."""
    equal = -(-rows // max(1, -(-rows // most)))
    whole = (-(-equal // multiple) * multiple for multiple in _multiples(dim))
    return max(1, min(rows, next(size for size in whole if size <= most)))


def whole_tiles(rows: int, dim: int) -> int:
    """The largest number of rows up to `rows` that matmuls make without leaving multiprocessors idle."""
    return rows - rows % next(multiple for multiple in _multiples(dim) if multiple <= rows)


def _multiples(dim: int) -> tuple[int, int, int]:
    """The numbers of rows of which a chunk is to have a multiple, if it may: those of a wave, of a tile, any.

    The product that makes hidden's gradient, (rows, V) by (V, D), has few tiles, each of which takes the whole length
    of V: at 2,688 rows and D = 4096 they are 21 * 16 = 336, and 132 multiprocessors take three waves for what fills
    two and a half. A wave is of 8 * 128 = 1024 rows there. The other two products have V / 256 tiles for each 128 rows
    or columns: dozens of waves, of which the last one matters little.
    """
    tiles_in_a_wave = max(1, _MULTIPROCESSORS // -(-dim // _TILE_COLUMNS))
    return _TILE_ROWS * tiles_in_a_wave, _TILE_ROWS, 1


def padded(vocab: int) -> int:
    return -(-vocab // _ALIGNED) * _ALIGNED
