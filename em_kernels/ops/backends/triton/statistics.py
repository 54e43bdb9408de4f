"""Kernels of per-token statistics, which read a row once.

`partial_sums_kernel` makes the sums (m, s, a, b, count, sum_d, sum_e2) of each split of a row, over every column but
the target's. Where a row is one split, the kernel finishes the row itself; elsewhere it writes the sums, and
`finish_kernel` unites the splits. Either way the target's own part follows, m = z_t, s = 1, a = b = 0:

    H = log s - a/s      lse = m / tau + log s      V = b/s - (a/s)^2      log p_t = d_t - log s      1 - p_t = rest / s

with rest the sum s over the other columns. Where the target is the maximum, log s is log1p(rest) and d_t is 0, so
log p_t and 1 - p_t keep their relative accuracy however close p_t is to 1. The gradient (see `gradient`) needs the
logits and the seven planes of `em_kernels.ops.types.Saved`, which are written with the statistics.

Sums and statistics are float32. In the sums and in registers d and mean_d = a/s are in units of log 2 (see
`arithmetic`), in the statistics and in what is saved everything is in nats. An argument that is None switches its part
of a kernel off at compile time.
"""

import triton
import triton.language as tl

from em_kernels.ops.backends.triton.arithmetic import LOG_2, exponent_scale, log1p, unite_with_target
from em_kernels.ops.backends.triton.sums import load_sums, row_sums, store_sums, target_logit, target_place
from em_kernels.ops.backends.triton.tiles import find_row, first_element, row_offset


@triton.jit(do_not_specialize=["inner", "misaligned", "rows", "splits", "split_blocks"])
def partial_sums_kernel(
    logits,
    kept,
    row_temperature,
    target,
    partials,
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
    misaligned,
    rows,
    splits,
    split_blocks,
    common_hi,
    common_lo,
    softcap,
    SECOND_MOMENT: tl.constexpr,
    EXTRA: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a split of a row, of `split_blocks` blocks.

    Writes the sums into `partials`, (fields, splits, rows), where a row whose `kept` is 0 stays unwritten; or, where
    `partials` is None and a row is one split, the statistics and what the row's gradient needs.
    """
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    if kept is not None:
        if tl.load(kept + row) == 0:
            if partials is None:
                store_masked(row, plane, (entropy, lse, logprob, varentropy, extra, saved))
            return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    address, begin = find_row(logits, row, inner, outer_stride, inner_stride, misaligned, VECTOR)
    at = (address, misaligned, vocab) if misaligned is None else (address, begin, begin + vocab)
    column = None
    if target is not None:
        column = tl.load(target + row)
    split = tl.program_id(1)
    first = split * split_blocks * (LANES * UNROLL * VECTOR)
    last = first + split_blocks * (LANES * UNROLL * VECTOR)
    place = None if target is None else target_place(at, column, vocab)
    sums = row_sums(at, first, last, place, scale_hi, scale_lo, softcap, SECOND_MOMENT, EXTRA, LANES, UNROLL, VECTOR)
    if partials is not None:
        store_sums(partials + split.to(tl.int64) * rows + row, plane * splits, sums, SECOND_MOMENT, EXTRA)
    else:
        z = None if target is None else target_logit(first_element(at), column, vocab, softcap)
        results = (entropy, lse, logprob, varentropy, extra, saved)
        finish_row(sums, z, row, plane, scale_hi, scale_lo, results)


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
    softcap,
    MAX_SPLITS: tl.constexpr,
):
    """The statistics of a row, a program a row, and what its gradient needs; all are 0 where `kept` is 0."""
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    if kept is not None:
        if tl.load(kept + row) == 0:
            store_masked(row, plane, (entropy, lse, logprob, varentropy, extra, saved))
            return
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    SECOND_MOMENT: tl.constexpr = varentropy is not None
    EXTRA: tl.constexpr = extra is not None
    sums = load_sums(partials + row, plane * splits, rows, splits, scale_hi, scale_lo, SECOND_MOMENT, EXTRA, MAX_SPLITS)
    z = None
    if target is not None:
        logits += row_offset(row, inner, outer_stride, inner_stride)
        z = target_logit(logits, tl.load(target + row), vocab, softcap)
    finish_row(sums, z, row, plane, scale_hi, scale_lo, (entropy, lse, logprob, varentropy, extra, saved))


@triton.jit
def finish_row(sums, z, row, plane, scale_hi, scale_lo, results):
    """Stores the statistics of a row from its sums over all columns but the target's, whose logit is z."""
    entropy, lse, logprob, varentropy, extra, saved = results
    inv_tau = scale_hi * LOG_2
    if z is not None:
        sums, rest, is_top = unite_with_target(sums, z, scale_hi, scale_lo, varentropy is not None, extra is not None)
    m, s, a, b, count, sum_d, sum_e2 = sums
    # A row of all -inf is empty, and its lse would be -inf, which is not NaN.
    s = tl.where(s == 0.0, float("nan"), s)
    log_s, mean_d = tl.log2(s) * LOG_2, a / s * LOG_2
    miss, top1, variance = 0.0, 0.0, 0.0
    if z is not None:
        log_s = tl.where(is_top, log1p(rest), log_s)
        # The d of `exponential` is bounded from below, and the log-probability of a banned token is -inf.
        tl.store(logprob + row, tl.where(is_top, 0.0, (z - m) * inv_tau) - log_s)
        miss = rest / s
        top1 = is_top.to(tl.float32)
    tl.store(entropy + row, log_s - mean_d)
    tl.store(lse + row, m * inv_tau + log_s)
    if varentropy is not None:
        variance = b / s * (LOG_2 * LOG_2) - mean_d * mean_d
        variance = tl.maximum(variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
        tl.store(varentropy + row, variance)
    if extra is not None:
        mean_logprob = sum_d / count * LOG_2 - log_s
        store_planes(
            extra + row, plane, (1.0 / s, tl.where(s == s, top1, float("nan")), mean_logprob, sum_e2 / (s * s)), 4
        )
    store_planes(saved + row, plane, (m, s, mean_d, variance, miss, scale_hi, scale_lo), 7)


@triton.jit
def store_planes(planes, plane, values, COUNT: tl.constexpr):
    for i in tl.static_range(COUNT):
        tl.store(planes + i * plane, values[i])


@triton.jit
def store_masked(row, plane, results):
    """Stores the results of a masked row, without those that are None."""
    entropy, lse, logprob, varentropy, extra, saved = results
    tl.store(entropy + row, 0.0)
    tl.store(lse + row, 0.0)
    if logprob is not None:
        tl.store(logprob + row, 0.0)
    if varentropy is not None:
        tl.store(varentropy + row, 0.0)
    if extra is not None:
        store_planes(extra + row, plane, (0.0, 0.0, 0.0, 0.0), 4)
    store_planes(saved + row, plane, (0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0), 7)
