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

Sums are kept per lane, the logits that one thread loads: a loop over blocks exchanges nothing between threads.

With a softcap c the logits are c tanh(z / c) in place of z, and the gradient is multiplied by 1 - tanh(z / c)^2.
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
_TWO_ULP: tl.constexpr = tl.constexpr(2.0**-22)


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

    In a row all but one-hot the gradient is one exponential, and its relative error is the rounding of d. 2^d is
    therefore corrected, to first order, by what rounding lost of z - m and of the product. Where `scale_lo` is None it
    is not: the gradient of 16-bit logits is rounded more coarsely than that.
    """
    lowest = _LOWEST_EXPONENT / scale_hi
    m = tl.where(m == -float("inf"), 0.0, m)
    if scale_lo is None:
        d = tl.maximum(z - m, lowest, propagate_nan=tl.PropagateNan.ALL) * scale_hi
        return d, tl.exp2(d)
    else:
        # The bound is put on z, so that what rounding lost of z - m is right at the bound, too. Where m + lowest rounds
        # to m, the next smaller number is low enough.
        floor = tl.minimum(m + lowest, m - tl.abs(m) * _TWO_ULP)
        z = tl.maximum(z, floor, propagate_nan=tl.PropagateNan.ALL)
        difference = z - m
        back = difference - z
        lost = (z - (difference - back)) - (m + back)
        d = difference * scale_hi
        rest = tl.fma(difference, scale_hi, -d)
        rest = tl.fma(difference, scale_lo, rest)
        rest = tl.fma(lost, scale_hi, rest)
        e = tl.exp2(d)
        return d, tl.fma(e * LOG_2, rest, e)


@triton.jit
def capped(z, softcap):
    """c tanh(z / c) and its derivative 1 - tanh(z / c)^2; -inf stays a banned token, +inf and NaN stay as they are."""
    if softcap is None:
        return z, 1.0
    else:
        x = tl.abs(z) / softcap
        # With q = e^(-2x): tanh x = 1 - 2 q / (1 + q) and 1 - tanh^2 x = 4 q / (1 + q)^2, neither of which cancels but
        # the first for small x, where the series to x^9 has float32's accuracy.
        q = tl.exp2(x * (-2 * LOG2_E))
        square = x * x
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        size = tl.where(x < 0.25, softcap * series, softcap - 2 * softcap * q / (1 + q))
        finite = x < float("inf")
        return tl.where(finite, tl.where(z < 0, -size, size), z), 4 * q / ((1 + q) * (1 + q))


@triton.jit
def empty_sums(LANES: tl.constexpr):
    """The sums over no column, of each lane."""
    zero = tl.zeros([LANES], tl.float32)
    return zero - float("inf"), zero, zero, zero, zero, zero, zero


@triton.jit
def move(sums, m, scale_hi, scale_lo, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """The sums of parts with d measured from m, which is at least every part's maximum."""
    own_m, s, a, b, count, sum_d, sum_e2 = sums
    shift, decay = exponential(own_m, m, scale_hi, scale_lo)
    if SECOND_MOMENT:
        b = decay * (b + shift * (2 * a + shift * s))
    if EXTRA:
        # A part without columns has m = -inf and no d to move. A part of banned tokens has d, which become -inf.
        distance = tl.where(own_m == m, 0.0, own_m - m)
        sum_d = tl.where(count == 0.0, 0.0, sum_d + count * (distance * scale_hi))
        sum_e2 = decay * decay * sum_e2
    return m, decay * s, decay * (a + shift * s), b, count, sum_d, sum_e2


@triton.jit
def accumulate(sums, tiles, scale_hi, scale_lo, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """The sums of each lane after a tuple of tiles of logits is added to them, which may be None for no sums.

    An absent column is -inf like a banned token, so a tile needs no mask: `count` and `sum_d` leave out every logit of
    -inf, and whoever wants them knows the number of columns.
    """
    COUNT: tl.constexpr = len(tiles)
    m = tl.max(tiles[0], axis=1)
    for i in tl.static_range(1, COUNT):
        m = tl.maximum(m, tl.max(tiles[i], axis=1))
    if sums is None:
        s = tl.zeros_like(m)
        a, b, count, sum_d, sum_e2 = s, s, s, s, s
    else:
        m = tl.maximum(m, sums[0])
        m, s, a, b, count, sum_d, sum_e2 = move(sums, m, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    for i in tl.static_range(COUNT):
        z = tiles[i]
        d, e = exponential(z, m[:, None], scale_hi, scale_lo)
        de = d * e
        s += tl.sum(e, axis=1)
        a += tl.sum(de, axis=1)
        if SECOND_MOMENT:
            b += tl.sum(d * de, axis=1)
        if EXTRA:
            # The d of `exponential` is bounded from below, and the sum of d must not be.
            distance = z - tl.where(m == -float("inf"), 0.0, m)[:, None]
            finite = distance > -float("inf")
            count += tl.sum(tl.where(finite, 1.0, 0.0), axis=1)
            sum_d += tl.sum(tl.where(finite, distance, 0.0), axis=1) * scale_hi
            sum_e2 += tl.sum(e * e, axis=1)
    return m, s, a, b, count, sum_d, sum_e2


@triton.jit
def unite(sums, scale_hi, scale_lo, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """The sums of the whole from vectors of the parts' sums."""
    m = tl.max(sums[0], axis=0)
    m, s, a, b, count, sum_d, sum_e2 = move(sums, m, scale_hi, scale_lo, SECOND_MOMENT, EXTRA)
    s, a = tl.sum(s, axis=0), tl.sum(a, axis=0)
    if SECOND_MOMENT:
        b = tl.sum(b, axis=0)
    if EXTRA:
        count = tl.sum(count, axis=0)
        sum_d = tl.where(m == -float("inf"), 0.0, tl.sum(sum_d, axis=0))
        sum_e2 = tl.sum(sum_e2, axis=0)
    return m, s, a, b, count, sum_d, sum_e2


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
def tile_gradient(z, m, scale_hi, scale_lo, mean_d, constant, linear, quadratic):
    """2^d (constant + linear u + quadratic u^2) with u = d - mean_d, in units of log 2; what is None is 0.

    log s does not appear: it has no relative accuracy in rows that are all but one-hot, and the gradient keeps its own.
    """
    d, e = exponential(z, m, scale_hi, scale_lo)
    if scale_lo is not None:
        # d has no bound then, and at tiny temperatures its product with a coefficient may not be finite.
        d = tl.maximum(d, _LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)
    # linear u is one fused multiply-add. What rounding costs it is a part of |linear mean_d|, the entry at the maximum.
    slope = tl.fma(d, linear, -mean_d * linear)
    if quadratic is not None:
        u = d - mean_d
        slope = tl.fma(quadratic * u, u, slope)
    if constant is not None:
        slope += constant
    return e * slope
