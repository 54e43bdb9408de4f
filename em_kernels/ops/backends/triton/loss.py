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
    empty_sums,
    exponent_scale,
    tile_gradient,
    unite,
)
from em_kernels.ops.backends.triton.schedule import task_of
from em_kernels.ops.backends.triton.statistics import load_sums, logits_of, store_sums
from em_kernels.ops.backends.triton.tiles import find_row, load_block, store_tile, store_zeros, widened

# `counters` start with the next ticket and the number of rows that have stored their loss; a counter a row follows.
FIRST_COUNTER: tl.constexpr = tl.constexpr(2)


@triton.jit(do_not_specialize=["inner", "misaligned", "out_misaligned", "rows", "parts", "lag"])
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
    out_misaligned,
    rows,
    parts,
    lag,
    inverse_count,
    common_hi,
    common_lo,
    softcap,
    SUM_WEIGHTS: tl.constexpr,
    MAX_PARTS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a ticket; `counters` are 0 at first, `scratch` holds the parts' sums, the rows' losses and the total.

    With SUM_WEIGHTS the total is the sum of the weights, which the program of the first ticket makes.
    """
    losses = scratch + 3 * parts.to(tl.int64) * rows
    ticket = tl.atomic_add(counters, 1, sem="relaxed")
    arrivals = parts
    if SUM_WEIGHTS:
        total = losses + rows
        arrivals += 1
        ticket -= 1
    if ticket < 0:
        sum_weights(token_weight, total, counters + FIRST_COUNTER, rows, LANES)
    else:
        row, part, is_gradient = task_of(ticket, rows, parts, lag)
        start = part * (LANES * UNROLL * VECTOR)
        at = find_row(logits, row, inner, outer_stride, inner_stride, vocab, misaligned, VECTOR)
        arrived = counters + FIRST_COUNTER + row
        scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
        weight = 1.0
        if token_weight is not None:
            weight = tl.load(token_weight + row).to(tl.float32)
        if is_gradient:
            out_at = find_row(out, row, inner, out_outer_stride, out_inner_stride, vocab, out_misaligned, VECTOR)
            row_loss = 0.0
            if weight == 0.0:
                store_zeros(out_at, at, start, LANES, UNROLL, VECTOR)
            else:
                # The loads are under way while the program waits and unites the parts.
                tiles = load_block(at, start, LANES, UNROLL, VECTOR, False)
                while tl.atomic_add(arrived, 0, sem="acquire") < arrivals:
                    pass
                m, s, a, _, _, _, _ = load_sums(scratch, row, rows, parts, scale_hi, scale_lo, False, False, MAX_PARTS)
                row_factor = weight * inverse_count
                if total is not None:
                    divisor = tl.load(total)
                    row_factor /= tl.where(divisor == 0.0, 1.0, divisor)
                row_loss = row_factor * entropy_of(s, a)
                store_gradient(
                    out_at, at, start, tiles, (m, s, a), row_factor, scale_hi, scale_lo, softcap, LANES, VECTOR
                )
            if part == 0:
                tl.store(losses + row, row_loss)
                add_losses(losses, loss, counters + 1, rows, LANES)
        elif weight != 0.0:
            sums = block_sums(at, start, scale_hi, scale_lo, softcap, LANES, UNROLL, VECTOR)
            plane = parts.to(tl.int64) * rows
            store_sums(scratch + part.to(tl.int64) * rows + row, plane, sums, False, False)
            tl.debug_barrier()
            tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def block_sums(
    row, start, scale_hi, scale_lo, softcap, LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr
):
    """The sums over a block of a row."""
    EXACT: tl.constexpr = row[0].dtype.element_ty == tl.float32
    lo = scale_lo if EXACT else None
    block = load_block(row, start, LANES, UNROLL, VECTOR, True)
    sums = empty_sums(LANES)
    # As many logits at a time as registers hold in float32, beside the rest of the block as it was loaded.
    GROUP: tl.constexpr = min(UNROLL, 4)
    for i in tl.static_range(UNROLL // GROUP):
        sums = accumulate(sums, logits_of(block, i * GROUP, GROUP, softcap), scale_hi, lo, False, False)
    return unite(sums, scale_hi, scale_lo, False, False)


@triton.jit
def store_gradient(
    out, row, start, tiles, sums, row_factor, scale_hi, scale_lo, softcap, LANES: tl.constexpr, VECTOR: tl.constexpr
):
    """Stores the gradient of a block of a row, from the row's sums."""
    m, s, a = sums
    EXACT: tl.constexpr = row[0].dtype.element_ty == tl.float32
    COUNT: tl.constexpr = len(tiles)
    lo = scale_lo if EXACT else None
    # One log 2 makes 1 / tau of c, the other makes nats of d.
    linear = -row_factor * scale_hi * (LOG_2 * LOG_2) / s
    for i in tl.static_range(COUNT):
        z, slope = capped(widened(tiles[i]), softcap)
        gradient = tile_gradient(z, m, scale_hi, lo, a / s, None, linear, None)
        store_tile(out, row, start, i * (LANES * VECTOR), gradient * slope, LANES, VECTOR)


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
def add_losses(losses, loss, stored, rows, BLOCK: tl.constexpr):
    """Called by a program that has stored a row's loss: the last of them adds up all, in a fixed order."""
    tl.debug_barrier()
    if tl.atomic_add(stored, 1, sem="acq_rel") == rows - 1:
        sums = tl.zeros([BLOCK], tl.float32)
        for start in range(0, rows, BLOCK):
            row = start + tl.arange(0, BLOCK)
            sums += tl.load(losses + row, mask=row < rows, other=0.0)
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
        for i in tl.static_range(UNROLL):
            scaled = widened(tiles[i]) * factor
            store_tile(row, row, start, i * (LANES * VECTOR), scaled, LANES, VECTOR)


@triton.jit
def entropy_of(s, a):
    """H = log s - a / s, in nats; NaN of an empty row."""
    return (tl.log2(s) - a / s) * LOG_2
