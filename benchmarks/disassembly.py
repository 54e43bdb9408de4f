"""This module disassembles machine code for NVIDIA's GPUs with the tool that Triton's package brings."""

import re
import struct
import subprocess
import tempfile
from pathlib import Path

import triton


def disassemble(cubins: list[bytes], architecture: int) -> list[str]:
    """Return the instructions of each kernel as nvdisasm writes them, a line for each, with addresses as targets.

    The tool takes most of a second to start, so it is given all kernels at once: their instructions in a row. A branch
    is relative to its own address, so each keeps its target.
    """
    codes = [_instructions(cubin) for cubin in cubins]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "instructions"
        path.write_bytes(b"".join(codes))
        command = [triton.knobs.nvidia.nvdisasm.path, "--binary", f"SM{architecture}", path]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    lines = [(int(line[1], 16), line[0]) for line in re.finditer(r"^ */\*([0-9a-f]+)\*/.*$", output, re.MULTILINE)]
    found, start = [], 0
    for code in codes:
        stop = start + len(code)
        found.append("\n".join(line for address, line in lines if start <= address < stop))
        start = stop
    return found


def _instructions(cubin: bytes) -> bytes:
    """Return the part of an ELF file (64-bit, little-endian) that holds the kernel's instructions."""
    (headers,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<HHH", cubin, 0x3A)
    sections = [struct.unpack_from("<IIQQQQ", cubin, headers + i * size) for i in range(count)]
    found = []
    for name, _, _, _, offset, length in sections:
        start = sections[names][4] + name
        if cubin[start : cubin.index(b"\0", start)].startswith(b".text."):
            found.append(cubin[offset : offset + length])
    if len(found) != 1:
        raise ValueError(f"the file has {len(found)} sections of instructions, expected one kernel in one section")
    return found[0]
