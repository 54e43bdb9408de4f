"""This module finds the machine code of a kernel that reads or writes rows, and counts its instructions per element."""

import re
from collections import Counter
from typing import NamedTuple

from compiled_launches import Compiled
from disassembly import disassemble
from instruction_classes import instruction_class, moved_bytes, units
from sass import Block, Instruction, Moves, loops, paths_through, read

# No access of a thread is wider than this on the GPUs that the kernels are written for.
WIDE_BYTES = 16
_ITEM_BYTES = {"*fp32": 4, "*bf16": 2, "*fp16": 2}
_DTYPES = {"*fp32": "float32", "*bf16": "bfloat16", "*fp16": "float16"}
# Of the first argument that a kernel has of these, the elements are counted; the second writes as many.
_READ, _WRITTEN = ("logits", "gradient"), ("out", "gradient", "logits")
_KINDS: dict[Moves, str] = {(True, False): "reads", (True, True): "writes", (False, True): "clears"}


class Piece(NamedTuple):
    """The instructions that read rows, that write them, or that clear rows that do not count.

    Attributes:
        kind: "reads", "writes" (and reads) or "clears".
        where: "loop", or "body" where a program has a tile and no loop.
        width: bytes of an access.
        elements: elements of a thread in one iteration.
        instructions: instructions for each element, by class.
        units: clocks of a multiprocessor's units for each element, by unit.
        bytes_in_flight: the most bytes of rows that a thread has asked for and not used yet.
    """

    kind: str
    where: str
    width: int
    elements: int
    instructions: dict[str, float]
    units: dict[str, float]
    bytes_in_flight: int

    @property
    def total(self) -> float:
        """Instructions for each element."""
        return sum(self.instructions.values())


def row_pieces(kernels: list[Compiled], architecture: int) -> dict[str, list[Piece]]:
    """Return the pieces of each kernel by its digest; none of a kernel that goes through no row."""
    through_rows = [kernel for kernel in kernels if "VECTOR" in kernel.constants]
    texts = disassemble([kernel.code for kernel in through_rows], architecture)
    found: dict[str, list[Piece]] = {kernel.digest: [] for kernel in kernels}
    for kernel, text in zip(through_rows, texts, strict=True):
        found[kernel.digest] = _pieces(kernel, read(text))
    return found


def main_piece(pieces: list[Piece], kind: str) -> Piece | None:
    """Return the piece of this kind that most elements go through: the one with the fewest instructions for each."""
    return min((piece for piece in pieces if piece.kind == kind), key=lambda piece: piece.total, default=None)


def item_bytes(kernel: Compiled) -> tuple[int, int]:
    """Return the bytes of an element that a kernel reads, and of one that it writes."""
    read_type, written_type = (
        next(kernel.types[name] for name in names if name in kernel.types) for names in (_READ, _WRITTEN)
    )
    return _ITEM_BYTES[read_type], _ITEM_BYTES[written_type]


def _pieces(kernel: Compiled, blocks: list[Block]) -> list[Piece]:
    """Return the pieces of a kernel, loops in the order of the code."""
    width = _row_width([line for block in blocks for line in block.instructions])

    def row_bytes(line: Instruction) -> tuple[int, int]:
        loaded, stored = moved_bytes(line)
        return (loaded, stored) if max(loaded, stored) >= width else (0, 0)

    def pieces_of(paths: dict[Moves, list[Instruction]], where: str) -> list[Piece]:
        return [
            _piece(kernel, _KINDS[moves], where, path, width, [row_bytes(line) for line in path])
            for moves, path in paths.items()
            if moves in _KINDS
        ]

    found: list[Piece] = []
    for loop in (*loops(blocks), None):
        within = loop is not None and loop.innermost
        # Around a loop, narrow accesses are those of a row's results, and wide ones like the loop's are its end.
        if found and width < WIDE_BYTES and not within:
            break
        kinds = set() if within else {piece.kind for piece in found}
        paths = paths_through(blocks, loop, row_bytes)
        found += [piece for piece in pieces_of(paths, "loop" if loop else "body") if piece.kind not in kinds]
    return found


def dtype_name(kernel: Compiled) -> str:
    """Return the dtype of what a kernel reads, "" where that is no row."""
    return next((_DTYPES[kernel.types[name]] for name in _READ if name in kernel.types), "")


def _row_width(lines: list[Instruction]) -> int:
    """Return the width of the accesses of rows, in bytes: the widest; and where none is wide, the most frequent."""
    widths = Counter(max(moved_bytes(line)) for line in lines if any(moved_bytes(line)))
    widest = max(widths, default=0)
    return widest if widest >= WIDE_BYTES else max(widths, key=widths.__getitem__, default=1)


def _piece(
    kernel: Compiled, kind: str, where: str, path: list[Instruction], width: int, moved: list[tuple[int, int]]
) -> Piece:
    tile = kernel.constants["UNROLL"] * kernel.constants["VECTOR"]
    loaded, stored = (sum(sizes) for sizes in zip(*moved, strict=True))
    size_in, size_out = item_bytes(kernel)
    # The compiler may unroll a loop further, so an iteration is one tile or several.
    tiles = (loaded / size_in if loaded else stored / size_out) / tile
    elements = tile * (max(1, round(tiles)) if where == "loop" else 1)
    classes = Counter(instruction_class(line) for line in path)
    clocks: Counter[str] = Counter()
    for line in path:
        clocks.update(units(line))
    return Piece(
        kind=kind,
        where=where,
        width=width,
        elements=elements,
        instructions={name: count / elements for name, count in classes.items()},
        units={name: count / elements for name, count in clocks.items()},
        bytes_in_flight=_bytes_in_flight(path, [size for size, _ in moved]),
    )


def _bytes_in_flight(path: list[Instruction], loaded: list[int]) -> int:
    """Return the most bytes that loads have asked for before an instruction waits for them, in two iterations."""
    waiting: list[tuple[set[int], int]] = []
    most = 0
    for line, size in zip(path + path, loaded + loaded, strict=True):
        used = {int(number) for number in re.findall(r"\bR(\d+)\b", line.operands)}
        waiting = [(registers, bytes_) for registers, bytes_ in waiting if not registers & used]
        if size and (first := re.match(r"R(\d+)\b", line.operands)):
            start = int(first[1])
            waiting.append((set(range(start, start + max(1, size // 4))), size))
            most = max(most, sum(bytes_ for _, bytes_ in waiting))
    return most
