"""Kernels of the reduced entropy loss, which write the gradient in the forward pass.

A row's weight in the loss, r = scale * weight / divisor, is known before the row is read, so its gradient

    dL/dz_j = -(r / tau) / s * e^d_j (d_j - a / s)

follows as soon as (m, s, a) are. A row of weight 0 is not read. Arguments that are None count as 1, and so
does a divisor of 0.
"""

import triton
import triton.language as tl

from em_kernels.ops.triton_arithmetic import LOG_2, block_gradient, entropy_of, exponent_scale, row_offset, tile_columns
from em_kernels.ops.triton_statistics_kernels import load_partials, row_partial


@triton.jit
def row_scale(weight, divisor, scale, row):
    if weight is not None:
        scale *= tl.load(weight + row).to(tl.float32)
    if divisor is not None:
        total = tl.load(divisor)
        scale /= tl.where(total == 0.0, 1.0, total)
    return scale


@triton.jit(do_not_specialize=["inner"])
def entropy_gradient_kernel(
    logits,
    weight,
    divisor,
    row_temperature,
    losses,
    out,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    scale,
    common_hi,
    common_lo,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program passes twice over its row: the sums, then the gradient from the copy left in cache."""
    row = tl.program_id(0).to(tl.int64)
    scale = row_scale(weight, divisor, scale, row)
    logits += row_offset(row, inner, outer_stride, inner_stride)
    out += row_offset(row, inner, out_outer_stride, out_inner_stride)
    TILE: tl.constexpr = LANES * UNROLL * VECTOR
    if scale == 0.0:
        tl.store(losses + row, 0.0)
        for start in range(0, vocab, TILE):
            columns = tile_columns(start, LANES, UNROLL, VECTOR)
            tl.store(out + columns, tl.zeros([UNROLL, LANES, VECTOR], out.dtype.element_ty), mask=columns < vocab)
        return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    m, s, a, _ = row_partial(logits, 0, vocab, scale_hi, scale_lo, False, LANES, UNROLL, VECTOR)
    tl.store(losses + row, scale * entropy_of(s, a))
    # 1 / tau = c log 2; and log 2 again, as d is in units of it.
    linear = -scale * scale_hi * (LOG_2 * LOG_2) / s
    # From the end of the row back: what was read last is what the caches still hold.
    for i in range(0, tl.cdiv(vocab, TILE)):
        columns = tile_columns((tl.cdiv(vocab, TILE) - 1 - i) * TILE, LANES, UNROLL, VECTOR)
        z = tl.load(logits + columns, mask=columns < vocab, other=-float("inf"), eviction_policy="evict_first")
        gradient = block_gradient(z, m, scale_hi, scale_lo, a / s, 0.0, linear, None)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=columns < vocab, cache_modifier=".cs")


@triton.jit(do_not_specialize=["inner", "splits"])
def split_gradient_kernel(
    logits,
    partials,
    weight,
    divisor,
    row_temperature,
    losses,
    out,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    scale,
    common_hi,
    common_lo,
    splits,
    MAX_SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a tile: each unites the partial sums of its row anew, the first of a row stores the loss."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    scale = row_scale(weight, divisor, scale, row)
    columns = tile_columns(block * (LANES * UNROLL * VECTOR), LANES, UNROLL, VECTOR)
    exists = columns < vocab
    out += row_offset(row, inner, out_outer_stride, out_inner_stride)
    if scale == 0.0:
        if block == 0:
            tl.store(losses + row, 0.0)
        tl.store(out + columns, tl.zeros([UNROLL, LANES, VECTOR], out.dtype.element_ty), mask=exists)
        return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    m, s, a, _ = load_partials(partials, row, tl.num_programs(0), splits, scale_hi, scale_lo, False, MAX_SPLITS)
    if block == 0:
        tl.store(losses + row, scale * entropy_of(s, a))
    logits += row_offset(row, inner, outer_stride, inner_stride)
    z = tl.load(logits + columns, mask=exists, other=-float("inf"))
    linear = -scale * scale_hi * (LOG_2 * LOG_2) / s
    gradient = block_gradient(z, m, scale_hi, scale_lo, a / s, 0.0, linear, None)
    tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["inner", "blocks"])
def scale_kernel(
    gradient,
    factor,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    blocks,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    factor = tl.load(factor).to(tl.float32)
    if factor == 1.0:
        return
    TILE: tl.constexpr = LANES * UNROLL * VECTOR
    blocks_per_row = tl.cdiv(vocab, TILE)
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = block // blocks_per_row
        columns = tile_columns((block % blocks_per_row) * TILE, LANES, UNROLL, VECTOR)
        target = gradient + row_offset(row, inner, outer_stride, inner_stride) + columns
        scaled = tl.load(target, mask=columns < vocab).to(tl.float32) * factor
        tl.store(target, scaled.to(gradient.dtype.element_ty), mask=columns < vocab)
