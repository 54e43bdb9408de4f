"""Every Triton kernel compiles for every target in every form its launchers choose, within limits, without spills."""

import concurrent.futures
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_triton.py")
KERNELS = {
    "entropy_gradient_kernel",
    "split_gradient_kernel",
    "scale_kernel",
    "partial_sums_kernel",
    "finish_kernel",
    "coefficients_kernel",
    "row_gradient_kernel",
}
# Bytes of shared memory a program may have, as the vendors document it.
SHARED_LIMIT = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "cuda:100": 227 << 10, "hip:gfx942": 64 << 10}
NVIDIA = [target for target in SHARED_LIMIT if target.startswith("cuda")]
REGISTERS_PER_MULTIPROCESSOR = 65536


def compile_all(target: str, cache: Path) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "COV_CORE_SOURCE")}
    environment["TRITON_CACHE_DIR"] = str(cache / target.replace(":", "-"))
    run = subprocess.run(
        [sys.executable, SCRIPT, target], capture_output=True, text=True, env=environment, cwd=SCRIPT.parents[3]
    )
    assert run.returncode == 0, run.stderr
    return [json.loads(line) for line in run.stdout.splitlines()]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> dict[str, list[dict]]:
    cache = tmp_path_factory.mktemp("triton")
    with concurrent.futures.ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        results = pool.map(lambda target: compile_all(target, cache), SHARED_LIMIT)
        return dict(zip(SHARED_LIMIT, results, strict=True))


def describe(row: dict) -> str:
    return f"{row['kernel']} ({row['num_warps']} warps, {row['arguments']}, {row['constants']}): {row}"


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_every_kernel_was_compiled(compiled, target):
    assert {row["kernel"] for row in compiled[target]} == KERNELS
    print(f"\n{target:12} {'kernel':28} {'warps':>5} {'forms':>5} {'registers':>9} {'spills':>6} {'shared':>6}")
    for kernel, warps in sorted({(row["kernel"], row["num_warps"]) for row in compiled[target]}):
        rows = [row for row in compiled[target] if (row["kernel"], row["num_warps"]) == (kernel, warps)]
        worst = {key: max(row[key] for row in rows) for key in ("registers", "spill_bytes", "shared")}
        print(f"{'':12} {kernel:28} {warps:5} {len(rows):5} {worst['registers']:9} {worst['spill_bytes']:6} "
              f"{worst['shared']:6}")  # fmt: skip


@pytest.mark.parametrize("target", NVIDIA)
def test_nothing_is_spilled(compiled, target):
    spilled = [describe(row) for row in compiled[target] if row["spill_bytes"] > 0]
    assert not spilled, "\n".join(spilled)


@pytest.mark.parametrize("target", SHARED_LIMIT)
def test_shared_memory_is_within_the_limit(compiled, target):
    assert all(row["shared"] <= SHARED_LIMIT[target] for row in compiled[target])


@pytest.mark.parametrize("target", NVIDIA)
def test_a_program_fits_a_multiprocessor(compiled, target):
    too_large = [
        describe(row)
        for row in compiled[target]
        if row["registers"] * 32 * row["num_warps"] > REGISTERS_PER_MULTIPROCESSOR
    ]
    assert not too_large, "\n".join(too_large)


@pytest.mark.parametrize("target", NVIDIA)
def test_programs_of_long_rows_have_a_multiprocessor_to_themselves(compiled, target):
    # Two of them would put twice as many rows into the second-level cache as it holds.
    # float32 is read from memory twice either way from 380 KB a row on.
    rows = [r for r in compiled[target] if r["kernel"] == "entropy_gradient_kernel" and r["num_warps"] == 32]
    rows = [r for r in rows if "'logits': '*fp32'" not in r["arguments"]]
    assert rows
    shared = [describe(row) for row in rows if 2 * row["registers"] * 32 * 32 <= REGISTERS_PER_MULTIPROCESSOR]
    assert not shared, "\n".join(shared)
