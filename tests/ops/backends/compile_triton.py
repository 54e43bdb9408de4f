"""Compiles what the Triton launchers launch, for a target named on the command line, without a GPU.

The launchers themselves run, on small CPU tensors, over every choice they have; only the launch is replaced, by a
compilation. The output is a JSON line a kernel compiled: its name, what it was compiled for, and its resources.

    python tests/ops/backends/compile_triton.py cuda:90
"""

import itertools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from em_kernels.ops.backends.triton import launch
from em_kernels.ops.types import Divisor, Saved, Temperature, Upstream, Wanted

TARGETS = {
    "cuda:80": GPUTarget("cuda", 80, 32),
    "cuda:90": GPUTarget("cuda", 90, 32),
    "cuda:100": GPUTarget("cuda", 100, 32),
    "hip:gfx942": GPUTarget("hip", "gfx942", 64),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One vocabulary for each tile of the fused kernel, in bytes a row; divisible by 16 as those of language models are.
ROW_BYTES = (8 << 10, 128 << 10, 256 << 10)
# An odd vocabulary, whose rows are not aligned; and a batch in which the second sequence starts beyond 32 bits.
ODD_VOCAB = 128257
FAR_STRIDE = 2**31 + 2**20
# On a GPU of 132 multiprocessors: a row each or more, fewer, and so few that the tiles shrink.
MULTIPROCESSORS = 132
ROWS = (132, 64, 1)


class CompilingDriver:
    """A driver that stands where Triton looks for a GPU, and names the one to compile for."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def launch_everything() -> None:
    """Calls every launcher over the combinations of its optional arguments, dtypes and row lengths."""
    launch_losses()
    launch_unaligned_and_far()
    for dtype, rows in itertools.product(DTYPES, ROWS):
        logits = torch.empty(1, rows, 4096, dtype=dtype)
        per_row = torch.ones(rows)
        # A mask and a temperature per row are a load each before the loops, and are compiled together or not at all.
        for by_row, target, second_moment, extra in itertools.product((False, True), repeat=4):
            launch.row_statistics(
                logits,
                per_row.bool() if by_row else None,
                Temperature(per_row if by_row else None, 1.5),
                per_row.long() if target else None,
                Wanted(second_moment, extra),
            )
        for upstream in itertools.product((None, per_row), repeat=4):
            saved = Saved.allocate(logits, rows)
            launch.row_gradient(logits, saved, per_row.long(), Upstream(*upstream), torch.empty_like(logits))
        launch.scale_(logits, torch.ones(()))


def launch_losses() -> None:
    for dtype, row_bytes in itertools.product(DTYPES, ROW_BYTES):
        vocab = row_bytes // dtype.itemsize
        for rows, weight, total, temperature in itertools.product(
            ROWS, (None, torch.bool, torch.float32), (False, True), (False, True)
        ):
            logits = torch.empty(1, rows, vocab, dtype=dtype)
            launch.entropy_with_gradient(
                logits,
                None if weight is None else torch.ones(rows, dtype=weight),
                Divisor(torch.ones(()) if total else None, 2),
                Temperature(torch.ones(rows) if temperature else None, 1.5),
                torch.empty_like(logits),
            )


def launch_unaligned_and_far() -> None:
    for dtype in DTYPES:
        for shape in ((1, 132, ODD_VOCAB), (1, 64, ODD_VOCAB), (1, 1, ODD_VOCAB), (2, 66, 128 << 10)):
            # Only shapes and strides exist on the meta device.
            strides = (FAR_STRIDE if shape[0] == 2 else 0, shape[2], 1)
            logits = torch.empty_strided(shape, strides, dtype=dtype, device="meta")
            gradient = torch.empty_like(logits)
            rows = shape[0] * shape[1]
            weight = torch.ones(rows, device="meta")
            divisor, temperature = Divisor(torch.ones((), device="meta"), 2), Temperature(torch.ones_like(weight))
            launch.entropy_with_gradient(logits, weight, divisor, temperature, gradient)
            everything = (logits, weight.bool(), temperature, weight.long(), Wanted(True, True))
            launch.row_sums(*everything)
            _, saved = launch.row_statistics(*everything)
            launch.row_gradient(logits, saved, weight.long(), Upstream(weight, weight, weight, weight), gradient)
            launch.scale_(logits, torch.ones((), device="meta"))


def nvidia_resources(cubin: bytes) -> dict[str, int]:
    """Registers a thread, and bytes of local memory (spills and stack), from the machine code."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        cuobjdump = triton.knobs.nvidia.cuobjdump.path
        dump = subprocess.run([cuobjdump, "--dump-resource-usage", path], capture_output=True, text=True, check=True)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", dump.stdout)
    if found is None:
        raise RuntimeError(f"no resource usage in {dump.stdout!r}")
    registers, stack, _, local = map(int, found.groups())
    return {"registers": registers, "spill_bytes": stack + local}


def amd_resources(assembly: str) -> dict[str, int]:
    def value(name: str) -> int:
        found = re.search(rf"\.{name}:\s*(\d+)", assembly)
        if found is None:
            raise RuntimeError(f"no {name} in the assembly")
        return int(found.group(1))

    return {"registers": value("vgpr_count"), "spill_bytes": 4 * value("vgpr_spill_count")}


def main(name: str) -> None:
    target = TARGETS[name]
    triton.runtime.driver.set_active(CompilingDriver(target))
    launch._THREADS_PER_WARP = target.warp_size
    launch._multiprocessors = lambda device: MULTIPROCESSORS
    seen = set()

    def compile_instead(self: JITFunction, grid: tuple[int, ...]):
        def compile_once(*args, **kwargs):
            kernel = self.run(*args, grid=grid, warmup=True, **kwargs)
            if kernel.hash in seen:
                return
            seen.add(kernel.hash)
            nvidia = target.backend == "cuda"
            row = {
                "kernel": self.__name__,
                "arguments": str({k: v for k, v in kernel.src.signature.items() if v.startswith("*")}),
                "constants": str({self.arg_names[k[0]]: v for k, v in kernel.src.constants.items()}),
                "num_warps": kernel.metadata.num_warps,
                "shared": kernel.metadata.shared,
                **(nvidia_resources(kernel.asm["cubin"]) if nvidia else amd_resources(kernel.asm["amdgcn"])),
            }
            print(json.dumps(row), flush=True)

        return compile_once

    JITFunction.__getitem__ = compile_instead
    launch_everything()


if __name__ == "__main__":
    main(sys.argv[1])
