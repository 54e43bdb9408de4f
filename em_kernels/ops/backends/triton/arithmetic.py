"""The arithmetic of every Triton kernel, once: the sums over a part of a row, the union of parts, a tile's gradient.

The sums (m, s, a, b, count, sum_d, sum_e2) describe any part of a row z of logits. With d_j = (z_j - m) / tau in units
of log 2, so that e^((z_j - m) / tau) is 2^d_j, the sums are

    m = max z      s = sum 2^d      a = sum d 2^d      b = sum d^2 2^d
    count = the number of columns      sum_d = sum d      sum_e2 = sum 2^(2 d)

A part moves to the maximum m of a larger part by D = (m_part - m) / tau, after which parts add up:

    s = 2^D s_part      a = 2^D (a_part + D s_part)      b = 2^D (b_part + 2 D a_part + D^2 s_part)
    sum_d = sum_d_part + count D      sum_e2 = 2^(2 D) sum_e2_part

The sums over no column are (-inf, 0, 0, 0, 0, 0, 0), those over a target's column alone (z_t, 1, 0, 0, 1, 0, 1).
A kernel computes b where SECOND_MOMENT, and the last three where EXTRA; the compiler drops the zeros it carries else.

The base is 2 because the hardware has that exponential. The factor log 2 is folded into 1 / tau once a row:
c = log2(e) / tau is the sum of a float32 `scale_hi` and of `scale_lo`, which holds what `scale_hi` rounds off. The
maximum is subtracted before the scaling, so a row's offset costs no precision.

Tiles are (UNROLL, LANES, VECTOR): VECTOR contiguous elements are one 16-byte load of one thread, LANES is the number
of threads, and UNROLL loads are in flight at once. Sums are kept per lane: a loop over tiles exchanges nothing between
threads.
"""

import triton
import triton.language as tl

LOG_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# The float32 nearest to log2(e), and the remainder.
_LOG2_E_HI: tl.constexpr = tl.constexpr(1.44269502162933349609375)
_LOG2_E_LO: tl.constexpr = tl.constexpr(1.92596303350001e-08)
# 2^-200 is 0 in float32, and (-200) 2^-200 is 0 where (-inf) * 0 is NaN: banned tokens and absent columns count 0.
_LOWEST_EXPONENT: tl.constexpr = tl.constexpr(-200.0)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """The offset of a row's first element in logits of shape (outer, inner, V), in 64 bits."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def tile_columns(start, LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr):
    """The columns of the tile that begins at column `start`."""
    unroll = tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return start + unroll + lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def exponent_scale(row_temperature, common_hi, common_lo, row):
    """log2(e) / tau of a row, in two parts; NaN where tau is NaN."""
    if row_temperature is None:
        return common_hi, common_lo
    else:
        tau = tl.load(row_temperature + row)
        hi = _LOG2_E_HI / tau
        return hi, (tl.fma(-hi, tau, _LOG2_E_HI) + _LOG2_E_LO) / tau


@triton.jit
def exponential(z, m, scale_hi, scale_lo):
    """d = (z - m) / tau in units of log 2, and 2^d: finite for z = -inf, NaN where z is NaN or +inf.

    In a row all but one-hot the gradient is one exponential, and its relative error is the rounding of d. A float32 z
    therefore has 2^d corrected, to first order, by what rounding lost of z - m and of the product. A 16-bit z needs no
    correction: its gradient is rounded more coarsely than that.
    """
    lowest = _LOWEST_EXPONENT / scale_hi
    m = tl.where(m == -float("inf"), 0.0, m)
    rounded = z.to(tl.float32) - m
    difference = tl.maximum(rounded, lowest, propagate_nan=tl.PropagateNan.ALL)
    d = difference * scale_hi
    e = tl.exp2(d)
    if z.dtype == tl.float32:
        back = rounded - z
        lost = tl.where(rounded > lowest, (z - (rounded - back)) - (m + back), 0.0)
        rest = tl.fma(difference, scale_hi, -d)
        rest = tl.fma(difference, scale_lo, rest)
        rest = tl.fma(lost, scale_hi, rest)
        e = tl.fma(e * LOG_2, rest, e)
    return d, e


@triton.jit
def empty_sums(LANES: tl.constexpr):
    """The sums over no column, of each lane."""
    zero = tl.zeros([LANES], tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero, zero


@triton.jit
def lane_sum(tile):
    """The sum over a tile's elements, of each lane."""
    return tl.sum(tl.sum(tile, axis=2), axis=0)


