"""Kernels of per-token statistics: the sums of a row, the statistics they make, and the gradient of any mix of these.

A row is read once for its statistics and once more for its gradient, which is written in the same pass.

`partial_sums_kernel` reads logits and writes the sums (m, s, a, b, count, sum_d, sum_e2) of each split of a row, over
every column but the target's. Only the tile that holds the target pays for leaving it out.

`finish_kernel` unites the splits, and then the target's own part, m = z_t, s = 1, a = b = 0:

    H = log s - a/s      lse = m / tau + log s      V = b/s - (a/s)^2      log p_t = d_t - log s      1 - p_t = rest / s

with rest the sum s over the other columns. Where the target is the maximum, log s is log1p(rest) and d_t is 0, so
log p_t and 1 - p_t keep their relative accuracy however close p_t is to 1. The gradient needs the logits and the seven
planes of `em_kernels.ops.types.Saved`, which this kernel writes.

`coefficients_kernel` makes five planes from the saved ones and the upstream gradients: constant, linear, quadratic,
target_constant and alpha. `row_gradient_kernel` reads logits and writes, with u = d - a/s,

    dL/dz_j = e^d_j (constant + linear u_j + quadratic u_j^2)                  j != t
    dL/dz_t = e^d_t (target_constant + linear u_t + quadratic u_t^2) + alpha

Sums and statistics are float32. In registers d and mean_d = a/s are in units of log 2 (see `arithmetic`), in memory
everything is in nats. An argument that is None switches its part of a kernel off at compile time.
"""

import triton
import triton.language as tl

from em_kernels.ops.backends.triton.arithmetic import (
    LOG2_E,
    LOG_2,
    exponent_scale,
    log1p,
    row_offset,
    row_sums,
    tile_columns,
    tile_gradient,
    unite,
    unite_with_target,
)


