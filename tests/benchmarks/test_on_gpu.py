"""The benchmarks on tiny sizes, as they run on a GPU machine, line by line, on whatever is here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
STEPS = ["entropy_loss", "linear_entropy", "host_overhead", "tune_tiles"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("on_gpu")
    subprocess.run(
        [SCRIPT, folder],
        env={**os.environ, "EM_SIZE": "tiny", "EM_DEVICE": "cpu", "EM_SKIP_TESTS": "1", "PYTHON": sys.executable},
        check=True,
        timeout=500,
    )
    return folder


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def test_every_step_succeeds(folder):
    steps = [line.split("\t") for line in (folder / "steps.tsv").read_text().splitlines()]
    measured = [(name, status) for name, status, _ in steps if name != "build"]
    log = (folder / "log.txt").read_text()
    assert measured == [(name, "0") for name in STEPS], log
    assert len(list(folder.iterdir())) <= 8


@pytest.mark.parametrize("name", STEPS)
def test_every_row_is_a_measurement_with_its_machine(folder, name):
    for row in rows(folder, name):
        assert "error" not in row
        assert "memory_error" not in row
        assert row["seconds"] > 0
        assert {"name", "torch", "commit", "dirty", "time"} <= row["machine"].keys()


def test_entropy_loss_measures_and_checks_every_contender(folder):
    found = rows(folder, "entropy_loss")
    peaked = {(row["contender"], row["variant"]): row for row in found if row["logits"] == "peaked"}
    assert {name for name, _ in peaked} >= {"copy", "eager", "torch.compile", "cross_entropy", "ours"}
    assert {variant for name, variant in peaked if name == "ours"} == {
        "forward",
        "forward+backward",
        "inplace_backward",
        "reduction none",
        "upstream not 1",
        "masked 0",
        "masked 0.5",
        "masked 0.9",
    }
    for row in peaked.values():
        assert row["p20"] <= row["seconds"] <= row["p80"]
        # Roundings of float32: wrong weights, a wrong divisor or a wrong sign would be of order 1.
        assert row["loss_error"] < 1e-5
        assert row["gradient_error"] is None or row["gradient_error"] < 1e-3
        assert row["extra_bytes"] >= 0
    for (name, variant), row in peaked.items():
        assert (row["gradient_error"] is None) == (name == "copy" or variant == "forward")
    assert 0 < peaked["copy", "copy"]["mean_entropy"] < 2


def test_linear_entropy_measures_and_checks_every_contender(folder):
    found = {row["contender"]: row for row in rows(folder, "linear_entropy")}
    assert found.keys() >= {"three matmuls", "eager", "torch.compile", "entropy_loss on logits", "ours"}
    assert found.keys() >= {"ours, grad_tolerance 1e-6", "ours, frozen weight"}
    assert found["three matmuls"]["over_matmuls"] == 1
    for name, row in found.items():
        assert row["p20"] <= row["seconds"] <= row["p80"]
        assert row["extra_bytes"] >= 0
        assert 0 < row["columns_kept"] <= 1
        if name != "three matmuls":
            assert row["loss_error"] < 1e-5
            assert row["hidden_gradient_error"] < 1e-4
            assert ("weight_gradient_error" in row) == (name != "ours, frozen weight")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}", "--size", "huge"], "--size"),
        (["--out", "{tmp}/file"], "--out is"),
        ([], "--out"),
    ],
    ids=["unknown size", "output is a file", "no output"],
)
def test_a_wrong_argument_is_one_line_and_status_2(tmp_path, arguments, message):
    (tmp_path / "file").touch()
    command = [sys.executable, ROOT / "benchmarks" / "host_overhead.py", *(a.format(tmp=tmp_path) for a in arguments)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_on_gpu_without_a_folder_is_one_line_and_status_2():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    done = subprocess.run([SCRIPT, tmp_path], env={**os.environ, "PYTHON": "false", "EM_SKIP_TESTS": "1"})
    assert done.returncode == 1
    steps = [line.split("\t")[:2] for line in (tmp_path / "steps.tsv").read_text().splitlines()]
    assert steps[-4:] == [[name, "1"] for name in STEPS]
