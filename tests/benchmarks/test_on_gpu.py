"""These tests run every line of benchmarks/on_gpu.sh on tiny sizes and on whatever device is here."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "benchmarks" / "on_gpu.sh"
# The package before the lag comes from the history, which a checkout may lack.
BEFORE_LAG = "fused_before_lag"
# In a shell a missing git is a status, too, and not an exception.
HISTORY = not subprocess.run("git cat-file -e 2f90a53:em_kernels", shell=True, cwd=ROOT, capture_output=True).returncode
SUITES = ["tune_tiles", "entropy_loss", *([BEFORE_LAG] if HISTORY else [])]
SUITES += ["linear_entropy", "token_stats", "training_step", "host_overhead"]
pytestmark = pytest.mark.slow
ENVIRONMENT = {**os.environ, "EM_SIZE": "tiny", "EM_DEVICE": "cpu", "PYTHON": sys.executable}


def write_wheel(folder):
    """Write a wheel that has the name of a peer's package and a version that was never published."""
    with zipfile.ZipFile(folder / "quack_kernels-0.0.1-py3-none-any.whl", "w") as wheel:
        about = "quack_kernels-0.0.1.dist-info"
        wheel.writestr(f"{about}/METADATA", "Metadata-Version: 2.1\nName: quack-kernels\nVersion: 0.0.1\n")
        wheel.writestr(
            f"{about}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder, wheels = tmp_path_factory.mktemp("on_gpu"), tmp_path_factory.mktemp("wheels")
    write_wheel(wheels)
    done = subprocess.run(
        [SCRIPT, folder],
        # The steps with tests only collect them, because the suite that contains this test runs them anyway.
        env={**ENVIRONMENT, "EM_WHEELS": str(wheels), "PYTEST_ADDOPTS": "--collect-only"},
        timeout=1800,
    )
    assert done.returncode == 0, (folder / "log.txt").read_text()
    return folder


def steps(folder):
    found = re.findall(r"^([\w-]+)\t([^\t\n]+)\t\d+$", (folder / "log.txt").read_text(), re.MULTILINE)
    return [(name, status) for name, status in found if name != "build"]


def rows(folder, name):
    return [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]


def measured(folder, name):
    return [row for row in rows(folder, name) if "contender" in row and "not_run" not in row]


def test_every_step_succeeds(folder):
    names = ("wheels", "gpu-tests", "contract-tests", *SUITES, "sharded-training")
    assert steps(folder) == [(name, "0") for name in names]


def test_at_most_eight_files_of_less_than_sixteen_megabytes(folder):
    files = list(folder.iterdir())
    assert len(files) <= 8
    assert all(file.stat().st_size < 16e6 for file in files)


@pytest.mark.parametrize("name", SUITES)
def test_every_row_is_a_measurement_with_its_machine(folder, name):
    for row in rows(folder, name):
        assert {"name", "torch", "commit", "dirty", "time", "peers"} <= row["machine"].keys()
        assert row["machine"]["peers"]["quack-kernels"] == "0.0.1"
        assert "error" not in row
        assert "memory_error" not in row
        assert row.get("seconds", 1) > 0
        assert "seconds" in row or "not_run" in row or "largest_batch" in row or row["finished"]
    assert row["finished"]
    assert row["failures"] == 0


@pytest.mark.parametrize(
    ("name", "peers"),
    [
        ("entropy_loss", {"TRL entropy_from_logits", "axolotl entropy_from_logits", "Liger cross_entropy"}),
        ("entropy_loss", {"TRL fused log-prob + entropy kernel", "QuACK cross_entropy", "fla cross_entropy"}),
        ("linear_entropy", {"verl linear_cross_entropy kernel", "verl FusedLinearForPPO", "cut cross entropy"}),
        ("linear_entropy", {"Liger fused linear scaled CE", "TRL chunked log-prob", "torch linear_cross_entropy"}),
        (
            "token_stats",
            {"verl logprobs (no flash-attn), entropy_from_logits", "axolotl selective_log_softmax, entropy"},
        ),
    ],
)
def test_a_peer_is_measured_or_listed_with_the_reason(folder, name, peers):
    found = {row["contender"]: row for row in rows(folder, name) if "contender" in row}
    assert peers <= found.keys()
    for peer in peers:
        assert "seconds" in found[peer] or "GPU" in found[peer]["not_run"] or "installed" in found[peer]["not_run"]


def test_entropy_loss_measures_and_checks_every_contender(folder):
    found = measured(folder, "entropy_loss")
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
    assert peaked["copy", "copy"]["over_floor"] == 1
    for (name, variant), row in peaked.items():
        assert row["p20"] <= row["seconds"] <= row["p80"]
        # These bounds allow the roundings of float32. Wrong weights, a wrong divisor or a wrong sign would be of order
        # 1.
        assert row["loss_error"] < 1e-5
        assert row["gradient_error"] is None or row["gradient_error"] < (1e-5 if name.startswith("ours") else 1e-2)
        assert (row["gradient_error"] is None) == (name == "copy" or variant == "forward")
        assert row.get("extra_bytes", 0) >= 0
        assert ("extra_bytes" in row) == (variant in ("copy", "forward+backward", "inplace_backward"))
    assert 0 < peaked["copy", "copy"]["mean_entropy"] < 2


def test_linear_entropy_measures_and_checks_every_contender(folder):
    found = {row["contender"]: row for row in measured(folder, "linear_entropy")}
    assert found.keys() >= {"three matmuls", "eager", "torch.compile", "entropy_loss on logits", "ours"}
    assert found.keys() >= {"ours, grad_tolerance 1e-06", "ours, frozen weight"}
    assert found["three matmuls"]["over_floor"] == 1
    for name, row in found.items():
        assert row["p20"] <= row["seconds"] <= row["p80"]
        assert row["extra_bytes"] >= 0
        assert 0 < row["columns_kept"] <= 1
        if name != "three matmuls":
            assert row["loss_error"] < 1e-5
            assert row["hidden_gradient_error"] < 1e-4
            assert ("weight_gradient_error" in row) == (name != "ours, frozen weight")


def test_token_stats_measures_and_checks_every_contender(folder):
    found = measured(folder, "token_stats")
    for takes, floor in (("logits", "copy"), ("hidden", "three matmuls")):
        contenders = {(row["contender"], row["variant"]): row for row in found if row["takes"] == takes}
        assert contenders.pop((floor, ""))["over_floor"] == 1
        assert {("ours", "forward"), ("ours", "forward+backward"), ("eager", "forward")} <= contenders.keys()
        for (_, variant), row in contenders.items():
            assert max(row["logprob_error"], row["entropy_error"]) < 1e-4
            gradients = [row[key] for key in row if key.endswith("gradient_error")]
            assert len(gradients) == (0 if variant == "forward" else 1 if takes == "logits" else 2)
            assert all(error < 1e-4 for error in gradients)


def test_training_step_splits_the_time_and_checks_every_loss(folder):
    found = [row for row in measured(folder, "training_step") if row["variant"] == ""]
    assert {row["contender"] for row in found} == {"eager", "entropy_loss on logits", "ours"}
    for row in found:
        assert list(row["phases"]) == ["generation", "forward", "loss", "backward", "optimiser"]
        assert all(seconds > 0 for seconds in row["phases"].values())
        assert row["seconds"] == pytest.approx(sum(row["phases"].values()), rel=0.5)
        assert row["tokens"] == 12
        assert max(row["loss_error"], row["hidden_gradient_error"], row["weight_gradient_error"]) < 1e-5
        assert row["extra_bytes"] >= 0
    largest = [row for row in measured(folder, "training_step") if row["variant"] == "largest batch"]
    assert [(row["largest_batch"], row["or_more"]) for row in largest] == [(2, True)] * 2


def test_host_overhead_times_calls_and_first_calls(folder):
    found = measured(folder, "host_overhead")
    assert {row["what"] for row in found} == {"host time", "first call"}
    assert {row["contender"] for row in found} >= {"ours", "ours, linear_entropy_loss", "cross_entropy"}


def test_the_tuning_sweep_times_the_choice_of_the_table_beside_others(folder):
    sweeps = {}
    for row in measured(folder, "tune_tiles"):
        sweeps.setdefault((row["kernel"], row["rows"]), []).append(row)
    assert {kernel for kernel, _ in sweeps} == {"fused", "statistics", "gradient", "scale"}
    for found in sweeps.values():
        assert [row["over_ours"] for row in found if row["contender"] == "ours"] == [1]
        assert len({(row["threads"], row["unroll"]) for row in found}) > 1
    # One row has no lag but itself.
    assert {row["lag"] for row in sweeps["fused", 3]} == {1, 3}
    assert {row["lag"] for row in sweeps["fused", 1]} == {1}


@pytest.mark.skipif(not HISTORY, reason="needs the history, which has the package before the lag")
def test_the_fused_kernel_before_the_lag_is_measured_beside_a_copy(folder):
    found = {(row["contender"], row["variant"]): row for row in measured(folder, BEFORE_LAG)}
    assert {variant for _, variant in found} == {"copy", "forward+backward", "inplace_backward", "masked 0.5"}
    assert {name for name, _ in found} == {"copy", "fused kernel before the lag"}
    # The shape is one of those of entropy_loss, where ours are measured.
    shapes = {(row["dtype"], row["rows"], row["vocab"]) for row in measured(folder, "entropy_loss")}
    for (name, _), row in found.items():
        assert (row["dtype"], row["rows"], row["vocab"]) in shapes
        assert row["over_floor"] > 0
        assert row["loss_error"] < 1e-5
        assert name == "copy" or row["gradient_error"] < 1e-5


def test_the_package_of_the_checkout_is_not_measured_as_the_one_before_the_lag(tmp_path):
    command = [sys.executable, SCRIPT.parent, "--suite", BEFORE_LAG, "--size", "tiny", "--device", "cpu"]
    done = subprocess.run(
        [*command, "--out", tmp_path], env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "expected one of an earlier commit" in rows(tmp_path, BEFORE_LAG)[0]["error"]


def test_without_the_package_before_the_lag_its_step_is_a_line_and_succeeds(tmp_path):
    checkout = tmp_path / "checkout"
    (checkout / "benchmarks").mkdir(parents=True)
    shutil.copy(SCRIPT, checkout / "benchmarks")
    # What a git above the copy knows is not its history.
    environment = {**ENVIRONMENT, "EM_STEPS": BEFORE_LAG, "PYTHON": "true", "GIT_CEILING_DIRECTORIES": str(tmp_path)}
    done = subprocess.run(
        [checkout / "benchmarks" / SCRIPT.name, tmp_path / "out"], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "fused_before_lag is not run" in done.stdout
    assert steps(tmp_path / "out") == []


def test_without_a_folder_it_is_one_line_and_status_2():
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)


def test_a_step_that_fails_is_recorded_and_the_next_one_runs(tmp_path):
    done = subprocess.run([SCRIPT, tmp_path], env={**ENVIRONMENT, "PYTHON": "false", "EM_WHEELS": "nowhere"})
    assert done.returncode == 1
    assert steps(tmp_path) == [(name, "1") for name in ("gpu-tests", "contract-tests", *SUITES, "sharded-training")]


def test_a_broken_wheel_takes_no_other_with_it(tmp_path):
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("not a wheel")
    write_wheel(tmp_path)
    environment = {**ENVIRONMENT, "EM_WHEELS": str(tmp_path), "EM_STEPS": "host_overhead"}
    done = subprocess.run([SCRIPT, tmp_path / "out"], env=environment)
    assert done.returncode == 1
    assert steps(tmp_path / "out") == [("wheels", "1"), ("host_overhead", "0")]
    assert rows(tmp_path / "out", "host_overhead")[0]["machine"]["peers"]["quack-kernels"] == "0.0.1"
