"""The arithmetic of every Triton kernel, once: sums of a block, the union of partial sums, the gradient of a block.

A partial (m, s, a, b) describes any part of a row z of logits, with d_j = (z_j - m) / tau in units of log 2:

    m = max z      s = sum 2^d      a = sum d 2^d      b = sum d^2 2^d

and two parts unite after moving each to the larger maximum, D = (m_part - m) / tau:

    s = sum 2^D s_part      a = sum 2^D (a_part + D s_part)      b = sum 2^D (b_part + 2 D a_part + D^2 s_part)

Base 2 because that is the exponential the hardware has; log 2 is folded into 1 / tau once a row, to c = log2(e) / tau,
the sum of a float32 `scale_hi` and what is left, `scale_lo`. The maximum is subtracted before the scaling, so a row's
offset costs no precision. The identity is (-inf, 0, 0, 0).

Tiles are (UNROLL, LANES, VECTOR): VECTOR contiguous elements are one 16-byte load of one thread, LANES is the number
of threads, and UNROLL loads are in flight at once. Partials are per lane: a loop over tiles exchanges nothing between
threads.
"""

import triton
import triton.language as tl

LOG_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
# Its nearest float32, and what that leaves out.
_LOG2_E_HI: tl.constexpr = tl.constexpr(1.44269502162933349609375)
_LOG2_E_LO: tl.constexpr = tl.constexpr(1.92596303350001e-08)
# 2^-200 is 0 in float32, and (-200) 2^-200 is 0 where (-inf) * 0 is NaN: banned tokens and absent columns count 0.
_LOWEST_EXPONENT: tl.constexpr = tl.constexpr(-200.0)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """Offset of a row's first element in logits of shape (outer, inner, V), in 64 bits."""
    return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def tile_columns(start, LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr):
    unroll = tl.arange(0, UNROLL)[:, None, None] * (LANES * VECTOR)
    lane = tl.arange(0, LANES)[None, :, None] * VECTOR
    return start + unroll + lane + tl.arange(0, VECTOR)[None, None, :]


@triton.jit
def exponent_scale(row_temperature, common_hi, common_lo, row):
    """log2(e) / tau of a row, in two parts."""
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
    therefore has 2^d corrected, to first order, by what rounding lost of z - m and of the product. A 16-bit z does
    not: its gradient is rounded more coarsely than that.
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
def empty_partials(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return zero - float("inf"), zero, zero, zero


@triton.jit
def accumulate(m, s, a, b, z, scale_hi, scale_lo, SQUARES: tl.constexpr):
    """Add a tile z to the partial of each lane; b is kept only where SQUARES."""
    old_m = m
    m = tl.maximum(m, tl.max(tl.max(z, axis=2), axis=0).to(tl.float32))
    d, e = exponential(z, m[None, :, None], scale_hi, scale_lo)
    de = d * e
    # As one of the tile's own: a maximum of 16 bits needs no more care than its elements.
    shift, decay = exponential(old_m.to(z.dtype), m, scale_hi, scale_lo)
    if SQUARES:
        b = decay * (b + shift * (2 * a + shift * s)) + tl.sum(tl.sum(d * de, axis=2), axis=0)
    a = decay * (a + shift * s) + tl.sum(tl.sum(de, axis=2), axis=0)
    s = decay * s + tl.sum(tl.sum(e, axis=2), axis=0)
    return m, s, a, b


@triton.jit
def unite(m, s, a, b, scale_hi, scale_lo):
    """The partial of the whole from a vector of partials, whose m may be of the logits' dtype."""
    whole = tl.max(m, axis=0).to(tl.float32)
    shift, decay = exponential(m, whole, scale_hi, scale_lo)
    b = tl.sum(decay * (b + shift * (2 * a + shift * s)), axis=0)
    a = tl.sum(decay * (a + shift * s), axis=0)
    return whole, tl.sum(decay * s, axis=0), a, b


@triton.jit
def entropy_of(s, a):
    """H = log s - a / s, in nats; NaN of an empty row."""
    return (tl.log2(s) - a / s) * LOG_2


@triton.jit
def block_gradient(z, m, scale_hi, scale_lo, mean, constant, linear, quadratic):
    """2^d (constant + linear u + quadratic u^2) with u = d - mean, in units of log 2; `quadratic` None is 0.

    log s does not appear: this keeps its relative accuracy in rows that are all but one-hot, where log s has none.
    """
    d, e = exponential(z, m, scale_hi, scale_lo)
    u = d - mean
    if quadratic is not None:
        linear += quadratic * u
    return e * (linear * u + constant)
