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
from em_kernels.ops.backends.triton.sums import load_sums, logits_of, store_sums
from em_kernels.ops.backends.triton.tiles import find_row, load_block, places_in, store_block, store_zeros

# What `counters` hold: the next ticket, the number of rows that have stored their loss, the bits of the float32 sum of
# the weights, and from FIRST_ROW on the counter of each row.
_TICKET: tl.constexpr = tl.constexpr(0)
_STORED: tl.constexpr = tl.constexpr(1)
_WEIGHTS: tl.constexpr = tl.constexpr(2)
FIRST_ROW: tl.constexpr = tl.constexpr(3)


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
    MAX_PARTS: tl.constexpr,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """A program a ticket; `counters` are 0 at first, and `scratch` holds the parts' sums and the rows' losses.

    With SUM_WEIGHTS the total is the sum of the weights, which the program of the first ticket makes.
    """
    losses = scratch + 3 * PARTS * rows.to(tl.int64)
    ticket = tl.atomic_add(counters + _TICKET, 1, sem="relaxed")
    if SUM_WEIGHTS:
        if ticket == 0:
            weights = sum_in_order(token_weight, rows, LANES)
            # The bits of 0 say that the sum is not there yet, and a total of 0 counts as 1.
            weights = tl.where(weights == 0.0, 1.0, weights)
            tl.atomic_xchg(counters + _WEIGHTS, weights.to(tl.int32, bitcast=True), sem="relaxed")
            return
        ticket -= 1
    row, part, is_gradient = task_of(ticket, rows, PARTS, lag)
    start = part * (LANES * UNROLL * VECTOR)
    address, begin = find_row(logits, row, inner, outer_stride, inner_stride, misaligned, VECTOR)
    at = (address, misaligned, vocab) if misaligned is None else (address, begin, begin + vocab)
    arrived = counters + FIRST_ROW + row
    # A row's sums are (field, part).
    partials = scratch + 3 * PARTS * row.to(tl.int64)
    scale_hi, scale_lo = exponent_scale(row_temperature, common_hi, common_lo, row)
    EXACT: tl.constexpr = logits.dtype.element_ty == tl.float32
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
                add_loss(0.0, row, losses, loss, counters + _STORED, rows, LANES)
        else:
            # The loads are under way while the program waits and unites the parts.
            tiles = load_block(at, start, LANES, UNROLL, VECTOR, False)
            # To add 0 is how Triton writes a load that acquires.
            while tl.atomic_add(arrived, 0, sem="acquire") < PARTS:
                pass
            m, s, a, _, _, _, _ = load_sums(partials, PARTS, 1, PARTS, scale_hi, lo, False, False, MAX_PARTS)
            row_factor = weight * inverse_count
            if SUM_WEIGHTS:
                row_factor /= wait_for(counters + _WEIGHTS).to(tl.float32, bitcast=True)
            elif total is not None:
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
                add_loss(row_factor * entropy, row, losses, loss, counters + _STORED, rows, LANES)
    elif weight != 0.0:
        sums = block_sums(at, start, scale_hi, lo, softcap, LANES, UNROLL, VECTOR)
        store_sums(partials + part, PARTS, sums, False, False)
        tl.debug_barrier()
        tl.atomic_add(arrived, 1, sem="release")


@triton.jit
def wait_for(word):
    """The first value of a word in memory that is not 0."""
    # An atomic read, because a plain one in a loop may be made once, before the loop.
    value = tl.atomic_add(word, 0, sem="relaxed")
    while value == 0:
        value = tl.atomic_add(word, 0, sem="relaxed")
    return value


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
    GROUP: tl.constexpr = 4 if UNROLL >= 4 else UNROLL
    for i in tl.static_range(UNROLL // GROUP):
        sums = accumulate(sums, logits_of(block, i * GROUP, GROUP, softcap), scale_hi, scale_lo, False, False)
    return unite(sums, scale_hi, scale_lo, False, False)


@triton.jit
def sum_in_order(values, count, LANES: tl.constexpr):
    """The float32 sum of so many values, always in the same order."""
    # Many loads at once, because one program goes through all values while others wait.
    BLOCK: tl.constexpr = 32 * LANES
    sums = tl.zeros([BLOCK], tl.float32)
    for start in range(0, count, BLOCK):
        i = start + tl.arange(0, BLOCK)
        sums += tl.load(values + i, mask=i < count, other=0).to(tl.float32)
    return tl.sum(sums, axis=0)


@triton.jit
def add_loss(value, row, losses, loss, stored, rows, LANES: tl.constexpr):
    """Stores the loss of a row; the program that stores the last of them adds up all, in the order of the rows."""
    tl.store(losses + row, value)
    tl.debug_barrier()
    if tl.atomic_add(stored, 1, sem="acq_rel") == rows - 1:
        tl.store(loss, sum_in_order(losses, rows, LANES))


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
        address, begin = find_row(gradient, block // parts, inner, outer_stride, inner_stride, misaligned, VECTOR)
        row = (address, misaligned, vocab) if misaligned is None else (address, begin, begin + vocab)
        start = (block % parts) * (LANES * UNROLL * VECTOR)
        tiles = load_block(row, start, LANES, UNROLL, VECTOR, False)
        store_block(row[0], row, start, tiles, product, (factor,), LANES, VECTOR, True)


@triton.jit
def product(z, place, arguments):
    return z * arguments[0]
