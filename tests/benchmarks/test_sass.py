"""These tests read small disassemblies: control flow, the path of an iteration, classes and widths of instructions."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from instruction_classes import instruction_class, moved_bytes, units
from sass import Instruction, loops, paths_through, read


def code(*lines: str) -> str:
    """Return instructions in the form of nvdisasm's output, 16 bytes apart."""
    return "\n".join(f"        /*{16 * i:04x}*/    {line} ;" for i, line in enumerate(lines))


def instruction(text: str) -> Instruction:
    (block,) = read(code(text))
    (found,) = block.instructions
    return found


def opcodes(path: list[Instruction]) -> list[str]:
    return [line.opcode for line in path]


LOOP = code(
    "S2R R0, SR_TID.X",
    "MOV R4, RZ",
    "LDG.E.128 R8, desc[UR6][R24.64]",
    "FADD R5, R8, R9",
    "@P0 BRA 0x60",
    "FADD R5, R10, R5",
    "@!P1 BRA 0x20",
    "STG.E desc[UR6][R2.64], R5",
    "EXIT",
    "BRA 0x90",
    "NOP",
)


def test_a_loop_is_found_and_the_branch_to_itself_at_the_end_is_none():
    blocks = read(LOOP)
    (loop,) = loops(blocks)
    assert opcodes(blocks[loop.header].instructions) == ["LDG.E.128", "FADD", "BRA"]
    assert loop.innermost


def test_the_path_of_an_iteration_is_the_shortest_of_those_that_move_as_much():
    blocks = read(LOOP)
    (loop,) = loops(blocks)
    assert {moves: opcodes(path) for moves, path in paths_through(blocks, loop, moved_bytes).items()} == {
        (True, False): ["LDG.E.128", "FADD", "BRA", "BRA"]
    }


def test_a_path_that_moves_more_is_taken_though_it_is_longer():
    text = code("@P0 BRA 0x30", "LDG.E.128 R8, desc[UR6][R24.64]", "FADD R5, R8, R9", "@!P1 BRA 0x0", "EXIT")
    blocks = read(text)
    (loop,) = loops(blocks)
    paths = paths_through(blocks, loop, moved_bytes)
    assert opcodes(paths[True, False]) == ["BRA", "LDG.E.128", "FADD", "BRA"]
    assert opcodes(paths[False, False]) == ["BRA", "BRA"]


@pytest.mark.parametrize(("branch", "skipped"), [("@!P1 BRA 0x30", "LDG.E.64"), ("@P1 BRA 0x30", "LDG.E.128")])
def test_of_two_loads_of_the_same_elements_a_path_counts_one(branch, skipped):
    text = code("@!P1 LDG.E.128 R8, [R2]", branch, "LDG.E.64 R8, [R2]", "FADD R5, R8, R9", "@P0 BRA 0x0", "EXIT")
    blocks = read(text)
    (loop,) = loops(blocks)
    path = paths_through(blocks, loop, moved_bytes)[True, False]
    # Where the branch is taken because P1 is false, the wide load has loaded, and the other way loads again.
    assert opcodes(path) == ["LDG.E.128", "BRA", *(["LDG.E.64"] if skipped == "LDG.E.128" else []), "FADD", "BRA"]


def test_what_a_path_moves_tells_rows_that_are_cleared_from_rows_that_are_written():
    text = code(
        "@P0 BRA 0x30", "STG.E.128 desc[UR6][R2.64], RZ", "EXIT", "LDG.E.128 R8, [R2]", "STG.E.128 [R2], R8", "EXIT"
    )
    paths = paths_through(read(text), None, moved_bytes)
    assert {moves: len(path) for moves, path in paths.items()} == {(False, True): 3, (True, True): 4}