@triton.jit(do_not_specialize=["inner", "rows", "splits"])
def partial_sums_kernel(
    logits,
    kept,
    row_temperature,
    target,
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
    SECOND_MOMENT: tl.constexpr,
    EXTRA: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a split of a row; `partials` is (fields, splits, rows), and a row whose `kept` is 0 is not written."""
    row = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1)
    if kept is not None:
        if tl.load(kept + row) == 0:
            return
    column = None
    if target is not None:
        column = tl.load(target + row)
        # Columns are 32-bit, and the cast must not make a column of a target out of range.
        column = tl.where((column >= 0) & (column < vocab), column, -1).to(tl.int32)
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    start = split * split_columns
    stop = tl.minimum(start + split_columns, vocab)
    logits += row_offset(row, inner, outer_stride, inner_stride)
    sums = row_sums(logits, start, stop, column, scale_hi, scale_lo, SECOND_MOMENT, EXTRA, LANES, UNROLL, VECTOR)
    plane = rows.to(tl.int64) * splits
    store_sums(partials + split.to(tl.int64) * rows + row, plane, sums, SECOND_MOMENT, EXTRA)


@triton.jit(do_not_specialize=["inner", "rows", "splits"])
def finish_kernel(
    logits,
    partials,
    kept,
    row_temperature,
    target,
    entropy,
    lse,
    logprob,
    varentropy,
    extra,
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
    """The statistics of a row, a program a row, and what its gradient needs; all are 0 where `kept` is 0."""
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    SECOND_MOMENT: tl.constexpr = varentropy is not None
    EXTRA: tl.constexpr = extra is not None
    if kept is not None:
        if tl.load(kept + row) == 0:
            store_zeros(row, plane, entropy, lse, logprob, varentropy, extra, saved)
            return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    inv_tau = scale_hi * LOG_2
    sums = load_sums(partials, row, rows, splits, scale_hi, scale_lo, SECOND_MOMENT, EXTRA, MAX_SPLITS)
    if target is not None:
        z = target_logit(logits + row_offset(row, inner, outer_stride, inner_stride), tl.load(target + row), vocab)
        sums, rest, is_top = unite_with_target(sums, z, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    m, s, a, b, count, sum_d, sum_e2 = sums
    # A row of all -inf is empty, and its lse would be -inf, which is not NaN.
    s = tl.where(s == 0.0, float("nan"), s)
    log_s, mean_d = tl.log2(s) * LOG_2, a / s * LOG_2
    miss, top1, variance = 0.0, 0.0, 0.0
    if target is not None:
        log_s = tl.where(is_top, log1p(rest), log_s)
        # The d of `exponential` is bounded from below, and the log-probability of a banned token is -inf.
        tl.store(logprob + row, tl.where(is_top, 0.0, (z - m) * inv_tau) - log_s)
        miss = rest / s
        top1 = is_top.to(tl.float32)
    tl.store(entropy + row, log_s - mean_d)
    tl.store(lse + row, m * inv_tau + log_s)
    if SECOND_MOMENT:
        variance = b / s * (LOG_2 * LOG_2) - mean_d * mean_d
        variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(varentropy + row, variance)
    if EXTRA:
        mean_logprob = sum_d / count * LOG_2 - log_s
        store_planes(
            extra + row, plane, (1.0 / s, tl.where(s == s, top1, float("nan")), mean_logprob, sum_e2 / (s * s)), 4
        )
    store_planes(saved + row, plane, (m, s, mean_d, variance, miss, scale_hi, scale_lo), 7)


@triton.jit(do_not_specialize=["entropy_stride", "lse_stride", "logprob_stride", "varentropy_stride", "rows"])
def coefficients_kernel(
    saved,
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
    """The coefficients of each row's gradient; a plane that no upstream gradient needs stays unwritten.

    term, upstream g    constant    linear    quadratic    alpha          all times 1 / tau, the first three over s
    entropy                         -g
    lse                  g
    log prob            -g                                  g (1 - p_t)    and no constant at the target
    varentropy          -g V        2 g       g
    """
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    exists = row < rows
    plane = rows.to(tl.int64)
    saved += row
    scale_hi = tl.load(saved + 5 * plane, mask=exists, other=0.0)
    # A NaN temperature marks a bad row, whose gradient is NaN; only a masked row has a scale of 0.
    kept = exists & (scale_hi != 0.0)
    inv_tau = scale_hi * LOG_2
    over_s = inv_tau / tl.load(saved + plane, mask=kept, other=1.0)
    constant = tl.zeros([BLOCK], tl.float32)
    linear = tl.zeros([BLOCK], tl.float32)
    coefficients += row
    if grad_entropy is not None:
        linear -= tl.load(grad_entropy + row * entropy_stride, mask=kept, other=0.0)
    if grad_lse is not None:
        constant += tl.load(grad_lse + row * lse_stride, mask=kept, other=0.0)
    if grad_varentropy is not None:
        g = tl.load(grad_varentropy + row * varentropy_stride, mask=kept, other=0.0)
        constant -= g * tl.load(saved + 3 * plane, mask=kept, other=0.0)
        linear += 2 * g
        tl.store(coefficients + 2 * plane, g * over_s, mask=kept)
    if grad_logprob is not None:
        g = tl.load(grad_logprob + row * logprob_stride, mask=kept, other=0.0)
        miss = tl.load(saved + 4 * plane, mask=kept, other=0.0)
        tl.store(coefficients + 3 * plane, constant * over_s, mask=kept)
        tl.store(coefficients + 4 * plane, g * inv_tau * miss, mask=kept)
        constant -= g
    tl.store(coefficients, constant * over_s, mask=kept)
    tl.store(coefficients + plane, linear * over_s, mask=kept)


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
    SECOND_MOMENT: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a tile of a row; `target` is None where the loss does not use the log-probability."""
    TILE: tl.constexpr = LANES * UNROLL * VECTOR
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    start = tl.program_id(1) * TILE
    columns = tile_columns(start, LANES, UNROLL, VECTOR)
    exists = columns < vocab
    out += row_offset(row, inner, out_outer_stride, out_inner_stride)
    saved += row
    scale_hi = tl.load(saved + 5 * plane)
    if scale_hi == 0:
        tl.store(out + columns, tl.zeros([UNROLL, LANES, VECTOR], out.dtype.element_ty), mask=exists)
        return
    scale_lo = tl.load(saved + 6 * plane)
    m = tl.load(saved)
    mean_d = tl.load(saved + 2 * plane) * LOG2_E
    coefficients += row
    constant = tl.load(coefficients)
    linear = tl.load(coefficients + plane) * LOG_2
    quadratic = None
    if SECOND_MOMENT:
        quadratic = tl.load(coefficients + 2 * plane) * (LOG_2 * LOG_2)
    logits += row_offset(row, inner, outer_stride, inner_stride)
    z = tl.load(logits + columns, mask=exists, other=-float("inf"))
    gradient = tile_gradient(z, m, scale_hi, scale_lo, mean_d, constant, linear, quadratic)
    if target is not None:
        column = tl.load(target + row)
        # A target outside [0, V) is another rank's, and no tile holds it.
        if (column >= start) & (column < tl.minimum(start + TILE, vocab)):
            z_t = tl.load(logits + column)
            target_constant = tl.load(coefficients + 3 * plane)
            alpha = tl.load(coefficients + 4 * plane)
            at_target = tile_gradient(z_t, m, scale_hi, scale_lo, mean_d, target_constant, linear, quadratic) + alpha
            gradient = tl.where(columns == column, at_target, gradient)
    tl.store(out + columns, gradient.to(out.dtype.element_ty), mask=exists)


@triton.jit
def load_sums(
    partials,
    row,
    rows,
    splits,
    scale_hi,
    scale_lo,
    SECOND_MOMENT: tl.constexpr,
    EXTRA: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """The sums of a row, united from those of its splits, which `store_sums` stored as (fields, splits, rows)."""
    split = tl.arange(0, MAX_SPLITS)
    present = split < splits
    planes = partials + split * rows + row
    plane = rows.to(tl.int64) * splits
    m = tl.load(planes, mask=present, other=-float("inf"))
    s = tl.load(planes + plane, mask=present, other=0.0)
    a = tl.load(planes + 2 * plane, mask=present, other=0.0) * LOG2_E
    b, count, sum_d, sum_e2 = a, a, a, a
    if SECOND_MOMENT:
        b = tl.load(planes + 3 * plane, mask=present, other=0.0) * (LOG2_E * LOG2_E)
    if EXTRA:
        planes += (4 if SECOND_MOMENT else 3) * plane
        count = tl.load(planes, mask=present, other=0.0)
        sum_d = tl.load(planes + plane, mask=present, other=0.0) * LOG2_E
        sum_e2 = tl.load(planes + 2 * plane, mask=present, other=0.0)
    return unite((m, s, a, b, count, sum_d, sum_e2), scale_hi, scale_lo, SECOND_MOMENT, EXTRA)


@triton.jit
def store_sums(planes, plane, sums, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """Stores the sums in nats at `planes`, a plane per field, without the fields that were not computed."""
    m, s, a, b, count, sum_d, sum_e2 = sums
    tl.store(planes, m)
    tl.store(planes + plane, s)
    tl.store(planes + 2 * plane, a * LOG_2)
    if SECOND_MOMENT:
        tl.store(planes + 3 * plane, b * (LOG_2 * LOG_2))
    if EXTRA:
        planes += (4 if SECOND_MOMENT else 3) * plane
        tl.store(planes, count)
        tl.store(planes + plane, sum_d * LOG_2)
        tl.store(planes + 2 * plane, sum_e2)


@triton.jit
def target_logit(logits, target, vocab):
    """The logit of column `target` of the row at `logits`, NaN outside [0, vocab)."""
    exists = (target >= 0) & (target < vocab)
    return tl.load(logits + target, mask=exists, other=float("nan")).to(tl.float32)


@triton.jit
def store_planes(planes, plane, values, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(planes + i * plane, values[i])


@triton.jit
def store_zeros(row, plane, entropy, lse, logprob, varentropy, extra, saved):
    """Stores the results of a masked row, without those that are None."""
    tl.store(entropy + row, 0.0)
    tl.store(lse + row, 0.0)
    if logprob is not None:
        tl.store(logprob + row, 0.0)
    if varentropy is not None:
        tl.store(varentropy + row, 0.0)
    if extra is not None:
        store_planes(extra + row, plane, (0.0, 0.0, 0.0, 0.0), 4)
    store_planes(saved + row, plane, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 7)
