"""Kernels of per-token statistics: the sums of a row, the statistics they make, and the gradient of any mix of these.

A row is read once for its statistics and once more for its gradient, which is written in the same pass.

`partial_sums_kernel` reads logits and makes the sums (m, s, a, b, count, sum_d, sum_e2) of each split of a row, over
every column but the target's. Only the tile that holds the target pays for leaving it out. Where a row is one split,
the kernel finishes the row itself; elsewhere it writes the sums, and `finish_kernel` unites the splits. Either way the
target's own part follows, m = z_t, s = 1, a = b = 0:

    H = log s - a/s      lse = m / tau + log s      V = b/s - (a/s)^2      log p_t = d_t - log s      1 - p_t = rest / s

with rest the sum s over the other columns. Where the target is the maximum, log s is log1p(rest) and d_t is 0, so
log p_t and 1 - p_t keep their relative accuracy however close p_t is to 1. The gradient needs the logits and the seven
planes of `em_kernels.ops.types.Saved`, which are written with the statistics.

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
    accumulate,
    capped,
    empty_sums,
    exponent_scale,
    log1p,
    tile_gradient,
    unite,
    unite_with_target,
)
from em_kernels.ops.backends.triton.tiles import (
    find_row,
    first_element,
    load_block,
    places_in,
    places_of_tile,
    row_offset,
    store_block,
    store_zeros,
    widened,
)


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
    at = find_row(logits, row, inner, outer_stride, inner_stride, vocab, misaligned, VECTOR)
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


@triton.jit(do_not_specialize=["inner", "misaligned", "rows"])
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
    misaligned,
    out_outer_stride,
    out_inner_stride,
    CONGRUENT: tl.constexpr,
    rows,
    softcap,
    SECOND_MOMENT: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a block of a row; `target` is None where the loss does not use the log-probability."""
    row = tl.program_id(0).to(tl.int64)
    plane = rows.to(tl.int64)
    start = tl.program_id(1) * (LANES * UNROLL * VECTOR)
    at = find_row(logits, row, inner, outer_stride, inner_stride, vocab, misaligned, VECTOR)
    out = places_in(out, row, inner, out_outer_stride, out_inner_stride, at, VECTOR, CONGRUENT)
    saved += row
    scale_hi = tl.load(saved + 5 * plane)
    if scale_hi == 0:
        store_zeros(out, at, start, LANES, UNROLL, VECTOR, CONGRUENT)
        return
    tiles = load_block(at, start, LANES, UNROLL, VECTOR, False)
    m = tl.load(saved)
    mean_d = tl.load(saved + 2 * plane) * LOG2_E
    coefficients += row
    constant = tl.load(coefficients)
    linear = tl.load(coefficients + plane) * LOG_2
    # What rounding lost of the scale matters to float32 logits only.
    EXACT: tl.constexpr = logits.dtype.element_ty == tl.float32
    if EXACT:
        scale_lo = tl.load(saved + 6 * plane)
    else:
        scale_lo: tl.constexpr = None
    if SECOND_MOMENT:
        quadratic = tl.load(coefficients + 2 * plane) * (LOG_2 * LOG_2)
    else:
        quadratic: tl.constexpr = None
    if target is not None:
        column = tl.load(target + row)
        # A target outside [0, V) is another rank's, and no tile holds it.
        of_target = (target_place(at, column, vocab), first_element(at) + column, coefficients + 3 * plane, plane)
    else:
        of_target: tl.constexpr = None
    of_row = (m, scale_hi, scale_lo, mean_d, constant, linear, quadratic, softcap)
    store_block(out, at, start, tiles, statistics_gradient, (of_row, of_target), LANES, VECTOR, CONGRUENT)


