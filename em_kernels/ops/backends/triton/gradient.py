"""Kernels of the gradient of any mix of a row's statistics, in one read and one write of the row.

`coefficients_kernel` makes five planes from the saved ones and the upstream gradients: constant, linear, quadratic,
target_constant and alpha. `row_gradient_kernel` reads logits and writes, with u = d - a/s,

    dL/dz_j = e^d_j (constant + linear u_j + quadratic u_j^2)                  j != t
    dL/dz_t = e^d_t (target_constant + linear u_t + quadratic u_t^2) + alpha

In registers d and mean_d = a/s are in units of log 2 (see `arithmetic`), in memory everything is in nats.
"""

import triton
import triton.language as tl

from em_kernels.ops.backends.triton.arithmetic import LOG2_E, LOG_2, capped, tile_gradient
from em_kernels.ops.backends.triton.sums import target_place
from em_kernels.ops.backends.triton.tiles import (
    find_row,
    first_element,
    load_block,
    places_in,
    places_of_tile,
    store_block,
    store_zeros,
)


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
    address, begin = find_row(logits, row, inner, outer_stride, inner_stride, misaligned, VECTOR)
    at = (address, misaligned, vocab) if misaligned is None else (address, begin, begin + vocab)
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
