"""This module sorts machine instructions: by what they do, by the unit that runs them, and by the bytes they move."""

import re

from sass import Instruction

# An access of a width has a class of its own, "load 16 B"; these are the others, in the order of the tables.
CLASSES = (
    "MUFU",
    "FP32",
    "FP32 x 2",
    "packed 16-bit",
    "conversion",
    "integer",
    "move",
    "shared",
    "local",
    "atomic",
    "shuffle",
    "barrier",
    "branch",
)
_NAMES = {
    "MUFU": "MUFU",
    "FP32": "FADD FMUL FFMA FMNMX FMNMX3 FSEL FSET FSETP FCHK FHADD FHFMA FSWZADD FADD32I FMUL32I FFMA32I",
    "FP32 x 2": "FADD2 FMUL2 FFMA2",
    "packed 16-bit": "HADD2 HMUL2 HFMA2 HMNMX2 HMNMX3 HSET2 HSETP2 VHMNMX HADD2_32I HMUL2_32I HFMA2_32I",
    "conversion": "F2F F2FP F2I F2IP I2F I2FP I2I FRND PRMT",
    "move": "MOV UMOV MOV32I CS2R S2R S2UR R2UR R2P P2R LDC ULDC LDCU",
    "shared": "LDS STS LDSM STSM LDGSTS",
    "local": "LDL STL",
    "atomic": "ATOM ATOMG ATOMS RED REDG CCTL",
    "shuffle": "SHFL REDUX CREDUX MATCH",
    "barrier": "BAR MEMBAR ERRBAR FENCE DEPBAR LDGDEPBAR SYNCS",
    "branch": "BRA EXIT RET CALL BRX JMP BSSY BSYNC BREAK BMOV WARPSYNC YIELD NANOSLEEP NOP",
}
# A shift by 16 bits, a multiplication by 2^16, and a mask of the upper 16 bits.
_UNPACKS = re.compile(r", (0x10|0x10000), RZ$|, 0xffff0000, RZ\b")
_CLASS_OF = {name: kind for kind, names in _NAMES.items() for name in names.split()}
# Threads a clock and multiprocessor that a unit takes an instruction of, as the CUDA programming guide's table of
# arithmetic throughput has it for compute capability 9.0 and 10.0 alike. An instruction that is not listed is taken to
# be limited by its issue alone.
_UNITS = {
    ("special", 16): "MUFU F2F F2I I2F FRND",
    (
        "integer",
        64,
    ): "FMNMX FMNMX3 FSEL FSET FSETP HMNMX2 HMNMX3 VHMNMX HSETP2 HSET2 PRMT F2FP I2FP LOP3 SHF SHL SHR LEA "
    "IADD3 VIADD VIADDMNMX ISETP IMNMX VIMNMX IABS SEL SGXT BMSK PLOP3 MOV P2R R2P",
    ("multiply", 128): "FADD FMUL FFMA FHADD FHFMA HADD2 HMUL2 HFMA2",
    ("multiply", 64): "IMAD FADD2 FMUL2 FFMA2",
}
_UNIT_OF = {name: unit for unit, names in _UNITS.items() for name in names.split()}


def instruction_class(instruction: Instruction) -> str:
    """Return "load 16 B", "store 4 B" and so on for an access of device memory, or one of CLASSES."""
    loaded, stored = moved_bytes(instruction)
    if loaded or stored:
        return f"{'load' if loaded else 'store'} {loaded or stored} B"
    name, operands = instruction.name, instruction.operands
    if name == "IMAD" and instruction.opcode.startswith("IMAD.MOV"):
        return "move"
    # These make a float32 of a bfloat16, and the addition makes one of a float16.
    if name in ("SHF", "SHL", "IMAD", "LOP3") and _UNPACKS.search(operands):
        return "conversion"
    if name == "HADD2" and ".F32" in instruction.opcode:
        return "conversion"
    # This multiplication of zeros loads a constant.
    if name == "HFMA2" and "-RZ, RZ" in operands:
        return "move"
    return _CLASS_OF.get(name, "integer")


def units(instruction: Instruction) -> dict[str, float]:
    """Return the clocks of a multiprocessor's unit that a thread's instruction takes, by the unit's name."""
    unit = _UNIT_OF.get(instruction.name)
    return {unit[0]: 1 / unit[1]} if unit else {}


def moved_bytes(instruction: Instruction) -> tuple[int, int]:
    """Return the bytes that a thread loads from device memory with an instruction, and that it stores."""
    if instruction.name not in ("LDG", "STG", "LD", "ST"):
        return 0, 0
    width = re.search(r"\.(?:[US]?(8|16|64|128|256))(?:\.|$)", instruction.opcode)
    size = int(width[1]) // 8 if width else 4
    return (size, 0) if instruction.name.startswith("L") else (0, size)
