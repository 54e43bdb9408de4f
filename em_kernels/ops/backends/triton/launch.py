"""The backend in Triton: the launchers, and which kernel serves which call.

    row_sums                `partial_sums_kernel`, with rows split over programs where rows are few: one read.
    row_statistics          `partial_sums_kernel`, `finish_kernel`: one read. The backward needs the logits and `Saved`.
    row_gradient            `coefficients_kernel`, `row_gradient_kernel`: one read, one write.
    entropy_with_gradient   many rows, or short ones: `entropy_gradient_kernel`, a program a row, which passes over it
                            twice and finds it in the second-level cache the second time: one read and one write of
                            device memory.
                            few long rows: `partial_sums_kernel` and `split_gradient_kernel`, a row split over programs.
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

from em_kernels.ops.backends.triton import loss, statistics
from em_kernels.ops.statistics import combine
from em_kernels.ops.types import Divisor, Saved, Statistics, Sums, Temperature, Upstream, Wanted, row_count

# A thread's load is 16 bytes, the widest there is.
_VECTOR_BYTES = 16
_THREADS_PER_WARP = 64 if torch.version.hip else 32
# Splits of a row are united by one program from one vector of this many parts: about one a multiprocessor.
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
    # Four programs a multiprocessor, of 64 registers a thread, have 32 KB in flight: 4.8 TB/s for 900 ns of latency.
    wide = _Tile(threads=256, unroll=2)
    programs = row_count(logits) * triton.cdiv(logits.shape[2], wide.columns(logits.dtype))
    # For a row or a few, tiles of half the size make twice as many programs, so that more multiprocessors have one.
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


def row_sums(
    logits: Tensor, kept: Tensor | None, temperature: Temperature, target: Tensor | None, wanted: Wanted
) -> Sums:
    partials = _partial_sums(logits, kept, temperature, target, wanted)
    fields = iter(partials)
    m, s, a = next(fields), next(fields), next(fields)
    b = next(fields) if wanted.second_moment else None
    parts = Sums(m, s, a, b, *fields)
    if partials.shape[1] == 1:
        return parts.each(lambda field: field[0])
    return combine(parts, temperature).each(Tensor.float)


def row_statistics(
    logits: Tensor, kept: Tensor | None, temperature: Temperature, target: Tensor | None, wanted: Wanted
) -> tuple[Statistics, Saved]:
    rows = row_count(logits)
    results = Statistics.allocate(logits, rows, target is not None, wanted)
    saved = Saved.allocate(logits, rows)
    if rows == 0:
        return results, saved
    partials = _partial_sums(logits, kept, temperature, target, wanted)
    with _on_device(logits):
        statistics.finish_kernel[(rows,)](
            logits,
            partials,
            _bytes(kept),
            target=target,
            **results._asdict(),
            saved=saved.planes,
            **_addressing(logits),
            rows=rows,
            splits=partials.shape[1],
            **_exponent_scale(temperature),
            MAX_SPLITS=_MAX_SPLITS,
            num_warps=1,
        )
    return results, saved


def row_gradient(logits: Tensor, saved: Saved, target: Tensor | None, upstream: Upstream, out: Tensor) -> None:
    rows = row_count(logits)
    if rows == 0:
        return
    coefficients = saved.planes.new_empty(5, rows)
    gradients = upstream._asdict()
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
        tile = _streamed_tile(logits)
        grid = (rows, triton.cdiv(logits.shape[2], tile.columns(logits.dtype)))
        statistics.row_gradient_kernel[grid](
            logits,
            saved.planes,
            coefficients,
            target if upstream.logprob is not None else None,
            out,
            **_addressing(logits),
            **_addressing(out, "out_"),
            rows=rows,
            SECOND_MOMENT=upstream.varentropy is not None,
            **tile.arguments(logits.dtype),
        )


def entropy_with_gradient(
    logits: Tensor, token_weight: Tensor | None, divisor: Divisor, temperature: Temperature, out: Tensor
) -> Tensor:
    rows, vocab = row_count(logits), logits.shape[2]
    losses = logits.new_empty(rows, dtype=torch.float32)
    if rows == 0:
        return losses.sum()
    shared: dict[str, Any] = {
        "token_weight": _bytes(token_weight),
        "total": divisor.total,
        "losses": losses,
        "out": out,
        **_addressing(logits),
        **_addressing(out, "out_"),
        "inverse_count": 1.0 / divisor.number,
        **_exponent_scale(temperature),
    }
    row_bytes = vocab * logits.element_size()
    if row_bytes <= _SHORT_ROW_BYTES or rows >= _multiprocessors(logits.device):
        tile = _resident_row(row_bytes, logits.element_size())
        with _on_device(logits):
            loss.entropy_gradient_kernel[(rows,)](logits, **shared, **tile.arguments(logits.dtype))
        return losses.sum()
    partials = _partial_sums(logits, token_weight, temperature, None, Wanted())
    tile = _streamed_tile(logits)
    with _on_device(logits):
        loss.split_gradient_kernel[rows, triton.cdiv(vocab, tile.columns(logits.dtype))](
            logits,
            partials,
            **shared,
            splits=partials.shape[1],
            MAX_SPLITS=_MAX_SPLITS,
            **tile.arguments(logits.dtype),
        )
    return losses.sum()


def scale_(gradient: Tensor, factor: Tensor) -> None:
    if row_count(gradient) == 0:
        return
    tile = _streamed_tile(gradient)
    blocks = row_count(gradient) * triton.cdiv(gradient.shape[2], tile.columns(gradient.dtype))
    # A program takes block after block: where the factor is 1, a program a block would only cost its launch.
    programs = min(blocks, _PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(gradient.device))
    with _on_device(gradient):
        loss.scale_kernel[(programs,)](
            gradient, factor, **_addressing(gradient), blocks=blocks, **tile.arguments(gradient.dtype)
        )


def _partial_sums(
    logits: Tensor, kept: Tensor | None, temperature: Temperature, target: Tensor | None, wanted: Wanted
) -> Tensor:
    """The sums over the splits of each row, (fields, splits, rows), in the order of `Sums` and without unwanted fields.

    `kept` may also be a token weight. The sums of a row where it is 0 stay unwritten.
    """
    rows, vocab = row_count(logits), logits.shape[2]
    tile = _streamed_tile(logits)
    tile_columns = tile.columns(logits.dtype)
    programs = triton.cdiv(_PROGRAMS_PER_MULTIPROCESSOR * _multiprocessors(logits.device), max(rows, 1))
    tiles = triton.cdiv(vocab, tile_columns)
    tiles_per_split = triton.cdiv(tiles, min(programs, _MAX_SPLITS, tiles))
    splits = triton.cdiv(tiles, tiles_per_split)
    fields = 3 + wanted.second_moment + 3 * wanted.extra
    partials = logits.new_empty(fields, splits, rows, dtype=torch.float32)
    if rows == 0:
        return partials
    with _on_device(logits):
        statistics.partial_sums_kernel[rows, splits](
            logits,
            _bytes(kept),
            target=target,
            partials=partials,
            **_addressing(logits),
            rows=rows,
            splits=splits,
            split_columns=tiles_per_split * tile_columns,
            **_exponent_scale(temperature),
            SECOND_MOMENT=wanted.second_moment,
            EXTRA=wanted.extra,
            **tile.arguments(logits.dtype),
        )
    return partials


def _bytes(kept: Tensor | None) -> Tensor | None:
    return kept.view(torch.uint8) if kept is not None and kept.dtype == torch.bool else kept


def _exponent_scale(temperature: Temperature) -> dict[str, Any]:
    """What `exponent_scale` takes: tau of each row, or log2(e) / tau of all as the sum of two float32."""
    scale = math.log2(math.e) / temperature.common
    hi = ctypes.c_float(scale).value
    return {"row_temperature": temperature.per_row, "common_hi": hi, "common_lo": scale - hi}


def _addressing(logits: Tensor, prefix: str = "") -> dict[str, int]:
    """What locates a row; only the strides differ between the logits and the gradient that is written beside them."""
    # The stride of a dimension of one is never used, but a kernel would be compiled anew for its divisibility.
    outer_stride = logits.stride(0) if logits.shape[0] > 1 else 0
    strides = {f"{prefix}outer_stride": outer_stride, f"{prefix}inner_stride": logits.stride(1)}
    return strides if prefix else {"inner": logits.shape[1], "vocab": logits.shape[2], **strides}


@functools.cache
def _multiprocessors(device: torch.device) -> int:
    # The CPU, where kernels are interpreted, counts as few, so that small inputs take every path.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 8


def _on_device(tensor: Tensor) -> torch.cuda.device_of:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device_of(tensor)
