"""The operators in Triton: launchers, and which kernel serves which call.

    entropy_with_gradient   many rows, or short ones: `entropy_gradient_kernel`, a program a row, which passes over it
                            twice and finds it in the second-level cache the second time: one read and one write of
                            device memory.
                            few long rows: `partial_sums_kernel` and `split_gradient_kernel`, a row split over programs.
    row_statistics          `partial_sums_kernel` (rows split over programs where they are few), `finish_kernel`: one
                            read. Saved for backward: the logits, and (5, rows) float32.
    row_gradient            `coefficients_kernel`, `row_gradient_kernel`: one read, one write.
    scale_                  `scale_kernel`: nothing where the factor is 1, which it reads on the device.

All sums are float32, logits float32, bfloat16 or float16. Reductions have a fixed order: results repeat bit for bit.
"""

import ctypes
import functools
import math
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from em_kernels.ops import triton_loss_kernels, triton_statistics_kernels
from em_kernels.ops.operators import new_row_statistics, new_statistics

# A thread's load is 16 bytes, the widest there is.
_VECTOR_BYTES = 16
_THREADS_PER_WARP = 64 if torch.version.hip else 32
# Splits of a row are united by one program from one vector of this many partials: about one a multiprocessor.
_MAX_SPLITS = 128
# Programs of 256 threads per multiprocessor that keep enough loads in flight; fewer rows than this are split.
_PROGRAMS_PER_MULTIPROCESSOR = 4
# A row this short is read and written by one program in the time that the launch of a second kernel takes the host.
_SHORT_ROW_BYTES = 64 << 10
# Rows per program of the kernel that only does arithmetic per row.
_COEFFICIENT_BLOCK = 256


