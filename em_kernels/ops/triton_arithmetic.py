"""The arithmetic of every Triton kernel, once: sums of a block, the union of partial sums, the gradient of a block.

A partial (m, s, a, b) describes any part of a row z of logits, with d_j = (z_j - m) / tau in units of log 2:

    m = max z      s = sum 2^d      a = sum d 2^d      b = sum d^2 2^d

and two parts unite after moving each to the larger maximum, D = (m_part - m) / tau:

    s = sum 2^D s_part      a = sum 2^D (a_part + D s_part)      b = sum 2^D (b_part + 2 D a_part + D^2 s_part)

Base 2 because that is the exponential the hardware has; log 2 is folded into 1 / tau once a row. The maximum is
subtracted before the scaling, so a row's offset costs no precision. The identity is (-inf, 0, 0, 0).

Tiles are (UNROLL, LANES, VECTOR): VECTOR contiguous elements are one 16-byte load of one thread, LANES is the number
of threads, and UNROLL loads are in flight at once. Partials are per lane: a loop over tiles exchanges nothing between
threads.
"""

import triton
import triton.language as tl

LOG_2: tl.constexpr = tl.constexpr(0.6931471805599453)
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)
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
def centred(z, m, inv_tau):
    """d = (z - m) / tau, finite for z = -inf; NaN where z is NaN or +inf."""
    d = (z - tl.where(m == -float("inf"), 0.0, m)) * inv_tau
    return tl.maximum(d, _LOWEST_EXPONENT, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def empty_partials(LANES: tl.constexpr):
    zero = tl.zeros([LANES], tl.float32)
    return zero - float("inf"), zero, zero, zero


@triton.jit
def accumulate(m, s, a, b, z, inv_tau, SQUARES: tl.constexpr):
    """Add a tile z to the partial of each lane; b is kept only where SQUARES."""
    old_m = m
    m = tl.maximum(m, tl.max(tl.max(z, axis=2), axis=0))
    d = centred(z, m[None, :, None], inv_tau)
    e = tl.exp2(d)
    de = d * e
    shift = centred(old_m, m, inv_tau)
    decay = tl.exp2(shift)
    if SQUARES:
        b = decay * (b + shift * (2 * a + shift * s)) + tl.sum(tl.sum(d * de, axis=2), axis=0)
    a = decay * (a + shift * s) + tl.sum(tl.sum(de, axis=2), axis=0)
    s = decay * s + tl.sum(tl.sum(e, axis=2), axis=0)
    return m, s, a, b


@triton.jit
def unite(m, s, a, b, inv_tau):
    """The partial of the whole from a vector of partials."""
    whole = tl.max(m, axis=0)
    shift = centred(m, whole, inv_tau)
    decay = tl.exp2(shift)
    b = tl.sum(decay * (b + shift * (2 * a + shift * s)), axis=0)
    a = tl.sum(decay * (a + shift * s), axis=0)
    return whole, tl.sum(decay * s, axis=0), a, b


@triton.jit
def entropy_of(s, a):
    """H = log s - a / s, in nats; NaN of an empty row."""
    return (tl.log2(s) - a / s) * LOG_2


@triton.jit
def block_gradient(z, m, inv_tau, mean, constant, linear, quadratic):
    """2^d (constant + linear u + quadratic u^2) with u = d - mean, in units of log 2; `quadratic` None is 0.

    log s does not appear: this keeps its relative accuracy in rows that are all but one-hot, where log s has none.
    """
    d = centred(z, m, inv_tau)
    u = d - mean
    if quadratic is not None:
        linear += quadratic * u
    return tl.exp2(d) * (linear * u + constant)
