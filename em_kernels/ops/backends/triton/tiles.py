"""Tiles of a row: 16-byte loads and stores, whatever the size of the vocabulary and wherever a row begins.

A tile is (LANES, VECTOR): LANES is the number of threads, and the VECTOR contiguous elements of each are one 16-byte
load. UNROLL tiles are a block, whose loads are all under way at once.

A row of an odd vocabulary begins anywhere between two 16-byte boundaries. Its places are therefore counted from the
boundary at or before its first element: the row lies at the places [begin, end), and every tile begins at a boundary.
A block within the row is loaded and stored without a mask. Where an end of the row lies in the block, every vector that
holds an element of the row is loaded, which reaches no further than to the next boundary; vectors that the row fills
are stored whole, and the elements of the vector at each end one at a time.

`misaligned` of logits is the number of elements between a boundary and their first element. None says that all rows
begin and end at boundaries, as those of most models do, and leaves out what other rows need; `begin` is then None.
CONGRUENT says that the rows of a second tensor lie between their boundaries as those of the first do. Where they do
not, its elements are stored one at a time.
"""

import triton
import triton.language as tl

# -inf in the lower and in the upper half of a word of two bfloat16.
_LOW_INFINITY: tl.constexpr = tl.constexpr(0x0000FF80)
_HIGH_INFINITY: tl.constexpr = tl.constexpr(0xFF800000)


@triton.jit
def row_offset(row, inner, outer_stride, inner_stride):
    """The offset of a row in a tensor of shape (outer, inner, V), in 64 bits; `inner` is None where `outer` is 1."""
    if inner is None:
        return row.to(tl.int64) * inner_stride
    else:
        return (row // inner).to(tl.int64) * outer_stride + (row % inner).to(tl.int64) * inner_stride


@triton.jit
def find_row(tensor, row, inner, outer_stride, inner_stride, misaligned, VECTOR: tl.constexpr):
    """The address of the boundary at or before a row of a tensor of shape (outer, inner, V), and the row's first place.

    A row is passed on as (address, begin, end), with `misaligned` for `begin` where that is None. The kernel makes this
    tuple, because a function of Triton 3.5 and 3.6 can take a None and not return one.
    """
    offset = row_offset(row, inner, outer_stride, inner_stride)
    BYTES: tl.constexpr = VECTOR * tensor.dtype.element_ty.primitive_bitwidth // 8
    begin = 0
    if misaligned is not None:
        begin = ((offset + misaligned) % VECTOR).to(tl.int32)
    return tl.multiple_of(tensor + (offset - begin), BYTES), begin


@triton.jit
def places_in(tensor, row, inner, outer_stride, inner_stride, source, VECTOR: tl.constexpr, CONGRUENT: tl.constexpr):
    """The address in a second tensor that the places of a row, found in the first as `source`, are counted from."""
    BYTES: tl.constexpr = VECTOR * tensor.dtype.element_ty.primitive_bitwidth // 8 if CONGRUENT else 1
    offset = row_offset(row, inner, outer_stride, inner_stride)
    _, begin, _ = source
    return tl.multiple_of(tensor + (offset if begin is None else offset - begin), BYTES)


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
    tiles = ()
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
def store_block(
    address,
    row,
    start,
    tiles,
    FUNCTION: tl.constexpr,
    arguments,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CONGRUENT: tl.constexpr,
):
    """Stores FUNCTION(z, place, arguments) for a block of `row` at place `start`, with places counted from `address`.

    z are the float32 logits of one of the `tiles`, and `place` is the tile's first place.
    """
    COUNT: tl.constexpr = len(tiles)
    _, begin, end = row
    if begin is None or not CONGRUENT:
        _store_tiles(address, row, start, tiles, FUNCTION, arguments, LANES, VECTOR, CONGRUENT, False)
    elif (start >= begin) & (start + LANES * VECTOR * COUNT <= end):
        # A loop of its own, because the masks of the other one are arithmetic for each element.
        _store_tiles(address, row, start, tiles, FUNCTION, arguments, LANES, VECTOR, CONGRUENT, True)
    else:
        _store_tiles(address, row, start, tiles, FUNCTION, arguments, LANES, VECTOR, CONGRUENT, False)


@triton.jit
def _store_tiles(
    address,
    row,
    start,
    tiles,
    FUNCTION: tl.constexpr,
    arguments,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CONGRUENT: tl.constexpr,
    WITHIN: tl.constexpr,
):
    COUNT: tl.constexpr = len(tiles)
    pointers = address + places_of_tile(start, LANES, VECTOR)
    for i in tl.static_range(COUNT):
        skip = i * (LANES * VECTOR)
        values = FUNCTION(widened(tiles[i]), start + skip, arguments).to(address.dtype.element_ty)
        _store_tile(pointers + skip, row, start + skip, values, LANES, VECTOR, CONGRUENT, WITHIN)


@triton.jit
def _store_tile(
    pointers,
    row,
    start,
    values,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
    CONGRUENT: tl.constexpr,
    WITHIN: tl.constexpr,
):
    _, begin, end = row
    vectors = vectors_of_tile(start, LANES, VECTOR)
    # The gradient is not read again soon, and the logits are: .cs lets the caches drop the gradient first.
    if WITHIN:
        tl.store(pointers, values, cache_modifier=".cs")
    elif begin is None and CONGRUENT:
        tl.store(pointers, values, mask=vectors < end, cache_modifier=".cs")
    else:
        places = places_of_tile(start, LANES, VECTOR)
        exists = places < end
        if begin is not None:
            exists = exists & (places >= begin)
        if CONGRUENT:
            whole = (vectors >= begin) & (vectors + VECTOR <= end)
            tl.store(pointers, values, mask=whole, cache_modifier=".cs")
            exists = exists & ~whole
        tl.store(pointers, values, mask=exists)


@triton.jit
def store_zeros(
    address, row, start, LANES: tl.constexpr, UNROLL: tl.constexpr, VECTOR: tl.constexpr, CONGRUENT: tl.constexpr
):
    """Stores 0 where a block of `row` has its places, counted from `address`."""
    pointers = address + places_of_tile(start, LANES, VECTOR)
    zeros = tl.zeros([LANES, VECTOR], address.dtype.element_ty)
    for i in tl.static_range(UNROLL):
        skip = i * (LANES * VECTOR)
        _store_tile(pointers + skip, row, start + skip, zeros, LANES, VECTOR, CONGRUENT, False)
