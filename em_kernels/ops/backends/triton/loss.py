"""Kernels of the reduced entropy loss, which write the gradient in the forward pass.

The row factor r = w / (total * count) does not depend on the logits, so the gradient

    dL/dz_j = -(r / tau) / s * e^d_j (d_j - a/s)

follows as soon as the sums (m, s, a) of a row are known, while its logits are still in the second-level cache: one read
and one write of device memory. A row is cut into parts of a block each, which are two tasks each, the part's sums and
the part's gradient; `schedule` gives their order, and the reason why it is safe. A row of weight 0 is not read. Sums
and losses are float32.

A token weight or a total that is None counts as 1, and so does a total of 0.
"""

import triton
import triton.language as tl

from em_kernels.ops.backends.triton.arithmetic import (
    LOG_2,
    accumulate,
    capped,
    exponent_scale,
    tile_gradient,
    unite,
)
from em_kernels.ops.backends.triton.schedule import task_of
from em_kernels.ops.backends.triton.statistics import load_sums, logits_of, store_sums
from em_kernels.ops.backends.triton.tiles import find_row, load_block, places_in, store_block, store_zeros

# `counters` start with the next ticket and the number of rows that have stored their loss; a counter a row follows.
FIRST_COUNTER: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["inner", "misaligned", "rows", "lag"])
def entropy_gradient_kernel(
    logits,
    token_weight,
    total,
    row_temperature,
    counters,
    scratch,
    loss,
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
    lag,
    inverse_count,
    common_hi,
    common_lo,
    softcap,
    SUM_WEIGHTS: tl.constexpr,
    PARTS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a ticket; `counters` are 0 at first, `scratch` holds the parts' sums, the rows' losses and the total.

    With SUM_WEIGHTS the total is the sum of the weights, which the program of the first ticket makes.
    """
    plane = PARTS * rows.to(tl.int64)
    losses = scratch + 3 * plane
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    arrivals = PARTS
    if SUM_WEIGHTS:
        total = losses + rows
        if ticket == 0:
            sum_weights(token_weight, total, counters + FIRST_COUNTER, rows, LANES)
            return
        arrivals += 1
        ticket -= 1
    row, part, is_gradient = task_of(ticket, rows, PARTS, lag)
    start = part * (LANES * UNROLL * VECTOR)
    at = find_row(logits, row, inner, outer_stride, inner_stride, vocab, misaligned, VECTOR)
    arrived = counters + FIRST_COUNTER + row
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    EXACT: tl.constexpr = logits.dtype.element_ty == tl.float32
    MAX_PARTS: tl.constexpr = max(32, triton.next_power_of_2(PARTS))
    weight = 1.0
    if token_weight is not None:
        weight = tl.load(token_weight + row).to(tl.float32)
    # What rounding lost of the scale matters to float32 logits only.
    if EXACT:
        lo = scale_lo
    else:
        lo: tl.constexpr = None
    if is_gradient:
        out = places_in(out, row, inner, out_outer_stride, out_inner_stride, at, VECTOR, CONGRUENT)
        if weight == 0.0:
            store_zeros(out, at, start, LANES, UNROLL, VECTOR, CONGRUENT)
            if part == 0:
                add_loss(0.0, row, losses, loss, counters + 1, rows, LANES)
        else:
            # The loads are under way while the program waits and unites the parts.
            tiles = load_block(at, start, LANES, UNROLL, VECTOR, False)
            while tl.atomic_add(arrived, 0, sem="acquire") < arrivals:
                pass
            m, s, a, _, _, _, _ = load_sums(scratch, row, rows, PARTS, scale_hi, lo, False, False, MAX_PARTS)
            row_factor = weight * inverse_count
            if total is not None:
                divisor = tl.load(total)
                row_factor /= tl.where(divisor == 0.0, 1.0, divisor)
            mean_d = a / s
            # One log 2 makes 1 / tau of c, the other makes nats of d.
            linear = -row_factor * scale_hi * (LOG_2 * LOG_2) / s
            store_block(
                out,
                at,
                start,
                tiles,
                entropy_gradient,
                (m, scale_hi, lo, mean_d, linear, softcap),
                LANES,
                VECTOR,
                CONGRUENT,
            )
            if part == 0:
                entropy = (tl.log2(s) - mean_d) * LOG_2
                add_loss(row_factor * entropy, row, losses, loss, counters + 1, rows, LANES)
    elif weight != 0.0:
        sums = block_sums(at, start, scale_hi, lo, softcap, LANES, UNROLL, VECTOR)
        store_sums(scratch + part.to(tl.int64) * rows + row, plane, sums, False, False)
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def entropy_gradient(z, place, arguments):
    """The gradient of a row's entropy at a tile z."""
    m, scale_hi, scale_lo, mean_d, linear, softcap = arguments
    z, slope = capped(z, softcap)
    return tile_gradient(z, m, scale_hi, scale_lo, mean_d, None, linear, None) * slope


@triton.jit
def block_sums(
    row, start, scale_hi, scale_lo, softcap, LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr
):
    """The sums over a block of a row."""
    block = load_block(row, start, LANES, UNROLL, VECTOR, True)
    sums = None
    # As many logits at a time as registers hold in float32, beside the rest of the block as it was loaded.
    GROUP: tl.constexpr = min(UNROLL, 4)
    for i in tl.static_range(UNROLL // GROUP):
        sums = accumulate(sums, logits_of(block, i * GROUP, GROUP, softcap), scale_hi, scale_lo, False, False)
    return unite(sums, scale_hi, scale_lo, False, False)


@triton.jit
def sum_weights(token_weight, total, arrived, rows, BLOCK: tl.constexpr):
    """Stores the sum of the weights, in a fixed order, and tells every row of it."""
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        sums += tl.load(token_weight + row, mask=row < rows, other=0).to(tl.float32)
    tl.store(total, tl.sum(sums, axis=0))
    tl.debug_barrier()
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        tl.atomic_add(arrived + row, 1, mask=row < rows, sem="release")


@triton.jit
def add_loss(value, row, losses, loss, stored, rows, BLOCK: tl.constexpr):
    """Stores the loss of a row; the program that stores the last of them adds up all, in the order of the rows."""
    tl.store(losses + row, value)
    tl.debug_barrier()
    if tl.atomic_add(stored, 1, sem="acq_rel") == rows - 1:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, rows, BLOCK):
            other = start + tl.arange(0, BLOCK)
            sums += tl.load(losses + other, mask=other < rows, other=0.0)
        tl.store(loss, tl.sum(sums, axis=0))


@triton.jit(do_not_specialize=["inner", "misaligned", "parts", "blocks"])
def scale_kernel(
    gradient,
    factor,
    inner,
    vocab,
    outer_stride,
    inner_stride,
    misaligned,
    parts,
    blocks,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Multiplies a gradient by a factor that is read on the device; a program takes block after block."""
    factor = tl.load(factor).to(tl.float32)
    if factor == 1.0:
        return
    for block in range(tl.program_id(0), blocks, tl.num_programs(0)):
        row = find_row(gradient, block // parts, inner, outer_stride, inner_stride, vocab, misaligned, VECTOR)
        start = (block % parts) * (LANES * UNROLL * VECTOR)
        tiles = load_block(row, start, LANES, UNROLL, VECTOR, False)
        store_block(row[0], row, start, tiles, product, (factor,), LANES, VECTOR, True)


@triton.jit
def product(z, place, arguments):
    return z * arguments[0]
