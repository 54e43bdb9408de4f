"""The backend in Triton: the launchers, and which kernel serves which call.

    row_sums                `partial_sums_kernel`, with rows split over programs where rows are few: one read.
    row_statistics          the same, which finishes rows that are not split; `finish_kernel` finishes split ones.
    row_gradient            `coefficients_kernel`, `row_gradient_kernel`: one read, one write.
    entropy_with_gradient   `entropy_gradient_kernel`: one read and one write of device memory, and one more read of the
                            second-level cache. Without a gradient, `row_statistics` and a sum.
    scale_                  `scale_kernel`: one read of the factor, and where that is not 1, a read and a write of all.

All sums are float32, logits float32, bfloat16 or float16. Reductions have a fixed order: results repeat bit for bit.
"""

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from em_kernels.ops.backends.triton import statistics
from em_kernels.ops.backends.triton.loss import FIRST_ROW, entropy_gradient_kernel, scale_kernel
from em_kernels.ops.statistics import combine
from em_kernels.ops.types import Divisor, Saved, Statistics, Sums, Temperature, Upstream, Wanted, row_count

# A thread's load is 16 bytes, the widest there is.
_VECTOR_BYTES = 16
_THREADS_PER_WARP = 64 if torch.version.hip else 32
# Triton takes a limit on registers for NVIDIA's GPUs alone.
_LIMITS_REGISTERS = torch.version.hip is None
# Few threads of many elements each: what a program does once is then little beside its elements.
_THREADS = 128
# A block is at most 32 KB, 16 loads of a thread that are under way at once; where a kernel loops over blocks, 8. Five
# programs a multiprocessor have 160 KB under way at most. Little's law asks for 32 KB at 4.8 TB/s and a latency of 900
# ns, and a program has loads under way for about a quarter of its time.
_LARGEST_FUSED, _LARGEST_STREAMED = 16, 8
# Registers of a thread so that five programs of 128 threads share the 65,536 of a multiprocessor; or four, which a block
# with more to do needs.
_REGISTERS, _MORE_REGISTERS = 96, 128
# Splits of a row are united by one program from one vector of this many parts: about one a multiprocessor.
_MAX_SPLITS = 128
# Programs per multiprocessor that keep enough loads in flight; fewer rows than this are split.
_PROGRAMS_PER_MULTIPROCESSOR = 4
# What lies between the two readings of a row in the fused kernel. 132 multiprocessors of five programs have 21 MB under
# way, half of it sums; so the sums of a row were drawn, and nearly always done, long before its gradient asks for them.
# Together they are half of an H100's second-level cache.
_LAG_BYTES = 12 << 20
# Rows per program of the kernel that only does arithmetic per row.
_COEFFICIENT_BLOCK = 256


