"""How much of a row a program takes: the sizes of blocks, and the reasons for them.

None of the numbers has been measured on a GPU yet; `benchmarks/tune_tiles.py` sweeps them.
"""

import functools
from typing import NamedTuple

import torch
import triton
from torch import Tensor

from em_kernels.ops.backends.triton.addressing import VECTOR_BYTES, misaligned
from em_kernels.ops.types import row_count

THREADS_PER_WARP = 64 if torch.version.hip else 32
# Few threads of many elements each: what a program does once is then little beside its elements.
THREADS = 128
# A block is at most 32 KB, 16 loads of a thread that are under way at once; where a kernel loops over blocks, 8. Five
# programs a multiprocessor have 160 KB under way at most. Little's law asks for 32 KB at 4.8 TB/s and a latency of 900
# ns, and a program has loads under way for about a quarter of its time.
LARGEST_FUSED, LARGEST_STREAMED = 16, 8
# Registers of a thread so that five programs of 128 threads share the 65,536 of a multiprocessor; or three, for a block
# with more to do.
_REGISTERS, _MORE_REGISTERS = 96, 168
# Splits of a row are united by one program from one vector of this many parts: about one a multiprocessor.
MAX_SPLITS = 128
# Programs per multiprocessor that keep enough loads in flight; fewer rows than this are split.
PROGRAMS_PER_MULTIPROCESSOR = 4


class Block(NamedTuple):
    """What a program loads at once: `unroll` tiles of 16 bytes a thread, of rows of `width` elements.

    The width of a row that may begin anywhere between two boundaries includes what may lie before it.
    """

    unroll: int
    itemsize: int
    width: int

    @property
    def columns(self) -> int:
        return THREADS * self.unroll * (VECTOR_BYTES // self.itemsize)

    @property
    def a_row(self) -> int:
        """The number of blocks of a row."""
        return triton.cdiv(self.width, self.columns)

    def arguments(self) -> dict[str, int]:
        threads = {"LANES": THREADS, "num_warps": THREADS // THREADS_PER_WARP}
        return {"UNROLL": self.unroll, "VECTOR": VECTOR_BYTES // self.itemsize, **threads}


class Splits(NamedTuple):
    """How rows are split over programs: `a_row` splits of `blocks` blocks each, the last perhaps of fewer."""

    block: Block
    a_row: int
    blocks: int


def block_of(logits: Tensor, largest: int) -> Block:
    """The block of at most `largest` tiles for these logits."""
    return _best_block(
        logits.element_size(), width_of(logits), row_count(logits), multiprocessors(logits.device), largest
    )


@functools.lru_cache
def _best_block(itemsize: int, width: int, rows: int, multiprocessors: int, largest: int) -> Block:
    """The largest block that pads rows by no more than an eighth and gives every multiprocessor one."""
    smallest = Block(1, itemsize, width)
    for block in (Block(unroll, itemsize, width) for unroll in (16, 8, 4, 2) if unroll <= largest):
        is_padded = 8 * block.a_row * block.columns > 9 * smallest.a_row * smallest.columns
        if not is_padded and block.a_row * rows >= multiprocessors:
            return block
    return smallest


def width_of(logits: Tensor) -> int:
    before = 0 if misaligned(logits) is None else VECTOR_BYTES // logits.element_size() - 1
    return logits.shape[2] + before


def fused_block(logits: Tensor, out: Tensor, softcap: float | None) -> tuple[Block, int | None]:
    """The block of the fused kernel, and the registers that its threads may have; None leaves them to the compiler."""
    # The ends of misaligned rows, and stores of another width than the loads, are more code.
    is_simple = misaligned(logits) is None and out.dtype == logits.dtype
    block = block_of(logits, LARGEST_FUSED if is_simple else LARGEST_STREAMED)
    is_plain = is_simple and softcap is None and logits.dtype != torch.float16
    limit = _REGISTERS if is_plain else _MORE_REGISTERS
    return block, limit if limits_registers(logits.device) else None


def splits_of(logits: Tensor) -> Splits:
    block = block_of(logits, LARGEST_STREAMED)
    programs = triton.cdiv(PROGRAMS_PER_MULTIPROCESSOR * multiprocessors(logits.device), max(row_count(logits), 1))
    blocks = triton.cdiv(block.a_row, min(programs, MAX_SPLITS, block.a_row))
    return Splits(block, triton.cdiv(block.a_row, blocks), blocks)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    # The CPU, where kernels are interpreted, counts as few, so that small inputs take every path.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


@functools.cache
def limits_registers(device: torch.device) -> bool:
    # Triton takes a limit for NVIDIA's GPUs alone. On an sm_100 the compiler takes 100 registers without a limit, and
    # spills under one of 128.
    return torch.version.hip is None and (device.type != "cuda" or torch.cuda.get_device_capability(device)[0] < 10)
