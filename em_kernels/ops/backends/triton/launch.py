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
import math
from typing import Any

import torch
import triton
from torch import Tensor

from em_kernels.ops.backends.triton import blocks
from em_kernels.ops.backends.triton.addressing import addressing, addressing_of_out, inner, strides
from em_kernels.ops.backends.triton.gradient import coefficients_kernel, row_gradient_kernel
from em_kernels.ops.backends.triton.loss import FIRST_ROW, entropy_gradient_kernel, scale_kernel
from em_kernels.ops.backends.triton.statistics import finish_kernel, partial_sums_kernel
from em_kernels.ops.statistics import combine
from em_kernels.ops.types import Divisor, Saved, Statistics, Sums, Temperature, Upstream, Wanted, row_count

# What lies between the two readings of a row in the fused kernel. 132 multiprocessors of five programs have 21 MB under
# way, half of it sums; so the sums of a row were drawn, and nearly always done, long before its gradient asks for them.
# Together they are half of an H100's second-level cache.
_LAG_BYTES = 12 << 20
# Rows per program of the kernel that only does arithmetic per row.
_COEFFICIENT_BLOCK = 256


def row_sums(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None = None,
) -> Sums:
    splits = blocks.splits_of(logits)
    partials = _partials(logits, wanted, splits)
    _sum(logits, kept, temperature, target, wanted, softcap, splits, partials)
    fields = iter(partials)
    # In the kernels' memory d is in units of log 2.
    m, s, a = next(fields), next(fields), next(fields).mul_(math.log(2))
    b = next(fields).mul_(math.log(2) ** 2) if wanted.second_moment else None
    parts = Sums(m, s, a, b, *fields)
    if parts.sum_d is not None:
        parts.sum_d.mul_(math.log(2))
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
    splits = blocks.splits_of(logits)
    if splits.a_row == 1:
        _sum(logits, kept, temperature, target, wanted, softcap, splits, None, results)
        return found, saved
    partials = _partials(logits, wanted, splits)
    _sum(logits, kept, temperature, target, wanted, softcap, splits, partials)
    with _on_device(logits):
        finish_kernel[(rows,)](
            logits,
            partials,
            _bytes(kept),
            target=target,
            **results,
            inner=inner(logits),
            vocab=logits.shape[2],
            **strides(logits),
            rows=rows,
            splits=splits.a_row,
            **_exponent_scale(temperature),
            softcap=softcap,
            MAX_SPLITS=blocks.MAX_SPLITS,
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
    block = blocks.block_of(logits, blocks.LARGEST_STREAMED)
    with _on_device(logits):
        coefficients_kernel[(triton.cdiv(rows, _COEFFICIENT_BLOCK),)](
            saved.planes,
            coefficients,
            **{f"grad_{name}": grad for name, grad in gradients.items()},
            # An upstream gradient that came through expand() has stride 0.
            **{f"{name}_stride": 1 if grad is None else grad.stride(0) for name, grad in gradients.items()},
            rows=rows,
            BLOCK=_COEFFICIENT_BLOCK,
            num_warps=4,
        )
        row_gradient_kernel[rows, block.a_row](
            logits,
            saved.planes,
            coefficients,
            target if upstream.logprob is not None else None,
            out,
            **addressing(logits),
            **addressing_of_out(out, logits),
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
    block, registers = blocks.fused_block(logits, out, softcap)
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
            **addressing(logits),
            **addressing_of_out(out, logits),
            rows=rows,
            lag=min(rows, triton.cdiv(_LAG_BYTES, logits.shape[2] * logits.element_size())),
            inverse_count=1.0 / divisor.number,
            **_exponent_scale(temperature),
            softcap=softcap,
            SUM_WEIGHTS=sum_weights,
            PARTS=parts,
            # A warp's vector at least, which is united without an exchange between warps.
            MAX_PARTS=max(32, triton.next_power_of_2(parts)),
            **block.arguments(),
            **({} if registers is None else {"maxnreg": registers}),
        )
    return loss


def scale_(gradient: Tensor, factor: Tensor) -> None:
    if row_count(gradient) == 0:
        return
    block = blocks.block_of(gradient, blocks.LARGEST_STREAMED)
    count = row_count(gradient) * block.a_row
    # A program takes block after block: where the factor is 1, a program a block would only cost its launch.
    programs = min(count, blocks.PROGRAMS_PER_MULTIPROCESSOR * blocks.multiprocessors(gradient.device))
    with _on_device(gradient):
        scale_kernel[(programs,)](
            gradient, factor, **addressing(gradient), parts=block.a_row, blocks=count, **block.arguments()
        )


def _partials(logits: Tensor, wanted: Wanted, splits: blocks.Splits) -> Tensor:
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
    splits: blocks.Splits,
    partials: Tensor | None,
    results: dict[str, Tensor | None] | None = None,
) -> None:
    """Writes the sums into `partials`, without those of masked rows, or the statistics into `results`."""
    rows = row_count(logits)
    if rows == 0:
        return
    with _on_device(logits):
        partial_sums_kernel[rows, splits.a_row](
            logits,
            _bytes(kept),
            target=target,
            partials=partials,
            **(results or dict.fromkeys((*Statistics._fields, "saved"))),
            **addressing(logits),
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


def _on_device(tensor: Tensor) -> torch.cuda.device_of:
    # Triton launches on the current device, which need not be the tensor's.
    return torch.cuda.device_of(tensor)
