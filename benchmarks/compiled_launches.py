"""This module compiles what the Triton launchers launch, for a GPU that need not be there.

The launchers themselves run, on tensors that have a shape and no memory; only the launch is replaced, by a compilation.
Triton reads TRITON_INTERPRET when it defines the kernels, so a process that compiles must run without it.
"""

import math
import re
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from em_kernels.ops.backends.triton import blocks


class Target(NamedTuple):
    gpu: GPUTarget
    multiprocessors: int


TARGETS = {
    "cuda:80": Target(GPUTarget("cuda", 80, 32), 108),
    "cuda:90": Target(GPUTarget("cuda", 90, 32), 132),
    "cuda:100": Target(GPUTarget("cuda", 100, 32), 148),
    "hip:gfx942": Target(GPUTarget("hip", "gfx942", 64), 304),
}


@dataclass(frozen=True, eq=False)
class Compiled:
    """A kernel in one form, compiled.

    Attributes:
        name: the kernel's name.
        types: what each argument is compiled for, by name, as Triton writes it: "*bf16", "i32".
        constants: the values of the arguments that are constant, by name.
        warps: warps of a program.
        shared: bytes of shared memory of a program.
        code: the machine code; on an AMD GPU, the assembly.
        assembly: what the machine code is made of: PTX, or the assembly of an AMD GPU.
    """

    name: str
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    shared: int
    code: bytes
    assembly: str
    nvidia: bool

    @cached_property
    def digest(self) -> str:
        """Tells machine codes apart."""
        return sha256(self.code).hexdigest()[:16]

    @cached_property
    def resources(self) -> dict[str, int]:
        """Registers of a thread, and the bytes that it keeps in memory for want of registers, its stack included."""
        return _nvidia_resources(self.code) if self.nvidia else _amd_resources(self.code.decode())


class Launch(NamedTuple):
    """A launch that was replaced: the kernel, the number of programs, and the integers it was given, by name."""

    kernel: Compiled
    programs: int
    integers: dict[str, int]


def compile_launches(name: str) -> list[Launch]:
    """From now on, compile for the target of this name instead of launching; the list that is returned grows."""
    target = TARGETS[name]
    triton.runtime.driver.set_active(_Driver(target.gpu))
    blocks.THREADS_PER_WARP = target.gpu.warp_size
    blocks.multiprocessors = lambda device: target.multiprocessors
    blocks.limits_registers = lambda device: name in ("cuda:80", "cuda:90")
    launches: list[Launch] = []
    found: dict[str, Compiled] = {}

    def compile_instead(self: JITFunction, grid: tuple[int, ...]):
        def compile_once(*args, **kwargs):
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if kernel.hash not in found:
                nvidia = target.gpu.backend == "cuda"
                found[kernel.hash] = Compiled(
                    name=self.__name__,
                    types=dict(kernel.src.signature),
                    constants={self.arg_names[key[0]]: value for key, value in kernel.src.constants.items()},
                    warps=kernel.metadata.num_warps,
                    shared=kernel.metadata.shared,
                    code=kernel.asm["cubin"] if nvidia else kernel.asm["amdgcn"].encode(),
                    assembly=kernel.asm["ptx" if nvidia else "amdgcn"],
                    nvidia=nvidia,
                )
            given = dict(zip(self.arg_names, args, strict=False)) | kwargs
            integers = {key: value for key, value in given.items() if type(value) is int and key in self.arg_names}
            launches.append(Launch(found[kernel.hash], math.prod(grid), integers))

        return compile_once

    JITFunction.__getitem__ = compile_instead
    return launches


class _Driver:
    """A driver that stands where Triton looks for a GPU, and names the one to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def _nvidia_resources(code: bytes) -> dict[str, int]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(code)
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", path]
        dump = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump)
    if found is None:
        raise RuntimeError(f"no resource usage in {dump!r}")
    registers, stack, _, local = map(int, found.groups())
    return {"registers": registers, "spill_bytes": stack + local}


def _amd_resources(assembly: str) -> dict[str, int]:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no {name} in the assembly")
        return int(found.group(1))

    return {"registers": value("vgpr_count"), "spill_bytes": 4 * value("vgpr_spill_count")}