@triton.jit
def statistics_gradient(z, start, arguments):
    """The gradient of a mix of a row's statistics at the tile z, whose first place is `start`."""
    of_row, of_target = arguments
    m, scale_hi, scale_lo, mean_d, constant, linear, quadratic, softcap = of_row
    z, slope = capped(z, softcap)
    gradient = tile_gradient(z, m, scale_hi, scale_lo, mean_d, constant, linear, quadratic)
    if of_target is not None:
        place, address, target_coefficients, plane = of_target
        LANES: tl.constexpr = z.shape[0]
        VECTOR: tl.constexpr = z.shape[1]
        if (place >= start) & (place < start + LANES * VECTOR):
            z_t, _ = capped(tl.load(address).to(tl.float32), softcap)
            target_constant, alpha = tl.load(target_coefficients), tl.load(target_coefficients + plane)
            at_target = tile_gradient(z_t, m, scale_hi, scale_lo, mean_d, target_constant, linear, quadratic)
            gradient = tl.where(places_of_tile(start, LANES, VECTOR) == place, at_target + alpha, gradient)
    return gradient * slope


@triton.jit
def row_sums(
    row,
    first,
    last,
    place,
    scale_hi,
    scale_lo,
    softcap,
    SECOND_MOMENT: tl.constexpr,
    EXTRA: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The sums over the places [first, last) of a row, without the target's place unless that is None."""
    BLOCK: tl.constexpr = LANES * UNROLL * VECTOR
    _, begin, end = row
    last = tl.minimum(last, end)
    EXACT: tl.constexpr = row[0].dtype.element_ty == tl.float32
    lo = scale_lo if EXACT else None
    sums = empty_sums(LANES)
    for start in range(first, last, BLOCK):
        tiles = logits_of(load_block(row, start, LANES, UNROLL, VECTOR, True), 0, UNROLL, softcap)
        if place is not None:
            if (place >= start) & (place < start + BLOCK):
                tiles = without(tiles, start, place, LANES, VECTOR)
        sums = accumulate(sums, tiles, scale_hi, lo, SECOND_MOMENT, EXTRA)
    m, s, a, b, count, sum_d, sum_e2 = unite(sums, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    if EXTRA:
        # A row that begins at a boundary may have a block less than others, and its last split none.
        width = tl.maximum(last - (first if begin is None else tl.maximum(first, begin)), 0)
        if place is not None:
            width -= ((place >= first) & (place < last)).to(tl.int32)
        # The loop counts the columns that are not -inf; the others are banned tokens.
        banned = (count < width) & (m > -float("inf"))
        count, sum_d = width.to(tl.float32), tl.where(banned, -float("inf"), sum_d)
    return m, s, a, b, count, sum_d, sum_e2


@triton.jit
def logits_of(tiles, FIRST: tl.constexpr, COUNT: tl.constexpr, softcap):
    """The logits of COUNT tiles that `load_block` has loaded, from the tile FIRST on, capped."""
    logits = ()
    for i in tl.static_range(COUNT):
        logits = logits + (capped(widened(tiles[FIRST + i]), softcap)[0],)
    return logits


@triton.jit
def without(tiles, start, place, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """A block's tiles of logits with -inf at a place."""
    COUNT: tl.constexpr = len(tiles)
    others = ()
    for i in tl.static_range(COUNT):
        is_place = places_of_tile(start + i * (LANES * VECTOR), LANES, VECTOR) == place
        others = others + (tl.where(is_place, -float("inf"), tiles[i]),)
    return others


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
def load_sums(
    planes,
    plane,
    stride,
    count,
    scale_hi,
    scale_lo,
    SECOND_MOMENT: tl.constexpr,
    EXTRA: tl.constexpr,
    MAX_PARTS: tl.constexpr,
):
    """The sums of a row, united from those of its `count` parts, which `store_sums` stored.

    A field's first part is at `planes`, the next part `stride` further, and the next field `plane` further.
    """
    part = tl.arange(0, MAX_PARTS)
    present = part < count
    planes += part * stride
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
def target_place(row, column, vocab):
    """The place of a target's column in a row; -1, which no block holds, outside [0, vocab)."""
    _, begin, _ = row
    place = column if begin is None else column + begin
    # Places are 32-bit, and the cast must not make a place of a column out of range.
    return tl.where((column >= 0) & (column < vocab), place, -1).to(tl.int32)


@triton.jit
def target_logit(logits, target, vocab, softcap):
    """The logit of column `target` of the row at `logits`, capped; NaN outside [0, vocab)."""
    exists = (target >= 0) & (target < vocab)
    return capped(tl.load(logits + target, mask=exists, other=float("nan")).to(tl.float32), softcap)[0]


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
