"""Kernels of the reduced entropy loss, which write the gradient in the forward pass.

The row factor r = w / (total * count) is known before the row is read, so the gradient

    dL/dz_j = -(r / tau) / s * e^d_j (d_j - a/s)

follows as soon as (m, s, a) are known. A row is read twice, the second time from cache where it fits, and its gradient
is written once. A row whose factor is 0 is not read. Sums and losses are float32, and nothing is saved.

A token weight or a total that is None counts as 1, and so does a total of 0.
"""

import triton
import triton.language as tl

from em_kernels.ops.backends.triton.arithmetic import (
    LOG_2,
    exponent_scale,
    row_offset,
    row_sums,
    tile_columns,
    tile_gradient,
)
from em_kernels.ops.backends.triton.statistics import load_sums


@triton.jit(do_not_specialize=["inner"])
def entropy_gradient_kernel(
    logits,
    token_weight,
    total,
    row_temperature,
    losses,
    out,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    inverse_count,
    common_hi,
    common_lo,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program passes twice over its row: first for the sums, then for the gradient, from the copy left in cache."""
    row = tl.program_id(0).to(tl.int64)
    row_factor = row_factor_of(token_weight, total, inverse_count, row)
    logits += row_offset(row, inner, outer_stride, inner_stride)
    out += row_offset(row, inner, out_outer_stride, out_inner_stride)
    TILE: tl.constexpr = LANES * UNROLL * VECTOR
    if row_factor == 0.0:
        tl.store(losses + row, 0.0)
        for start in range(0, vocab, TILE):
            columns = tile_columns(start, LANES, UNROLL, VECTOR)
            tl.store(out + columns, tl.zeros([UNROLL, LANES, VECTOR], out.dtype.element_ty), mask=columns < vocab)
        return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    m, s, a, _, _, _, _ = row_sums(logits, 0, vocab, None, scale_hi, scale_lo, False, False, LANES, UNROLL, VECTOR)
    tl.store(losses + row, row_factor * entropy_of(s, a))
    # One log 2 makes 1 / tau of c, the other makes nats of d.
    linear = -row_factor * scale_hi * (LOG_2 * LOG_2) / s
    # The second pass goes from the end of the row back, because the caches still hold what was read last.
    for i in range(0, tl.cdiv(vocab, TILE)):
        columns = tile_columns((tl.cdiv(vocab, TILE) - 1 - i) * TILE, LANES, UNROLL, VECTOR)
        z = tl.load(logits + columns, mask=columns < vocab, other=-float("inf"), eviction_policy="evict_first")
        gradient = tile_gradient(z, m, scale_hi, scale_lo, a / s, 0.0, linear, None)
        tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=columns < vocab, cache_modifier=".cs")


@triton.jit(do_not_specialize=["inner", "splits"])
def split_gradient_kernel(
    logits,
    partials,
    token_weight,
    total,
    row_temperature,
    losses,
    out,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    inverse_count,
    common_hi,
    common_lo,
    splits,
    MAX_SPLITS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a tile: each unites its row's splits anew, and the first program of a row stores the loss."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    row_factor = row_factor_of(token_weight, total, inverse_count, row)
    columns = tile_columns(block * (LANES * UNROLL * VECTOR), LANES, UNROLL, VECTOR)
    exists = columns < vocab
    out += row_offset(row, inner, out_outer_stride, out_inner_stride)
    if row_factor == 0.0:
        if block == 0:
            tl.store(losses + row, 0.0)
        tl.store(out + columns, tl.zeros([UNROLL, LANES, VECTOR], out.dtype.element_ty), mask=exists)
        return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    m, s, a, _, _, _, _ = load_sums(
        partials, row, tl.num_programs(0), splits, scale_hi, scale_lo, False, False, MAX_SPLITS
    )
    if block == 0:
        tl.store(losses + row, row_factor * entropy_of(s, a))
    logits += row_offset(row, inner, outer_stride, inner_stride)
    z = tl.load(logits + columns, mask=exists, other=-float("inf"))
    linear = -row_factor * scale_hi * (LOG_2 * LOG_2) / s
    gradient = tile_gradient(z, m, scale_hi, scale_lo, a / s, 0.0, linear, None)
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
    """Multiplies a gradient by a factor that is read on the device; a program takes tile after tile."""
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


@triton.jit
def row_factor_of(token_weight, total, inverse_count, row):
    """The factor r of a row."""
    factor = inverse_count
    if token_weight is not None:
        factor *= tl.load(token_weight + row).to(tl.float32)
    if total is not None:
        divisor = tl.load(total)
        factor /= tl.where(divisor == 0.0, 1.0, divisor)
    return factor


@triton.jit
def entropy_of(s, a):
    """H = log s - a / s, in nats; NaN of an empty row."""
    return (tl.log2(s) - a / s) * LOG_2
