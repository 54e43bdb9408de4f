"""These tests read the machine code of a few kernels, and check the model of their time and the report's tables."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))
from compiled_launches import Compiled, Launch  # noqa: E402
from kernel_model import GPUS, Gpu, estimate, programs_together  # noqa: E402
from row_code import Piece  # noqa: E402

pytestmark = pytest.mark.slow

# The program as it is, at one vocabulary.
ONE_VOCABULARY = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import launch_forms, machine_code
launch_forms.VOCABULARIES, launch_forms.FEW_ROWS = (32_000,), ()
machine_code.main()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("machine_code")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(folder / "triton")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-c", ONE_VOCABULARY, BENCHMARKS, "--target", "cuda:90", "--out", folder]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def rows(folder):
    return [json.loads(line) for line in (folder / "machine_code.jsonl").read_text().splitlines()]


def test_every_machine_code_is_kept_and_described(folder, rows):
    codes = [row for row in rows if "cubin" in row]
    assert {file.stem for file in (folder / "cubins").iterdir()} == {row["cubin"] for row in codes}
    for row in codes:
        assert {"kernel", "registers", "spill_bytes", "shared", "num_warps", "used_by", "machine"} <= row.keys()
        assert row["programs_together"] > 0
        assert row["pieces"] or "VECTOR" not in row["constants"]
        for piece in row["pieces"]:
            assert piece["total"] == pytest.approx(sum(piece["instructions"].values()), rel=1e-3)
            # An exponential an element and more, but where rows are cleared or multiplied.
            assert piece["kind"] == "clears" or row["kernel"] == "scale_kernel" or piece["instructions"]["MUFU"] >= 1
            assert piece["kind"] == "clears" or 16 <= piece["bytes_in_flight"] <= 256


def test_every_call_is_estimated_and_no_call_takes_less_than_its_floor(rows):
    found = [row for row in rows if "gpu" in row]
    assert {row["gpu"] for row in found} == {"H100", "H200"}
    assert len(found) == 2 * 9 * 3
    assert all(row["estimated_over_floor"] >= 0.999 for row in found)
    assert {row["floor"] for row in found if row["call"] == "entropy"} == {"read"}


def made_up(pieces: list[Piece], registers: int = 32) -> tuple[Launch, dict[str, list[Piece]]]:
    """Return a launch of a kernel with these pieces on 4096 rows, a program a row."""
    kernel = Compiled(
        name="kernel",
        types={"logits": "*bf16", "out": "*bf16"},
        constants={"LANES": 512, "UNROLL": 2, "VECTOR": 8},
        warps=16,
        shared=0,
        code=b"",
        assembly="",
        nvidia=True,
    )
    kernel.__dict__["resources"] = {"registers": registers, "spill_bytes": 0}
    return Launch(kernel, 4096, {}), {kernel.digest: pieces}


def piece(kind: str, instructions: float, special: float = 1.0, bytes_in_flight: int = 32) -> Piece:
    return Piece(kind, "loop", 16, 16, {"FP32": instructions}, {"special": special / 16}, bytes_in_flight)


def seconds(pieces: list[Piece], gpu: Gpu = GPUS[1], registers: int = 32, vocab: int = 32_768) -> tuple[float, str]:
    launch, found = made_up(pieces, registers)
    return estimate([launch], found, 4096, vocab, gpu)


def test_a_kernel_with_few_instructions_takes_as_long_as_its_bytes():
    found, limit = seconds([piece("reads", 4)])
    assert limit == "memory"
    assert found == pytest.approx(4096 * 32_768 * 2 / GPUS[1].copied)


def test_a_kernel_with_many_instructions_takes_as_long_as_these():
    found, limit = seconds([piece("reads", 40)])
    assert limit == "issue"
    assert seconds([piece("reads", 80)])[0] == pytest.approx(2 * found)


def test_special_functions_have_a_rate_of_their_own():
    assert seconds([piece("reads", 10, special=4)])[1] == "special"


def test_too_few_bytes_in_flight_are_a_limit():
    assert seconds([piece("reads", 4, bytes_in_flight=8)])[1] == "latency"


def test_a_second_reading_is_free_as_long_as_the_cache_holds_the_row():
    pieces = [piece("reads", 4), piece("writes", 4)]
    short, _ = seconds(pieces, vocab=16_384)
    long, _ = seconds(pieces, vocab=262_144)
    assert short == pytest.approx(4096 * 16_384 * 4 / GPUS[1].copied)
    # Of 132 x 4 rows of 512 KB, 30 MB are left.
    assert long == pytest.approx(4096 * 262_144 * (4 + 2 * (1 - 30e6 / (528 * (512 << 10)))) / GPUS[1].copied)


@pytest.mark.parametrize(("registers", "programs"), [(32, 4), (33, 3), (40, 3), (41, 2), (64, 2), (65, 1)])
def test_registers_decide_how_many_programs_share_a_multiprocessor(registers, programs):
    assert programs_together(made_up([], registers)[0].kernel) == programs


def test_the_report_says_that_times_are_estimates(tmp_path):
    (tmp_path / "results").mkdir()
    for name in ("machine_code.jsonl", "host_overhead_cpu.jsonl"):
        (tmp_path / "results" / name).write_bytes((BENCHMARKS / "results" / name).read_bytes())
    marked = "".join(f"<!-- benchmark:{name} -->old<!-- /benchmark:{name} -->\n" for name in ("ranges", "summary"))
    (tmp_path / "README.md").write_text(marked)
    marked = "".join(f"<!-- benchmark:{name} -->old<!-- /benchmark:{name} -->\n" for name in ("tables", "machine-code"))
    (tmp_path / "benchmarks.md").write_text(marked)
    command = [sys.executable, BENCHMARKS / "report.py", "--results", tmp_path / "results"]
    command += ["--readme", tmp_path / "README.md", "--docs", tmp_path / "benchmarks.md"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = (tmp_path / "benchmarks.md").read_text().partition("<!-- benchmark:machine-code -->")[2]
    assert "old" not in text
    assert "Nothing in this section was measured on a GPU" in text
    heads = [line for line in text.splitlines() if line.startswith("| call | logits | over")]
    assert len(heads) == 2
    assert all("estimated" in cell for cell in heads[0].split(" | ")[3:])
    assert "Estimated, without a mask" in text