class _Tile(NamedTuple):
    threads: int
    unroll: int

    def arguments(self, dtype: torch.dtype) -> dict[str, int]:
        return {
            "LANES": self.threads,
            "UNROLL": self.unroll,
            "VECTOR": _VECTOR_BYTES // dtype.itemsize,
            "num_warps": self.threads // _THREADS_PER_WARP,
        }

    def columns(self, dtype: torch.dtype) -> int:
        return self.threads * self.unroll * (_VECTOR_BYTES // dtype.itemsize)


def _streamed_tile(logits: Tensor) -> _Tile:
    """The tile of kernels with one pass and nothing to keep in cache: many small programs."""
    outer, inner, vocab = logits.shape
    # Four programs a multiprocessor, of 64 registers a thread, have 32 KB in flight: 4.8 TB/s for 900 ns of latency.
    wide = _Tile(threads=256, unroll=2)
    programs = outer * inner * triton.cdiv(vocab, wide.columns(logits.dtype))
    # Too few to go round, when a row or a few are monitored: half of the work each, twice as many.
    return wide if programs >= _multiprocessors(logits.device) else _Tile(threads=256, unroll=1)


def _resident_row(row_bytes: int, itemsize: int) -> _Tile:
    """The tile of a program that passes twice over its row, so that the rows under way stay in the second-level cache.

    A multiprocessor holds 2048 threads of up to 32 registers, 1024 of up to 64; 132 of them share 50 MB on an H100.
    """
    if row_bytes <= 16 << 10:
        return _Tile(threads=128, unroll=2)  # a tile or two a row: more warps would only wait for each other
    if row_bytes <= 128 << 10:
        return _Tile(threads=512, unroll=2)  # two rows a multiprocessor: at 128 KB a row, 34 MB
    # One row a multiprocessor, for more than 32 registers a thread keep a second program out: at 304 KB a row, 40 MB.
    # float32 has half as many elements in a load, so twice the loads; it takes 32 registers, and two rows fit.
    return _Tile(threads=1024, unroll=2 if itemsize == 2 else 4)


def row_statistics(
    logits: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None,
    varentropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    rows = logits.shape[0] * logits.shape[1]
    results = entropy, lse, logprob, variance, saved = new_row_statistics(logits, rows, target, varentropy)
    if rows == 0:
        return results
    mask = None if mask is None else mask.view(torch.uint8)
    with _on_device(logits):
        partials = _partial_sums(logits, mask, row_temperature, temperature, varentropy)
        triton_statistics_kernels.finish_kernel[(rows,)](
            logits,
            partials,
            mask,
            row_temperature,
            target,
            entropy,
            lse,
            logprob if target is not None else None,
            variance if varentropy else None,
            saved,
            **_addressing(logits),
            rows=rows,
            splits=partials.shape[2],
            **_exponent_scale(temperature),
            MAX_SPLITS=_MAX_SPLITS,
            num_warps=1,
        )
    return results


def row_gradient(
    logits: Tensor,
    saved: Tensor,
    varentropy: Tensor,
    target: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_logprob: Tensor | None,
    grad_varentropy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Writes the gradient into `out`, which may be the logits themselves, and returns it."""
    rows = logits.shape[0] * logits.shape[1]
    if rows == 0:
        return out
    upstream = {
        "entropy": grad_entropy,
        "lse": grad_lse,
        "logprob": grad_logprob,
        "varentropy": grad_varentropy,
    }
    coefficients = new_statistics(logits, 4, rows)
    with _on_device(logits):
        triton_statistics_kernels.coefficients_kernel[(triton.cdiv(rows, _COEFFICIENT_BLOCK),)](
            saved,
            varentropy if grad_varentropy is not None else None,
            coefficients,
            **{f"grad_{name}": grad for name, grad in upstream.items()},
            # An upstream gradient that came through expand() has stride 0.
            **{f"{name}_stride": 1 if grad is None else grad.stride(0) for name, grad in upstream.items()},
            rows=rows,
            BLOCK=_COEFFICIENT_BLOCK,
            num_warps=4,
        )
        tile = _streamed_tile(logits)
        grid = (rows, triton.cdiv(logits.shape[2], tile.columns(logits.dtype)))
        triton_statistics_kernels.row_gradient_kernel[grid](
            logits,
            saved,
            coefficients,
            target if grad_logprob is not None else None,
            out,
            **_addressing(logits),
            **_addressing(out, "out_"),
            rows=rows,
            **tile.arguments(logits.dtype),
        )
    return out


def entropy_with_gradient(
    logits: Tensor,
    weight: Tensor | None,
    divisor: Tensor | None,
    count: int,
    row_temperature: Tensor | None,
    temperature: float,
    out: Tensor,
) -> Tensor:
    """Writes the gradient into `out`, which may be the logits themselves, and returns the loss."""
    outer, inner, vocab = logits.shape
    rows = outer * inner
    losses = new_statistics(logits, rows)
    if rows == 0:
        return losses.sum()
    if weight is not None and weight.dtype == torch.bool:
        weight = weight.view(torch.uint8)
    shared: dict[str, Any] = {
        **_addressing(logits),
        **_addressing(out, "out_"),
        "scale": 1.0 / count,
        **_exponent_scale(temperature),
    }
    with _on_device(logits):
        row_bytes = vocab * logits.element_size()
        if row_bytes <= _SHORT_ROW_BYTES or rows >= _multiprocessors(logits.device):
            tile = _resident_row(row_bytes, logits.element_size())
            triton_loss_kernels.entropy_gradient_kernel[(rows,)](
                logits, weight, divisor, row_temperature, losses, out, **shared, **tile.arguments(logits.dtype)
            )
        else:
            partials = _partial_sums(logits, weight, row_temperature, temperature, squares=False)
            tile = _streamed_tile(logits)
            grid = (rows, triton.cdiv(vocab, tile.columns(logits.dtype)))
            triton_loss_kernels.split_gradient_kernel[grid](
                logits,
                partials,
                weight,
                divisor,
                row_temperature,
                losses,
                out,
                **shared,
                splits=partials.shape[2],
                MAX_SPLITS=_MAX_SPLITS,
                **tile.arguments(logits.dtype),
            )
    return losses.sum()


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    """Multiplies `gradient`, whose memory may have gaps between rows, by a 0-d tensor, in place."""
    rows = gradient.shape[0] * gradient.shape[1]
    if rows == 0:
        return gradient
    tile = _streamed_tile(gradient)
    blocks = rows * triton.cdiv(gradient.shape[2], tile.columns(gradient.dtype))
    with _on_device(gradient):
        # Programs that stay and take block after block: where the factor is 1, launching one a block would be the cost.
        programs = min(blocks, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(gradient.device))
        triton_loss_kernels.scale_kernel[(programs,)](
            gradient, factor, **_addressing(gradient), blocks=blocks, **tile.arguments(gradient.dtype)
        )
    return gradient


def _partial_sums(
    logits: Tensor, mask: Tensor | None, row_temperature: Tensor | None, temperature: float, squares: bool
) -> Tensor:
    """(3 or, with squares, 4, rows, splits): the partials of each row, left unwritten where masked."""
    outer, inner, vocab = logits.shape
    rows = outer * inner
    tile = _streamed_tile(logits)
    tile_columns = tile.columns(logits.dtype)
    wanted = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(logits.device), rows)
    tiles = triton.cdiv(vocab, tile_columns)
    tiles_per_split = triton.cdiv(tiles, min(wanted, _MAX_SPLITS, tiles))
    splits = triton.cdiv(tiles, tiles_per_split)
    partials = new_statistics(logits, 4 if squares else 3, rows, splits)
    triton_statistics_kernels.partial_sums_kernel[(rows, splits)](
        logits,
        mask,
        row_temperature,
        partials,
        **_addressing(logits),
        rows=rows,
        splits=splits,
        split_columns=tiles_per_split * tile_columns,
        **_exponent_scale(temperature),
        SQUARES=squares,
        **tile.arguments(logits.dtype),
    )
    return partials


def _exponent_scale(temperature: float) -> dict[str, float]:
    """log2(e) / temperature as the sum of two float32, more than its rounding to one: see `triton_arithmetic`."""
    scale = math.log2(math.e) / temperature
    hi = ctypes.c_float(scale).value
    return {"common_hi": hi, "common_lo": scale - hi}


def _addressing(logits: Tensor, prefix: str = "") -> dict[str, int]:
    """Where rows lie; all but the strides is the same of the logits and of what is written beside them."""
    # The stride of a dimension of one says nothing, and would only have kernels compiled for its bits.
    outer_stride = logits.stride(0) if logits.shape[0] > 1 else 0
    strides = {f"{prefix}outer_stride": outer_stride, f"{prefix}inner_stride": logits.stride(1)}
    return strides if prefix else {"inner": logits.shape[1], "vocab": logits.shape[2], **strides}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # On the CPU, where kernels are interpreted: few, so that small inputs take every path.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _on_device(tensor: Tensor) -> torch.cuda.device_of:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device_of(tensor)