@triton.jit
def move(sums, m, scale_hi, scale_lo, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """The sums of parts with d measured from m, which is at least every part's maximum; these maxima may be 16-bit."""
    own_m, s, a, b, count, sum_d, sum_e2 = sums
    shift, decay = exponential(own_m, m, scale_hi, scale_lo)
    if SECOND_MOMENT:
        b = decay * (b + shift * (2 * a + shift * s))
    if EXTRA:
        # A part without columns has m = -inf and no d to move. A part of banned tokens has d, which become -inf.
        distance = tl.where(own_m == m, 0.0, own_m.to(tl.float32) - m)
        sum_d = tl.where(count == 0.0, 0.0, sum_d + count * (distance * scale_hi))
        sum_e2 = decay * decay * sum_e2
    return m, decay * s, decay * (a + shift * s), b, count, sum_d, sum_e2


@triton.jit
def accumulate(sums, z, scale_hi, scale_lo, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """The sums of each lane after a tile z is added to them; `count` and `sum_d` leave out every logit of -inf.

    An absent column is -inf like a banned token, so a tile needs no mask; `row_sums` knows the number of columns.
    """
    old_m, s, a, b, count, sum_d, sum_e2 = sums
    m = tl.maximum(old_m, tl.max(tl.max(z, axis=2), axis=0).to(tl.float32))
    d, e = exponential(z, m[None, :, None], scale_hi, scale_lo)
    de = d * e
    # The old maximum takes the logits' dtype: a 16-bit maximum needs no more care than the elements.
    old = (old_m.to(z.dtype), s, a, b, count, sum_d, sum_e2)
    m, s, a, b, count, sum_d, sum_e2 = move(old, m, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    a += lane_sum(de)
    s += lane_sum(e)
    if SECOND_MOMENT:
        b += lane_sum(d * de)
    if EXTRA:
        # The d of `exponential` is bounded from below, and the sum of d must not be.
        distance = z.to(tl.float32) - tl.where(m == -float("inf"), 0.0, m)[None, :, None]
        finite = distance > -float("inf")
        count += lane_sum(tl.where(finite, 1.0, 0.0))
        sum_d += lane_sum(tl.where(finite, distance, 0.0)) * scale_hi
        sum_e2 += lane_sum(e * e)
    return m, s, a, b, count, sum_d, sum_e2


@triton.jit
def unite(sums, scale_hi, scale_lo, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """The sums of the whole from vectors of the parts' sums; the parts' maxima may be 16-bit."""
    m = tl.max(sums[0], axis=0).to(tl.float32)
    m, s, a, b, count, sum_d, sum_e2 = move(sums, m, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    if SECOND_MOMENT:
        b = tl.sum(b, axis=0)
    if EXTRA:
        count = tl.sum(count, axis=0)
        sum_d = tl.where(m == -float("inf"), 0.0, tl.sum(sum_d, axis=0))
        sum_e2 = tl.sum(sum_e2, axis=0)
    return m, tl.sum(s, axis=0), tl.sum(a, axis=0), b, count, sum_d, sum_e2


@triton.jit
def unite_with_target(sums, z, scale_hi, scale_lo, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """The sums of a row from the sums over all columns but the target's, whose logit is z.

    The second result is the part of s that the other columns make up; the third is whether the target is a maximum.
    """
    is_top = (z >= sums[0]) & (tl.abs(z) < float("inf"))
    m = tl.maximum(sums[0], z)
    _, rest, a, b, count, sum_d, sum_e2 = move(sums, m, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    d, e = exponential(z, m, scale_hi, scale_lo)
    if SECOND_MOMENT:
        b += d * d * e
    if EXTRA:
        count += 1.0
        sum_d += tl.where(z == m, 0.0, z - m) * scale_hi
        sum_e2 += e * e
    return (m, rest + e, a + d * e, b, count, sum_d, sum_e2), rest, is_top


@triton.jit
def log1p(x):
    """log(1 + x) for x >= 0, to the relative accuracy of x: the quotient undoes the rounding of 1 + x."""
    u = 1.0 + x
    return tl.where(u == 1.0, x, tl.log(u) * (x / (u - 1.0)))


@triton.jit
def row_sums(
    logits,
    start,
    stop,
    target,
    scale_hi,
    scale_lo,
    SECOND_MOMENT: tl.constexpr,
    EXTRA: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """The sums over columns [start, stop) of the row at `logits`, without the column `target` unless that is None."""
    TILE: tl.constexpr = LANES * UNROLL * VECTOR
    sums = empty_sums(LANES)
    for column in range(start, stop, TILE):
        columns = tile_columns(column, LANES, UNROLL, VECTOR)
        z = tl.load(logits + columns, mask=columns < stop, other=-float("inf"))
        if target is not None:
            if (target >= column) & (target < column + TILE):
                z = tl.where(columns == target, -float("inf"), z.to(tl.float32)).to(z.dtype)
        sums = accumulate(sums, z, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    m, s, a, b, count, sum_d, sum_e2 = sums
    lanes = (m.to(logits.dtype.element_ty), s, a, b, count, sum_d, sum_e2)
    m, s, a, b, count, sum_d, sum_e2 = unite(lanes, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    if EXTRA:
        width = stop - start
        if target is not None:
            width -= ((target >= start) & (target < stop)).to(tl.int32)
        # The loop counts the columns that are not -inf; the others are banned tokens.
        banned = (count < width) & (m > -float("inf"))
        count, sum_d = width.to(tl.float32), tl.where(banned, -float("inf"), sum_d)
    return m, s, a, b, count, sum_d, sum_e2


@triton.jit
def tile_gradient(z, m, scale_hi, scale_lo, mean_d, constant, linear, quadratic):
    """2^d (constant + linear u + quadratic u^2) with u = d - mean_d, in units of log 2; `quadratic` None is 0.

    log s does not appear: it has no relative accuracy in rows that are all but one-hot, and the gradient keeps its own.
    """
    d, e = exponential(z, m, scale_hi, scale_lo)
    u = d - mean_d
    if quadratic is not None:
        linear += quadratic * u
    return e * (linear * u + constant)
