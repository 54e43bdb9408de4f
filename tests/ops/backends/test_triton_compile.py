"""Every Triton kernel compiles for every target in every form its launchers choose, and its machine code keeps limits.

The limits on the code that goes through rows are those at which it no longer waits for anything but memory.
"""

import concurrent.futures
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

pytest.importorskip("triton")

SCRIPT = Path(__file__).with_name("compile_triton.py")
KERNELS = {
    "entropy_gradient_kernel",
    "scale_kernel",
    "partial_sums_kernel",
    "finish_kernel",
    "coefficients_kernel",
    "row_gradient_kernel",
}
FUSED = "entropy_gradient_kernel"
# Bytes of shared memory a program may have, as the vendors document it.
SHARED_LIMIT = {"cuda:80": 163 << 10, "cuda:90": 227 << 10, "cuda:100": 227 << 10, "hip:gfx942": 64 << 10}
NVIDIA = [target for target in SHARED_LIMIT if target.startswith("cuda")]
REGISTERS_PER_MULTIPROCESSOR = 65536


# The machine code is read for these.
READ = ("cuda:90", "cuda:100")
# Instructions for each element of the kernel that reads a row and then writes its gradient, both together, by the bytes
# of an element: what a further element of a part costs, and all that a full part costs.
MOST_FURTHER, MOST_OF_ALL = {2: 18, 4: 42}, {2: 21, 4: 47}
# A part of so many loads of a thread is full, and one of so many is half full.
FULL, HALF = 16, 8
# Five programs of 128 threads share a multiprocessor if a thread has up to 96 registers, and four if it has up to 128.
SHARING_REGISTERS = {"cuda:90": 96, "cuda:100": 128}
# An odd vocabulary and one that is a multiple of 8, with blocks of the same size.
ODD, EVEN = 128_257, 50_264
# What goes through an odd row may have these many times the instructions, for what finds the row's ends.
ODD_ROOM = 1.25


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
    shapes = sorted({(form["call"], form["dtype"], form["rows"], form["vocab"]) for form in row["forms"]})
    return (
        f"{row['kernel']} ({row['num_warps']} warps, {row['registers']} registers, {row['spill_bytes']} bytes spilled, "
        f"{row['constants']}): {shapes}"
    )


def pieces(rows: list[dict], holds: Callable[[dict], bool]) -> Iterator[tuple[dict, dict]]:
    """Yields the kernels of calls of which `holds` is true, with each piece of their code that goes through rows."""
    found = [(row, piece) for row in rows if any(map(holds, row["forms"])) for piece in row["pieces"]]
    assert found
    yield from found


def told(row: dict, piece: dict) -> str:
    return f"{piece['kind']} ({piece['where']}), {piece['instructions']}: {describe(row)}"


def accesses(piece: dict) -> dict[int, float]:
    """Loads and stores for each element, by their width in bytes."""
    return {int(name.split()[1]): n for name, n in piece["instructions"].items() if name.startswith(("load", "store"))}


def main_pieces(row: dict) -> dict[str, dict]:
    """The pieces by kind: of several of one kind, the one with the fewest instructions, which most elements take."""
    return {piece["kind"]: piece for piece in sorted(row["pieces"], key=lambda piece: -piece["total"])}


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
    # With a soft cap, an odd vocabulary and every statistic, the compiler for sm_100 keeps two registers in memory.
    allowed = {True: 8, False: 0}
    spilled = [
        describe(row)
        for row in compiled[target]
        if row["spill_bytes"] > allowed[target == "cuda:100" and "softcap" not in row["constants"]]
    ]
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


@pytest.mark.parametrize("target", READ)
def test_rows_of_a_multiple_of_8_elements_are_read_and_written_16_bytes_at_a_time(compiled, target):
    narrow = [
        told(row, piece)
        for row, piece in pieces(compiled[target], lambda form: form["vocab"] % 8 == 0)
        # What a program with one tile loads before it is not of the row.
        if piece["width"] < 16 or (piece["where"] == "loop" and min(accesses(piece)) < 16)
    ]
    assert not narrow, "\n".join(narrow)


@pytest.mark.parametrize("target", READ)
def test_threads_exchange_nothing_where_they_go_through_rows(compiled, target):
    exchanging = [
        told(row, piece)
        for row, piece in pieces(compiled[target], lambda form: True)
        if {"shuffle", "barrier", "shared", "local", "atomic"} & piece["instructions"].keys()
        # A part of the fused kernel is one block without a loop, and threads unite their sums after it.
        if row["kernel"] != FUSED or piece["where"] == "loop"
    ]
    assert not exchanging, "\n".join(exchanging)