@pytest.mark.parametrize(
    "end", [("@!P0 BRA 0x0", "EXIT"), ("@P0 EXIT", "BRA 0x0"), ("BRA P0, 0x0", "EXIT"), ("BRA.U !UP0, 0x0", "EXIT")]
)
def test_every_way_to_end_a_loop(end):
    (loop,) = loops(read(code("FADD R1, R1, R2", *end)))
    assert loop.header == 0


def test_of_loops_in_each_other_the_inner_one_comes_first():
    found = loops(read(code("MOV R1, R2", "FADD R1, R1, R2", "@P0 BRA 0x10", "@P1 BRA 0x0", "EXIT")))
    assert [(loop.innermost, loop.header) for loop in found] == [(True, 1), (False, 0)]


def test_threads_that_wait_for_each_other_after_a_branch_go_on_where_they_were_told():
    blocks = read(code("BSSY B0, 0x40", "@P0 BRA 0x30", "FADD R1, R1, R2", "BSYNC B0", "STG.E [R2], R1", "EXIT"))
    paths = paths_through(blocks, None, moved_bytes)
    assert opcodes(paths[False, True]) == ["BSSY", "BRA", "BSYNC", "STG.E", "EXIT"]


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        ("@!P2 LDG.E.EF.128 R8, desc[UR4][R22.64+0x4000]", "load 16 B"),
        ("LDG.E.U16 R8, desc[UR4][R22.64]", "load 2 B"),
        ("LDG.E.64.STRONG.GPU R8, desc[UR4][R22.64]", "load 8 B"),
        ("STG.E.EF.U16 desc[UR6][R2.64], R5", "store 2 B"),
        ("STG.E desc[UR6][R2.64], R5", "store 4 B"),
        ("MUFU.EX2 R26, R24", "MUFU"),
        ("FMNMX.NAN R27, R16, R25, !PT", "FP32"),
        ("FADD2 R2, R4.F32x2.HI_LO, R6.F32x2.HI_LO", "FP32 x 2"),
        ("HMNMX2.BF16_V2 R4, R4, R5, !PT", "packed 16-bit"),
        ("HADD2.F32 R4, -RZ, R8.H0_H0", "conversion"),
        ("SHF.L.U32 R3, R4, 0x10, RZ", "conversion"),
        ("SHF.L.U32 R3, R4, 0x3, RZ", "integer"),
        ("IMAD.U32 R3, R4, 0x10000, RZ", "conversion"),
        ("LOP3.LUT R3, R4, 0xffff0000, RZ, 0xc0, !PT", "conversion"),
        ("LOP3.LUT R3, R4, 0x1f, RZ, 0xc0, !PT", "integer"),
        ("PRMT R4, R4, 0x7632, R4", "conversion"),
        ("F2FP.BF16.F32.PACK_AB R4, R23, R4", "conversion"),
        ("IMAD.MOV.U32 R5, RZ, RZ, -0x7f0080", "move"),
        ("HFMA2.MMA R17, -RZ, RZ, 0, 0", "move"),
        ("SHFL.BFLY PT, R4, R5, 0x10, 0x1f", "shuffle"),
        ("BAR.SYNC.DEFER_BLOCKING 0x0", "barrier"),
        ("ATOMG.E.ADD.STRONG.GPU PT, R4, desc[UR4][R2.64], R5", "atomic"),
        ("LDL R4, [R1]", "local"),
        ("UIADD3 UR4, UR4, 0x4000, URZ", "integer"),
        ("@P0 EXIT", "branch"),
    ],
)
def test_class_of_an_instruction(text, kind):
    assert instruction_class(instruction(text)) == kind


def test_units_and_their_rates():
    assert units(instruction("MUFU.EX2 R26, R24")) == {"special": 1 / 16}
    assert units(instruction("FMNMX.NAN R27, R16, R25, !PT")) == {"integer": 1 / 64}
    assert units(instruction("FFMA R5, R0, R29, RZ")) == {"multiply": 1 / 128}
    assert units(instruction("LDG.E.128 R8, desc[UR4][R22.64]")) == {}
