"""This module reads a disassembly of NVIDIA's machine code (SASS): instructions, basic blocks, loops, and paths.

A path through a loop is one iteration of it. Where a loop or a kernel has branches, the path that counts is the one
that moves the most bytes of rows, and the shortest of these: the rare branch that a target's tile takes is longer, and
the branch of a row that is left out moves fewer bytes. Instructions whose predicate is false count, because they take
an issue slot all the same.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z][A-Z0-9_.a-z]*)\s*(.*?)\s*;")
_TARGET = re.compile(r"(?:^|, )0x([0-9a-f]+)$")


class Instruction(NamedTuple):
    """An instruction: "@P0 LDG.E.128 R4, [R2]" has the guard "@P0", the opcode "LDG.E.128" and the rest as operands."""

    guard: str
    opcode: str
    operands: str

    @property
    def name(self) -> str:
        return self.opcode.partition(".")[0]


class Block(NamedTuple):
    """Instructions without a branch between them; `successors` are the numbers of the blocks that may follow."""

    instructions: list[Instruction]
    successors: list[int]
    exits: bool


class Loop(NamedTuple):
    """An innermost loop: the number of its first block, and the numbers of all its blocks."""

    header: int
    blocks: frozenset[int]


# What a path moves of rows: whether it loads and whether it stores.
Moves = tuple[bool, bool]
# Bytes of rows that an instruction loads, and that it stores.
RowBytes = Callable[[Instruction], tuple[int, int]]


def read(text: str) -> list[Block]:
    """Return the basic blocks of what `disassemble` returns of a kernel, in the order of the code."""
    found = [line for line in map(_INSTRUCTION.match, text.splitlines()) if line]
    lines = [Instruction((line[2] or "").strip(), line[3], line[4]) for line in found]
    positions = {int(line[1], 16): i for i, line in enumerate(found)}
    waiting = {line.operands.partition(",")[0]: line for line in lines if line.name == "BSSY"}
    targets = {i: positions[target] for i, line in enumerate(lines) if (target := _target(line, waiting)) in positions}
    ends = [i + 1 for i, line in enumerate(lines) if _leaves(line)]
    starts = sorted({0, *ends, *targets.values()} - {len(lines)})
    numbers = {start: number for number, start in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        last = lines[stop - 1]
        successors = set() if stop == len(lines) or _always_leaves(last) else {numbers[stop]}
        if stop - 1 in targets:
            successors.add(numbers[targets[stop - 1]])
        blocks.append(Block(lines[start:stop], sorted(successors), last.name == "EXIT"))
    return blocks


def innermost_loops(blocks: list[Block]) -> list[Loop]:
    """Return the loops that contain no other loop, in the order of the code."""
    dominators = _dominators(blocks)
    predecessors: dict[int, list[int]] = {}
    for i in dominators:
        for successor in blocks[i].successors:
            predecessors.setdefault(successor, []).append(i)
    found: dict[int, set[int]] = {}
    for i in dominators:
        for header in set(blocks[i].successors) & dominators[i]:
            body, new = found.setdefault(header, {header}), [i]
            while new:
                block = new.pop()
                if block not in body:
                    body.add(block)
                    new += predecessors.get(block, [])
    loops = [Loop(header, frozenset(body)) for header, body in sorted(found.items()) if not _idle(blocks, body)]
    return [loop for loop in loops if not any(other.header in loop.blocks for other in loops if other != loop)]


def paths_through(blocks: list[Block], loop: Loop | None, row_bytes: RowBytes) -> dict[Moves, list[Instruction]]:
    """Return the path of one iteration, or of the whole kernel, for each combination of what a path may move.

    Of the whole kernel, every loop is passed through once.
    """
    start = loop.header if loop else 0
    dominators = _dominators(blocks)
    inside = loop.blocks if loop else frozenset(dominators)
    # For each block and what is moved from there on: bytes, instructions (negative), and the block that follows.
    best: dict[int, dict[Moves, tuple[int, int, int | None, Moves]]] = {}
    for i in _backwards(blocks, start, inside, dominators):
        forward = [j for j in blocks[i].successors if j in inside and j not in dominators[i]]
        ends = blocks[i].exits if loop is None else loop.header in blocks[i].successors
        own = [row_bytes(instruction) for instruction in blocks[i].instructions]
        size, count = sum(map(sum, own)), -len(blocks[i].instructions)
        loads, stores = any(load for load, _ in own), any(store for _, store in own)
        rest = [(0, 0, None, (False, False))] if ends else []
        rest += [(size_, count_, j, moves) for j in forward for moves, (size_, count_, _, _) in best[j].items()]
        for more_size, more_count, following, moves in rest:
            together = (loads or moves[0], stores or moves[1])
            candidate = (size + more_size, count + more_count, following, moves)
            known = best.setdefault(i, {}).get(together)
            if known is None or candidate[:2] > known[:2]:
                best[i][together] = candidate
        best.setdefault(i, {})
    found = {}
    for moves in best[start]:
        path, block, left = [], start, moves
        while block is not None:
            path += blocks[block].instructions
            _, _, following, left = best[block][left]
            block = following
        found[moves] = path
    return found


def _target(line: Instruction, waiting: dict[str, Instruction]) -> int | None:
    """Return the address that a branch goes to; a BSYNC goes on where its BSSY says."""
    source = waiting.get(line.operands) if line.name == "BSYNC" else line if line.name == "BRA" else None
    found = _TARGET.search(source.operands) if source else None
    return int(found[1], 16) if found else None


def _leaves(line: Instruction) -> bool:
    return line.name in ("BRA", "EXIT", "RET", "BRX", "JMP", "BREAK", "BSYNC")


def _always_leaves(line: Instruction) -> bool:
    """Whether the next instruction cannot follow: a branch may have its condition as a guard or as an operand."""
    conditional = line.guard not in ("", "@PT", "@UPT") or (line.name == "BRA" and not line.operands.startswith("0x"))
    return line.name in ("BRA", "EXIT", "RET", "BRX", "JMP") and not conditional


def _idle(blocks: list[Block], body: Iterable[int]) -> bool:
    """Whether a loop is the branch to itself that follows a kernel's code."""
    return all(line.name in ("BRA", "NOP") for block in body for line in blocks[block].instructions)


def _dominators(blocks: list[Block]) -> dict[int, set[int]]:
    """Return, for each block that can be reached, the blocks that every way to it passes, itself included."""
    order = _backwards(blocks, 0, None, None)[::-1]
    dominators = {i: set(order) for i in order}
    dominators[0] = {0}
    changed = True
    while changed:
        changed = False
        for i in order[1:]:
            before = [dominators[j] for j in order if i in blocks[j].successors]
            new = set.intersection(*before) | {i}
            changed |= new != dominators[i]
            dominators[i] = new
    return dominators


def _backwards(
    blocks: list[Block], start: int, inside: Iterable[int] | None, dominators: dict[int, set[int]] | None
) -> list[int]:
    """Return the blocks that `start` leads to, each after those that it leads to itself, edges back to a loop apart."""
    order: list[int] = []
    seen = {start}
    stack = [(start, iter(blocks[start].successors))]
    while stack:
        i, successors = stack[-1]
        for j in successors:
            if j in seen or (inside is not None and j not in inside) or (dominators and j in dominators[i]):
                continue
            seen.add(j)
            stack.append((j, iter(blocks[j].successors)))
            break
        else:
            order.append(i)
            stack.pop()
    return order