@pytest.mark.parametrize("target", READ)
def test_the_body_of_an_odd_row_is_that_of_an_even_one(compiled, target):
    def by_form(vocab: int) -> dict[tuple, dict]:
        return {
            (row["kernel"], form["call"], form["dtype"], form["rows"], form["plain"]): row
            for row in compiled[target]
            for form in row["forms"]
            # Fewer rows have blocks that differ by the vocabulary, and to find the target among all is more work.
            if form["vocab"] == vocab and form["rows"] == 4096 and "all" not in form["call"] and row["pieces"]
        }

    odd, even = by_form(ODD), by_form(EVEN)
    assert odd
    different = []
    for form, row in odd.items():
        expected, found = main_pieces(even[form]), main_pieces(row)
        for kind, piece in expected.items():
            if kind != "clears" and (
                kind not in found
                or found[kind]["width"] < piece["width"]
                or found[kind]["total"] > ODD_ROOM * piece["total"]
            ):
                totals = {name: round(piece["total"], 1) for name, piece in found.items()}
                different.append(f"{form}: {kind} takes {piece['total']:.1f}, of an odd row {totals}")
    assert not different, "\n".join(different)


def fused(rows: list[dict], size: int, unroll: int) -> list[dict]:
    """The fused kernels for rows of a multiple of 8 elements of `size` bytes, with parts of `unroll` loads a thread."""
    found = [
        row
        for row in rows
        if row["kernel"] == FUSED and row["constants"]["UNROLL"] == unroll and row["pieces"]
        if row["arguments"]["logits"].endswith("32") == (size == 4)
        and row["arguments"]["out"].endswith("32") == (size == 4)
        if any(form["vocab"] % 8 == 0 and form["call"] == "loss and gradient" for form in row["forms"])
    ]
    assert found
    return found


def instructions_of_part(row: dict) -> float:
    """The instructions of a thread for its sums and for its gradient."""
    found = main_pieces(row)
    return sum(found[kind]["total"] * found[kind]["elements"] for kind in ("reads", "writes"))


@pytest.mark.parametrize("size", MOST_FURTHER)
def test_instructions_for_each_element_of_the_fused_kernel(compiled, size):
    full, half = (fused(compiled["cuda:90"], size, unroll) for unroll in (FULL, HALF))
    elements = FULL * 16 // size
    too_many = [f"{describe(row)}" for row in full if instructions_of_part(row) > MOST_OF_ALL[size] * elements]
    assert not too_many, "\n".join(too_many)
    # The forms are those of the same arguments in both.
    further = max(map(instructions_of_part, full)) - max(map(instructions_of_part, half))
    assert further <= MOST_FURTHER[size] * (elements - HALF * 16 // size)


@pytest.mark.parametrize("target", SHARING_REGISTERS)
def test_programs_of_the_fused_kernel_share_a_multiprocessor(compiled, target):
    rows = [row for size in MOST_FURTHER for row in fused(compiled[target], size, FULL)]
    # float16 takes more to widen and to round.
    rows = [row for row in rows if row["arguments"]["logits"] != "*fp16"]
    most = SHARING_REGISTERS[target]
    too_many = [describe(row) for row in rows if row["registers"] > most or row["num_warps"] != 4]
    assert not too_many, "\n".join(too_many)


def follows(operations: list[str], *names: str) -> bool:
    """Whether instructions that begin with these names come one after the other, with others between them."""
    found = iter(operations)
    return all(any(operation.startswith(name) for operation in found) for name in names)


@pytest.mark.parametrize("target", NVIDIA)
def test_the_order_of_memory_in_the_fused_kernel(compiled, target):
    # What the schedule's argument rests on, and neither the interpreter nor the search of the schedule can see.
    rows = [row["memory"] for row in compiled[target] if row["kernel"] == FUSED]
    assert rows
    for operations in rows:
        (acquires,) = (i for i, name in enumerate(operations) if ".acquire." in name)
        # One thread waits for the row's counter; the barrier hands that on to the others before they read the sums.
        assert follows(operations[acquires:], "st.shared", "bar.sync", "ld.global", "ld.global", "ld.global")
        releases = [i for i, name in enumerate(operations) if ".release." in name]
        assert len(releases) == 1
        # The sums are stored, a barrier waits for all threads, and one of them releases.
        assert operations[releases[0] - 1].startswith("bar.sync")
        assert follows(operations[: releases[0]], "st.global", "st.global", "st.global", "bar.sync")
        # A row's loss is stored before it is counted, and the last to count reads the losses after a barrier.
        counts = [i for i, name in enumerate(operations) if ".acq_rel." in name]
        assert counts
        for i in counts:
            assert operations[i - 1].startswith("bar.sync")
            assert follows(operations[i:], "bar.sync", "ld.global")
