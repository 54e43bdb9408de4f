"""Tiles of a row: 16-byte loads and stores, whatever the size of the vocabulary and wherever a row begins.

A tile is (LANES, VECTOR): LANES is the number of threads, and the VECTOR contiguous elements of each are one 16-byte
load. UNROLL tiles are a block, whose loads are all under way at once.

A row of an odd vocabulary begins anywhere between two 16-byte boundaries. Its places are therefore counted from the
boundary at or before its first element: the row lies at the places [begin, end), and every tile begins at a boundary.
A block within the row is loaded and stored without a mask. Where an end of the row lies in the block, every vector that
holds an element of the row is loaded, which reaches no further than to the next boundary; vectors that the row fills
are stored whole, and the elements of the vector at each end one at a time.

`misaligned` of a tensor is the number of elements between a boundary and its first element. None says that all rows
begin and end at boundaries, as those of most models do, and leaves out what other rows need; `begin` is then None.
"""

import triton
import triton.language as tl

# -inf in the lower and in the upper half of a word of two bfloat16.
_LOW_INFINITY: tl.constexpr = tl.constexpr(0x0000FF80)
_HIGH_INFINITY: tl.constexpr = tl.constexpr(0xFF800000)


@triton.jit
def find_row(tensor, row, inner, outer_stride, inner_stride, vocab, misaligned, VECTOR: tl.constexpr):
    """(address, begin, end) of a row of a tensor of shape (outer, inner, V); the offset of the row is in 64 bits."""
    offset = (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride
    BYTES: tl.constexpr = VECTOR * tensor.dtype.element_ty.primitive_bitwidth // 8
    if misaligned is None:
        return tl.multiple_of(tensor + offset, BYTES), None, vocab
    else:
        begin = ((offset + misaligned) % VECTOR).to(tl.int32)
        return tl.multiple_of(tensor + (offset - begin), BYTES), begin, begin + vocab


@triton.jit
def first_element(row):
    """The address of a row's first element."""
    address, begin, _ = row
    return address if begin is None else address + begin


@triton.jit
def vectors_of_tile(start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The first place of each vector of the tile that begins at place `start`, (LANES, 1)."""
    return start + tl.arange(0, LANES)[:, None] * VECTOR


@triton.jit
def places_of_tile(start, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """The place of each element of the tile that begins at place `start`."""
    return vectors_of_tile(start, LANES, VECTOR) + tl.arange(0, VECTOR)[None, :]


@triton.jit
def load_block(row, start, LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr, AGAIN: tl.constexpr):
    """A tuple of the UNROLL tiles from place `start` on, -inf outside the row, each for `widened` to be called on.

    AGAIN says whether the block will be read once more, and is better kept in cache.
    """
    _, begin, end = row
    EVICT: tl.constexpr = "" if AGAIN else "evict_first"
    within = start + LANES * UNROLL * VECTOR <= end
    if begin is not None:
        within = within & (start >= begin)
    if within:
        tiles = _load_tiles(row, start, LANES, UNROLL, VECTOR, True, EVICT)
    else:
        tiles = _load_tiles(row, start, LANES, UNROLL, VECTOR, False, EVICT)
    return tiles


@triton.jit
def _load_tiles(
    row,
    start,
    LANES: tl.constexpr,
    UNROLL: tl.constexpr,
    VECTOR: tl.constexpr,
    WITHIN: tl.constexpr,
    EVICT: tl.constexpr,
):
    tiles: tuple = ()
    for i in tl.static_range(UNROLL):
        tiles = tiles + (_load_tile(row, start, i * (LANES * VECTOR), LANES, VECTOR, WITHIN, EVICT),)
    return tiles


@triton.jit
def _load_tile(
    row, start, SKIP: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr, WITHIN: tl.constexpr, EVICT: tl.constexpr
):
    address, begin, end = row
    # SKIP is added to the address, and not to the place, because a load has room for a constant added to its address.
    vectors = vectors_of_tile(start, LANES, VECTOR)
    # Two bfloat16 are read as a word, because a word is widened in two instructions, and its halves in three.
    WORDS: tl.constexpr = address.dtype.element_ty == tl.bfloat16 and VECTOR > 1
    if WORDS:
        words = address.to(tl.pointer_type(tl.uint32))
        pointers = words + (vectors // 2 + tl.arange(0, VECTOR // 2)[None, :]) + SKIP // 2
    else:
        pointers = address + places_of_tile(start, LANES, VECTOR) + SKIP
    if WITHIN:
        return tl.load(pointers, eviction_policy=EVICT)
    else:
        vectors += SKIP
        touched = vectors < end
        if begin is not None:
            touched = touched & (vectors + VECTOR > begin)
        if WORDS:
            z = tl.load(pointers, mask=touched, other=_LOW_INFINITY | _HIGH_INFINITY, eviction_policy=EVICT)
            if begin is not None:
                low = vectors + 2 * tl.arange(0, VECTOR // 2)[None, :]
                z = tl.where((low >= begin) & (low < end), z, (z & 0xFFFF0000) | _LOW_INFINITY)
                z = tl.where((low + 1 >= begin) & (low + 1 < end), z, (z & 0x0000FFFF) | _HIGH_INFINITY)
        else:
            z = tl.load(pointers, mask=touched, other=-float("inf"), eviction_policy=EVICT)
            if begin is not None:
                places = places_of_tile(start + SKIP, LANES, VECTOR)
                z = tl.where((places >= begin) & (places < end), z, -float("inf"))
        return z


@triton.jit
def widened(tile):
    """The float32 logits of a tile that `load_block` has loaded, (LANES, VECTOR)."""
    if tile.dtype == tl.uint32:
        low = (tile << 16).to(tl.float32, bitcast=True)
        high = (tile & 0xFFFF0000).to(tl.float32, bitcast=True)
        return tl.join(low, high).reshape([tile.shape[0], 2 * tile.shape[1]])
    else:
        return tile.to(tl.float32)


@triton.jit
def store_tile(row, source, start, SKIP: tl.constexpr, values, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Stores what was computed of the tile at place `start` + SKIP of the row `source` at the same columns of a row."""
    address, begin, end = row
    _, source_begin, source_end = source
    values = values.to(address.dtype.element_ty)
    pointers = address + places_of_tile(start, LANES, VECTOR) + SKIP
    vectors = vectors_of_tile(start, LANES, VECTOR) + SKIP
    if begin is None and source_begin is None:
        # The gradient is not read again soon, and the logits are: .cs lets the caches drop the gradient first.
        tl.store(pointers, values, mask=vectors < end, cache_modifier=".cs")
    else:
        begin = 0 if begin is None else begin
        source_begin = 0 if source_begin is None else source_begin
        # The two rows may lie differently between two boundaries: then no vector is stored whole.
        shift = begin - source_begin
        within = (start + SKIP >= source_begin) & (start + SKIP + LANES * VECTOR <= source_end)
        if within & (shift == 0):
            tl.store(pointers, values, cache_modifier=".cs")
        else:
            whole = (vectors >= source_begin) & (vectors + VECTOR <= source_end) & (shift == 0)
            tl.store(pointers, values, mask=whole, cache_modifier=".cs")
            places = places_of_tile(start + SKIP, LANES, VECTOR)
            single = (places >= source_begin) & (places < source_end) & ~whole
            tl.store(address + (places + shift), values, mask=single)


@triton.jit
def store_zeros(row, source, start, LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr):
    """Stores 0 at the columns of a block of the row `source`."""
    for i in tl.static_range(UNROLL):
        zeros = tl.zeros([LANES, VECTOR], tl.float32)
        store_tile(row, source, start, i * (LANES * VECTOR), zeros, LANES, VECTOR)