class _Block(NamedTuple):
    """What a program loads at once: `unroll` tiles of 16 bytes a thread, of rows of `width` elements.

    The width of a row that may begin anywhere between two boundaries includes what may lie before it.
    """

    unroll: int
    itemsize: int
    width: int

    @property
    def columns(self) -> int:
        return _THREADS * self.unroll * (_VECTOR_BYTES // self.itemsize)

    @property
    def a_row(self) -> int:
        """The number of blocks of a row."""
        return triton.cdiv(self.width, self.columns)

    def arguments(self) -> dict[str, int]:
        threads = {"LANES": _THREADS, "num_warps": _THREADS // _THREADS_PER_WARP}
        return {"UNROLL": self.unroll, "VECTOR": _VECTOR_BYTES // self.itemsize, **threads}


class _Splits(NamedTuple):
    """How rows are split over programs: `a_row` splits of `blocks` blocks each, the last perhaps of fewer."""

    block: _Block
    a_row: int
    blocks: int


def _block(logits: Tensor, largest: int) -> _Block:
    """The block of at most `largest` tiles for these logits."""
    return _best_block(
        logits.element_size(), _width(logits), row_count(logits), _multiprocessors(logits.device), largest
    )


@functools.lru_cache
def _best_block(itemsize: int, width: int, rows: int, multiprocessors: int, largest: int) -> _Block:
    """The largest block that pads rows by no more than an eighth and gives every multiprocessor one."""
    smallest = _Block(1, itemsize, width)
    for block in (_Block(unroll, itemsize, width) for unroll in (16, 8, 4, 2) if unroll <= largest):
        is_padded = 8 * block.a_row * block.columns > 9 * smallest.a_row * smallest.columns
        if not is_padded and block.a_row * rows >= multiprocessors:
            return block
    return smallest


def _width(logits: Tensor) -> int:
    before = 0 if _misaligned(logits) is None else _VECTOR_BYTES // logits.element_size() - 1
    return logits.shape[2] + before


def _fused(logits: Tensor, out: Tensor, softcap: float | None) -> tuple[_Block, int]:
    """The block of the fused kernel, and the registers that its threads may have."""
    # The ends of misaligned rows, and stores of another width than the loads, are more code.
    is_simple = _misaligned(logits) is None and out.dtype == logits.dtype
    block = _block(logits, _LARGEST_FUSED if is_simple else _LARGEST_STREAMED)
    is_plain = is_simple and softcap is None and logits.dtype != torch.float16
    return block, _REGISTERS if is_plain else _MORE_REGISTERS


def _splits(logits: Tensor) -> _Splits:
    block = _block(logits, _LARGEST_STREAMED)
    programs = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(logits.device), max(row_count(logits), 1))
    blocks = triton.cdiv(block.a_row, min(programs, _MAX_SPLITS, block.a_row))
    return _Splits(block, triton.cdiv(block.a_row, blocks), blocks)


def row_sums(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None = None,
) -> Sums:
    splits = _splits(logits)
    partials = _partials(logits, wanted, splits)
    _sum(logits, kept, temperature, target, wanted, softcap, splits, partials)
    fields = iter(partials)
    m, s, a = next(fields), next(fields), next(fields)
    b = next(fields) if wanted.second_moment else None
    parts = Sums(m, s, a, b, *fields)
    if partials.shape[1] == 1:
        return parts.each(lambda field: field[0])
    return combine(parts, temperature).each(Tensor.float)


def row_statistics(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None = None,
) -> tuple[Statistics, Saved]:
    rows = row_count(logits)
    found = Statistics.allocate(logits, rows, target is not None, wanted)
    saved = Saved.allocate(logits, rows)
    results = {**found._asdict(), "saved": saved.planes}
    if rows == 0:
        return found, saved
    splits = _splits(logits)
    if splits.a_row == 1:
        _sum(logits, kept, temperature, target, wanted, softcap, splits, None, results)
        return found, saved
    partials = _partials(logits, wanted, splits)
    _sum(logits, kept, temperature, target, wanted, softcap, splits, partials)
    with _on_device(logits):
        statistics.finish_kernel[(rows,)](
            logits,
            partials,
            _bytes(kept),
            target=target,
            **results,
            inner=_inner(logits),
            vocab=logits.shape[2],
            **_strides(logits),
            rows=rows,
            splits=splits.a_row,
            **_exponent_scale(temperature),
            softcap=softcap,
            MAX_SPLITS=_MAX_SPLITS,
            num_warps=1,
        )
    return found, saved


def row_gradient(
    logits: Tensor,
    saved: Saved,
    target: Tensor | None,
    upstream: Upstream,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    rows = row_count(logits)
    if rows == 0:
        return
    coefficients = saved.planes.new_empty(5, rows)
    gradients = upstream._asdict()
    block = _block(logits, _LARGEST_STREAMED)
    with _on_device(logits):
        statistics.coefficients_kernel[(triton.cdiv(rows, _COEFFICIENT_BLOCK),)](
            saved.planes,
            coefficients,
            **{f"grad_{name}": grad for name, grad in gradients.items()},
            # An upstream gradient that came through expand() has stride 0.
            **{f"{name}_stride": 1 if grad is None else grad.stride(0) for name, grad in gradients.items()},
            rows=rows,
            BLOCK=_COEFFICIENT_BLOCK,
            num_warps=4,
        )
        statistics.row_gradient_kernel[rows, block.a_row](
            logits,
            saved.planes,
            coefficients,
            target if upstream.logprob is not None else None,
            out,
            **_addressing(logits),
            **_addressing_of_out(out, logits),
            rows=rows,
            softcap=softcap,
            SECOND_MOMENT=upstream.varentropy is not None,
            **block.arguments(),
        )


def entropy_with_gradient(
    logits: Tensor,
    token_weight: Tensor | None,
    divisor: Divisor,
    temperature: Temperature,
    out: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    rows = row_count(logits)
    if rows == 0:
        return logits.new_zeros((), dtype=torch.float32)
    if out is None:
        kept = token_weight != 0 if token_weight is not None and token_weight.is_floating_point() else token_weight
        found, _ = row_statistics(logits, kept, temperature, None, Wanted(), softcap)
        return divisor.reduced(found.entropy, token_weight)
    block, registers = _fused(logits, out, softcap)
    parts = block.a_row
    sum_weights = divisor.of_weights and token_weight is not None
    tickets = 2 * rows * parts + sum_weights
    if tickets >= 1 << 31:
        raise ValueError(f"logits has {rows} rows of {parts} parts, expected less than 2**30 parts in all")
    counters = logits.new_zeros(FIRST_ROW.value + rows, dtype=torch.int32)
    # Each part's m, s and a, and each row's loss.
    scratch = logits.new_empty((3 * parts + 1) * rows, dtype=torch.float32)
    loss = logits.new_empty((), dtype=torch.float32)
    with _on_device(logits):
        entropy_gradient_kernel[(tickets,)](
            logits,
            _bytes(token_weight),
            divisor.total,
            counters=counters,
            scratch=scratch,
            loss=loss,
            out=out,
            **_addressing(logits),
            **_addressing_of_out(out, logits),
            rows=rows,
            lag=min(rows, triton.cdiv(_LAG_BYTES, logits.shape[2] * logits.element_size())),
            inverse_count=1.0 / divisor.number,
            **_exponent_scale(temperature),
            softcap=softcap,
            SUM_WEIGHTS=sum_weights,
            PARTS=parts,
            **block.arguments(),
            **({"maxnreg": registers} if _LIMITS_REGISTERS else {}),
        )
    return loss


def scale_(gradient: Tensor, factor: Tensor) -> None:
    if row_count(gradient) == 0:
        return
    block = _block(gradient, _LARGEST_STREAMED)
    blocks = row_count(gradient) * block.a_row
    # A program takes block after block: where the factor is 1, a program a block would only cost its launch.
    programs = min(blocks, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(gradient.device))
    with _on_device(gradient):
        scale_kernel[(programs,)](
            gradient, factor, **_addressing(gradient), parts=block.a_row, blocks=blocks, **block.arguments()
        )


def _partials(logits: Tensor, wanted: Wanted, splits: _Splits) -> Tensor:
    """Memory for the sums over the splits of each row, in the order of `Sums` and without unwanted fields."""
    fields = 3 + wanted.second_moment + 3 * wanted.extra
    return logits.new_empty(fields, splits.a_row, row_count(logits), dtype=torch.float32)


def _sum(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None,
    splits: _Splits,
    partials: Tensor | None,
    results: dict[str, Tensor | None] | None = None,
) -> None:
    """Writes the sums into `partials`, without those of masked rows, or the statistics into `results`."""
    rows = row_count(logits)
    if rows == 0:
        return
    with _on_device(logits):
        statistics.partial_sums_kernel[rows, splits.a_row](
            logits,
            _bytes(kept),
            target=target,
            partials=partials,
            **(results or dict.fromkeys((*Statistics._fields, "saved"))),
            **_addressing(logits),
            rows=rows,
            splits=splits.a_row,
            split_blocks=splits.blocks,
            **_exponent_scale(temperature),
            softcap=softcap,
            SECOND_MOMENT=wanted.second_moment,
            EXTRA=wanted.extra,
            **splits.block.arguments(),
        )


def _bytes(kept: Tensor | None) -> Tensor | None:
    return kept.view(torch.uint8) if kept is not None and kept.dtype == torch.bool else kept


def _exponent_scale(temperature: Temperature) -> dict[str, Any]:
    """What `exponent_scale` takes: tau of each row, or log2(e) / tau of all as the sum of two float32."""
    scale = math.log2(math.e) / temperature.common
    hi = ctypes.c_float(scale).value
    return {"row_temperature": temperature.per_row, "common_hi": hi, "common_lo": scale - hi}


def _addressing(logits: Tensor) -> dict[str, int | None]:
    """What locates a row."""
    shape = {"inner": _inner(logits), "vocab": logits.shape[2]}
    return {**shape, **_strides(logits), "misaligned": _misaligned(logits)}


def _addressing_of_out(out: Tensor, logits: Tensor) -> dict[str, int | bool]:
    """What locates a row of the gradient, and whether its vectors are where those of the logits are."""
    vector = _VECTOR_BYTES // logits.element_size()
    places = [(x.data_ptr() // x.element_size(), *_strides(x).values()) for x in (logits, out)]
    congruent = all((a - b) % vector == 0 for a, b in zip(*places, strict=True))
    return {**{f"out_{name}": stride for name, stride in _strides(out).items()}, "CONGRUENT": congruent}


def _inner(logits: Tensor) -> int | None:
    # Without an outer dimension there is nothing to divide a row's number by.
    return logits.shape[1] if logits.shape[0] > 1 else None


def _strides(logits: Tensor) -> dict[str, int]:
    # The stride of a dimension of one is never used, but a kernel would be compiled anew for its divisibility.
    return {
        "outer_stride": logits.stride(0) if logits.shape[0] > 1 else 0,
        "inner_stride": logits.stride(1) if logits.shape[1] > 1 else 0,
    }


def _misaligned(logits: Tensor) -> int | None:
    """Elements between the last boundary of a vector and the first element; None where every row is whole vectors."""
    vector = _VECTOR_BYTES // logits.element_size()
    before = logits.data_ptr() // logits.element_size() % vector
    whole = not before and not any(size % vector for size in (logits.shape[2], *_strides(logits).values()))
    return None if whole else before


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The CPU, where kernels are interpreted, counts as few, so that small inputs take every path.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _on_device(tensor: Tensor) -> torch.cuda.device_of:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device_of(tensor)
