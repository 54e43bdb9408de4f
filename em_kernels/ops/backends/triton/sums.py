"""The sums of a row: over some of its places, from the logits; and of the whole, from those of its parts in memory.

Only the block that holds the target pays for leaving it out.
"""

import triton
import triton.language as tl

from em_kernels.ops.backends.triton.arithmetic import accumulate, capped, empty_sums, unite
from em_kernels.ops.backends.triton.tiles import load_block, places_of_tile, widened


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
    a = tl.load(planes + 2 * plane, mask=present, other=0.0)
    b, count, sum_d, sum_e2 = a, a, a, a
    if SECOND_MOMENT:
        b = tl.load(planes + 3 * plane, mask=present, other=0.0)
    if EXTRA:
        planes += (4 if SECOND_MOMENT else 3) * plane
        count = tl.load(planes, mask=present, other=0.0)
        sum_d = tl.load(planes + plane, mask=present, other=0.0)
        sum_e2 = tl.load(planes + 2 * plane, mask=present, other=0.0)
    return unite((m, s, a, b, count, sum_d, sum_e2), scale_hi, scale_lo, SECOND_MOMENT, EXTRA)


@triton.jit
def store_sums(planes, plane, sums, SECOND_MOMENT: tl.constexpr, EXTRA: tl.constexpr):
    """Stores the sums, in units of log 2, at `planes`, a plane per field, without the fields that were not computed."""
    m, s, a, b, count, sum_d, sum_e2 = sums
    tl.store(planes, m)
    tl.store(planes + plane, s)
    tl.store(planes + 2 * plane, a)
    if SECOND_MOMENT:
        tl.store(planes + 3 * plane, b)
    if EXTRA:
        planes += (4 if SECOND_MOMENT else 3) * plane
        tl.store(planes, count)
        tl.store(planes + plane, sum_d)
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
