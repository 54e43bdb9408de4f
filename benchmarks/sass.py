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
    """A loop: the number of its first block, the numbers of all its blocks, and whether it contains no other loop."""

    header: int
    blocks: frozenset[int]
    innermost: bool


# What a path moves of rows: whether it loads and whether it stores.
Moves = tuple[bool, bool]
# Bytes of rows that an instruction loads, and that it stores.
RowBytes = Callable[[Instruction], tuple[int, int]]


def read(text: str) -> list[Block]:
    """Return the basic blocks of what `disassemble` returns of a kernel, in the order of the code."""
    found = [line for line in map(_INSTRUCTION.match, text.splitlines()) if line]
    lines = [Instruction((line[2] or "").strip(), line[3], line[4]) for line in found]
    positions = {int(line[1], 16): i for i, line in enumerate(found)}
    targets = _targets(lines, positions)
    ends = [i + 1 for i, line in enumerate(lines) if _leaves(line)]
    starts = sorted({0, *ends, *targets.values()} - {len(lines)})
    numbers = {start: number for number, start in enumerate(starts)}
    blocks = []
    for start, stop in zip(starts, [*starts[1:], len(lines)], strict=True):
        last = lines[stop - 1]
        successors = {numbers[targets[stop - 1]]} if stop - 1 in targets else set()
        if stop < len(lines) and not _always_leaves(last):
            successors.add(numbers[stop])
        blocks.append(Block(lines[start:stop], sorted(successors), last.name == "EXIT"))
    return blocks


def loops(blocks: list[Block]) -> list[Loop]:
    """Return the loops, those that contain no other loop first, in the order of the code."""
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
    found = {header: body for header, body in sorted(found.items()) if not _idle(blocks, body)}
    around = [
        Loop(header, frozenset(body), not any(other in body for other in found if other != header))
        for header, body in found.items()
    ]
    return sorted(around, key=lambda loop: (not loop.innermost, len(loop.blocks) if not loop.innermost else 0))


def paths_through(blocks: list[Block], loop: Loop | None, row_bytes: RowBytes) -> dict[Moves, list[Instruction]]:
    """Return the path of one iteration, or of the whole kernel, for each combination of what a path may move.

    A loop inside, or one of the whole kernel, is passed through once.
    """
    start = loop.header if loop else 0
    dominators = _dominators(blocks)
    inside = loop.blocks if loop else frozenset(dominators)
    # For each block and what is moved from there on: bytes, instructions (negative), and the block that follows. A path
    # that loads is judged by the bytes that it loads, because the ends of a row may be stored in two turns.
    best: dict[int, dict[Moves, tuple[tuple[int, int], int, int | None, Moves]]] = {}
    for i in _backwards(blocks, start, inside, dominators):
        forward = [j for j in blocks[i].successors if j in inside and j not in dominators[i]]
        ends = blocks[i].exits if loop is None else loop.header in blocks[i].successors
        count = -len(blocks[i].instructions)
        rest: list[tuple[tuple[int, int], int, int | None, Moves]] = [((0, 0), 0, None, (False, False))] if ends else []
        rest += [(size_, count_, j, moves) for j in forward for moves, (size_, count_, _, _) in best[j].items()]
        for more_size, more_count, following, moves in rest:
            loaded, stored = _moved(blocks, i, following, row_bytes)
            together = (loaded > 0 or moves[0], stored > 0 or moves[1])
            size = (loaded + more_size[0], stored + more_size[1])
            candidate = (size, count + more_count, following, moves)
            known = best.setdefault(i, {}).get(together)
            counted = 0 if together[0] else 1
            if known is None or (size[counted], candidate[1]) > (known[0][counted], known[1]):
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


def _moved(blocks: list[Block], i: int, following: int | None, row_bytes: RowBytes) -> tuple[int, int]:
    """Return what a block moves where the block `following` is next.

    Where the block ends with a branch, the way that is taken tells whether the branch's guard is true. A load with the
    opposite guard, which is the other way's load of the same elements, moves nothing then.
    """
    lines, idle = blocks[i].instructions, ""
    branch = lines[-1] if lines else None
    if branch and branch.name == "BRA" and branch.guard and len(blocks[i].successors) == 2 and following is not None:
        idle = branch.guard if following == i + 1 else _opposite(branch.guard)
    loaded = stored = 0
    for line in reversed(lines):
        if idle and line.operands.startswith(f"{idle.strip('@!')},"):
            idle = ""  # The predicate was another one before this instruction.
        if not idle or line.guard != idle:
            load, store = row_bytes(line)
            loaded, stored = loaded + load, stored + store
    return loaded, stored


def _opposite(guard: str) -> str:
    return guard.replace("@!", "@") if "!" in guard else guard.replace("@", "@!")


def _targets(lines: list[Instruction], positions: dict[int, int]) -> dict[int, int]:
    """Return where each branch goes, by the number of its instruction; `positions` are the numbers by address."""
    waiting: dict[str, str] = {}
    targets = {}
    for i, line in enumerate(lines):
        if line.name == "BSSY":
            barrier, _, _ = line.operands.partition(",")
            waiting[barrier] = line.operands
        # A BSYNC goes on where its BSSY says, which is often the BSYNC itself or what follows.
        operands = {"BRA": line.operands, "BSYNC": waiting.get(line.operands, "")}.get(line.name, "")
        found = _TARGET.search(operands)
        position = positions.get(int(found[1], 16)) if found else None
        if position is not None and not (line.name == "BSYNC" and position in (i, i + 1)):
            targets[i] = position
    return targets


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
