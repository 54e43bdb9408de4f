"""Kernels of per-token statistics: partial sums of a row, their union, and the gradient of any mix of the statistics.

The exponents d, their mean E = a / s and u = d - E are in units of log 2 inside the kernels (see `triton_arithmetic`),
in nats in what is stored. Arguments that are None switch their part of a kernel off at compile time.
"""

import triton
import triton.language as tl

from em_kernels.ops.triton_arithmetic import (
    LOG2_E,
    LOG_2,
    accumulate,
    block_gradient,
    empty_partials,
    entropy_of,
    exponent_scale,
    row_offset,
    tile_columns,
    unite,
)


@triton.jit
def row_partial(
    logits,
    start,
    stop,
    scale_hi,
    scale_lo,
    SQUARES: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The partial (m, s, a, b) of columns [start, stop) of the row at `logits`."""
    m, s, a, b = empty_partials(LANES)
    for column in range(start, stop, LANES * UNROLL * VECTOR):
        columns = tile_columns(column, LANES, UNROLL, VECTOR)
        z = tl.load(logits + columns, mask=columns < stop, other=-float("inf"))
        m, s, a, b = accumulate(m, s, a, b, z, scale_hi, scale_lo, SQUARES)
    return unite(m.to(logits.dtype.element_ty), s, a, b, scale_hi, scale_lo)


@triton.jit
def load_partials(partials, row, rows, splits, scale_hi, scale_lo, SQUARES: tl.constexpr, MAX_SPLITS: tl.constexpr):
    """The partial of a row from those of its splits, stored as (3 or, where SQUARES, 4, rows, splits)."""
    split = tl.arange(0, MAX_SPLITS)
    present = split < splits
    partials += row * splits + split
    plane = rows.to(tl.int64) * splits
    m = tl.load(partials, mask=present, other=-float("inf"))
    s = tl.load(partials + plane, mask=present, other=0.0)
    a = tl.load(partials + 2 * plane, mask=present, other=0.0)
    b = a
    if SQUARES:
        b = tl.load(partials + 3 * plane, mask=present, other=0.0)
    return unite(m, s, a, b, scale_hi, scale_lo)


@triton.jit(do_not_specialize=["inner", "rows", "splits", "split_columns"])
def partial_sums_kernel(
    logits,
    mask,
    row_temperature,
    partials,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    rows,
    splits,
    split_columns,
    common_hi,
    common_lo,
    SQUARES: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if mask is not None:
        if tl.load(mask + row) == 0:
            return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    start = split * split_columns
    stop = tl.minimum(start + split_columns, vocab)
    logits += row_offset(row, inner, outer_stride, inner_stride)
    m, s, a, b = row_partial(logits, start, stop, scale_hi, scale_lo, SQUARES, LANES, UNROLL, VECTOR)
    partials += row * splits + split
    plane = rows.to(tl.int64) * splits
    tl.store(partials, m)
    tl.store(partials + plane, s)
    tl.store(partials + 2 * plane, a)
    if SQUARES:
        tl.store(partials + 3 * plane, b)


@triton.jit(do_not_specialize=["inner", "rows", "splits"])
def finish_kernel(
    logits,
    partials,
    mask,
    row_temperature,
    target,
    entropy,
    lse,
    logprob,
    varentropy,
    saved,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    rows,
    splits,
    common_hi,
    common_lo,
    MAX_SPLITS: tl.constexpr,
):
    """Statistics of a row, and what its gradient needs: (m, E, s) and log2(e) / tau in two parts, 0 of a masked row."""
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    if mask is not None:
        if tl.load(mask + row) == 0:
            tl.store(entropy + row, 0.0)
            tl.store(lse + row, 0.0)
            if target is not None:
                tl.store(logprob + row, 0.0)
            if varentropy is not None:
                tl.store(varentropy + row, 0.0)
            for i in tl.static_range(5):
                tl.store(saved + i * plane + row, 0.0)
            return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    m, s, a, b = load_partials(partials, row, rows, splits, scale_hi, scale_lo, varentropy is not None, MAX_SPLITS)
    mean, inv_tau = a / s, scale_hi * LOG_2
    # A row of all -inf is empty, and its lse would be -inf, which is not NaN.
    log_s = tl.where(s == 0.0, float("nan"), tl.log2(s) * LOG_2)
    tl.store(entropy + row, entropy_of(s, a))
    tl.store(lse + row, m * inv_tau + log_s)
    if target is not None:
        column = tl.load(target + row)
        exists = (column >= 0) & (column < vocab)
        z = tl.load(
            logits + row_offset(row, inner, outer_stride, inner_stride) + column, mask=exists, other=float("nan")
        )
        # Not `exponential`'s d: the log-probability of a banned token is -inf.
        tl.store(logprob + row, (z.to(tl.float32) - m) * inv_tau - log_s)
    if varentropy is not None:
        variance = (b / s - mean * mean) * (LOG_2 * LOG_2)
        tl.store(varentropy + row, tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL))
    tl.store(saved + row, m)
    tl.store(saved + plane + row, mean * LOG_2)
    tl.store(saved + 2 * plane + row, s)
    tl.store(saved + 3 * plane + row, scale_hi)
    tl.store(saved + 4 * plane + row, scale_lo)


@triton.jit(do_not_specialize=["entropy_stride", "lse_stride", "logprob_stride", "varentropy_stride", "rows"])
def coefficients_kernel(
    saved,
    varentropy,
    coefficients,
    grad_entropy,
    grad_lse,
    grad_logprob,
    grad_varentropy,
    entropy_stride,
    lse_stride,
    logprob_stride,
    varentropy_stride,
    rows,
    BLOCK: tl.constexpr,
):
    """A row's gradient as dL/dz_j = e^d (constant + linear u + quadratic u^2) + alpha [j = target], from upstream:

    term, upstream g    constant    linear    quadratic    alpha          all times 1 / tau, the first three over s
    entropy                         -g
    lse                  g
    log prob            -g                                  g
    varentropy          -g V        2 g       g
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    plane = rows.to(tl.int64)
    s = tl.load(saved + 2 * plane + row, mask=exists, other=1.0)
    inv_tau = tl.load(saved + 3 * plane + row, mask=exists, other=0.0) * LOG_2
    kept = exists & (inv_tau != 0)
    constant = tl.zeros([BLOCK], tl.float32)
    linear = tl.zeros([BLOCK], tl.float32)
    quadratic = tl.zeros([BLOCK], tl.float32)
    alpha = tl.zeros([BLOCK], tl.float32)
    if grad_entropy is not None:
        linear -= tl.load(grad_entropy + row * entropy_stride, mask=kept, other=0.0)
    if grad_lse is not None:
        constant += tl.load(grad_lse + row * lse_stride, mask=kept, other=0.0)
    if grad_logprob is not None:
        alpha = tl.load(grad_logprob + row * logprob_stride, mask=kept, other=0.0)
        constant -= alpha
    if grad_varentropy is not None:
        quadratic = tl.load(grad_varentropy + row * varentropy_stride, mask=kept, other=0.0)
        constant -= quadratic * tl.load(varentropy + row, mask=kept, other=0.0)
        linear += 2 * quadratic
    per_exponential = inv_tau / s
    tl.store(coefficients + row, constant * per_exponential, mask=kept)
    tl.store(coefficients + plane + row, linear * per_exponential, mask=kept)
    tl.store(coefficients + 2 * plane + row, quadratic * per_exponential, mask=kept)
    tl.store(coefficients + 3 * plane + row, alpha * inv_tau, mask=kept)


@triton.jit(do_not_specialize=["inner", "rows"])
def row_gradient_kernel(
    logits,
    saved,
    coefficients,
    target,
    out,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    out_outer_stride,
    out_inner_stride,
    rows,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    columns = tile_columns(tl.program_id(1) * (LANES * UNROLL * VECTOR), LANES, UNROLL, VECTOR)
    exists = columns < vocab
    out += row_offset(row, inner, out_outer_stride, out_inner_stride)
    scale_hi = tl.load(saved + 3 * plane + row)
    if scale_hi == 0:
        tl.store(out + columns, tl.zeros([UNROLL, LANES, VECTOR], out.dtype.element_ty), mask=exists)
        return
    scale_lo = tl.load(saved + 4 * plane + row)
    m = tl.load(saved + row)
    mean = tl.load(saved + plane + row) * LOG2_E
    constant = tl.load(coefficients + row)
    linear = tl.load(coefficients + plane + row) * LOG_2
    quadratic = tl.load(coefficients + 2 * plane + row) * (LOG_2 * LOG_2)
    logits += row_offset(row, inner, outer_stride, inner_stride)
    z = tl.load(logits + columns, mask=exists, other=-float("inf"))
    gradient = block_gradient(z, m, scale_hi, scale_lo, mean, constant, linear, quadratic)
    if target is not None:
        alpha = tl.load(coefficients + 3 * plane + row)
        column = tl.load(target + row)
        gradient += tl.where(columns == column, alpha, 0.0)
        # The log-probability of a target that does not exist is NaN, and so is its gradient.
        gradient = tl.where((column >= 0) & (column < vocab), gradient, float("nan"))
    tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=exists)
