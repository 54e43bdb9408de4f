"""These tests run suites with wrong arguments, broken peers, and contenders that fail or break the GPU."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import peers
from peers import Peer

BENCHMARKS = Path(peers.__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{BENCHMARKS.parent}:{BENCHMARKS}"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "{tmp}", "--size", "huge"], "--size"),
        (["--out", "{tmp}", "--suite", "cooking"], "--suite"),
        (["--out", "{tmp}/file"], "--out is"),
        pytest.param(
            ["--out", "{tmp}", "--device", "cuda"],
            "--device is cuda",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device"),
        ),
    ],
    ids=["unknown size", "unknown suite", "output is a file", "no such device"],
)
@pytest.mark.parametrize(
    "command",
    [
        pytest.param([BENCHMARKS], id="folder"),
        pytest.param(["-m", "em_kernels.cli", "bench"], id="em-kernels", marks=pytest.mark.slow),
    ],
)
def test_a_wrong_argument_is_one_line_and_status_2(tmp_path, command, arguments, message):
    (tmp_path / "file").touch()
    command = [sys.executable, *command, *(a.format(tmp=tmp_path) for a in arguments)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert message in done.stderr


def test_em_kernels_bench_without_a_checkout_says_so(monkeypatch, tmp_path, capsys):
    import em_kernels
    from em_kernels import cli

    monkeypatch.setattr(em_kernels, "__file__", str(tmp_path / "em_kernels" / "__init__.py"))
    assert cli.main(["bench"]) == 2
    assert "need a checkout" in capsys.readouterr().err


@pytest.mark.slow
def test_several_suites_run_in_processes_of_their_own(tmp_path):
    suites = ["--suite", "host_overhead", "--suite", "token_stats"]
    command = [sys.executable, "-m", "em_kernels.cli", "bench", *suites, "--size", "tiny", "--device", "cpu"]
    done = subprocess.run([*command, "--out", tmp_path], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert {file.name for file in tmp_path.iterdir()} == {"host_overhead.jsonl", "token_stats.jsonl"}
    assert re.search(r"2 suites in \d+ min \d+ s", done.stdout)


def broken():
    raise ImportError("a library of theirs\nis missing")


@pytest.mark.parametrize(
    ("peer", "why"),
    [
        (Peer("a", "torch", "logits", "entropy", broken), "ImportError: a library of theirs"),
        (Peer("a", "no-such-package", "logits", "entropy", broken), "no-such-package is not installed"),
        (Peer("a", "torch", "logits", "entropy", broken, needs_gpu=True), "needs a GPU"),
    ],
)
def test_a_peer_that_cannot_run_is_listed_with_the_reason(monkeypatch, peer, why):
    fine = Peer("b", "torch", "logits", "entropy", lambda: torch.sum)
    monkeypatch.setattr(peers, "_PEERS", (peer, fine))
    found, missing = peers.peers("logits", ("entropy",), torch.device("cpu"))
    assert found == {fine: torch.sum}
    assert list(missing) == ["a"]
    assert why in missing["a"]


# The contenders of this suite are called "fine", "ours" and "bad". Each test puts its own code in place of BAD, OURS
# and FIRST.
SUITE = '''
"""A suite of a test."""
import dataclasses, sys, torch, suite, timing
from pathlib import Path

@dataclasses.dataclass(frozen=True)
class Configuration:
    device: str
    number: int
    budget: float = 0.01

def configurations(size, device):
    return (Configuration(device, number) for number in range(2))

def missing(device):
    return {"absent": "it is of this test's making"}

def bad(slot):
    BAD

def rows(c):
    FIRST
    calls = {"fine": timing.Call(lambda slot: slot), "bad": timing.Call(bad), "ours | forward": timing.Call(OURS)}
    yield from suite.rows_of("made_up", c, suite.Prepared(calls, 1, lambda name, result: {}, {}, "fine"))

def header(c):
    return f"configuration {c.number}"

def line(row):
    return "measured"

if __name__ == "__main__":
    import made_up
    sys.exit(1 if suite.run(made_up, "tiny", torch.device("cpu"), Path(sys.argv[1])) else 0)
'''


def run_made_up(tmp_path, bad="return 0", ours="lambda slot: slot", first="pass"):
    (tmp_path / "made_up.py").write_text(SUITE.replace("BAD", bad).replace("OURS", ours).replace("FIRST", first))
    done = subprocess.run(
        [sys.executable, tmp_path / "made_up.py", tmp_path], env=ENVIRONMENT, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in (tmp_path / "made_up.jsonl").read_text().splitlines()]
    return done, rows


@pytest.mark.slow
def test_a_failing_peer_is_a_row_and_a_failing_contender_of_ours_the_exit_status(tmp_path):
    done, rows = run_made_up(tmp_path, "raise ValueError('broken')")
    assert done.returncode == 0, done.stderr
    assert rows[0]["not_run"] == "it is of this test's making"
    assert [row["contender"] for row in rows[1:-1]] == ["fine", "bad", "ours"] * 2
    assert [row.get("error") for row in rows[1:4]] == [None, "ValueError: broken", None]
    assert run_made_up(tmp_path, ours="lambda slot: 1 / 0")[0].returncode == 1


@pytest.mark.slow
def test_after_a_contender_that_leaves_the_gpu_unusable_a_new_process_goes_on_without_it(tmp_path):
    # This is the error that `measure` raises in that case. It is raised once: the process that continues knows of it.
    unusable = "raise timing.Unusable('bad', RuntimeError('illegal memory access'))"
    done, rows = run_made_up(tmp_path, first=f"if 'bad' not in suite._continued('made_up')['without']: {unusable}")
    assert done.returncode == 0, done.stderr
    measured = [(row["number"], row["contender"]) for row in rows if "seconds" in row]
    assert measured == [(0, "fine"), (0, "ours"), (1, "fine"), (1, "ours")]
    assert ["unusable" in row["error"] for row in rows if row.get("contender") == "bad"] == [True, True]
    assert len([row for row in rows if "not_run" in row]) == 1
    assert len({row["machine"]["time"] for row in rows}) == 1
    assert rows[-1]["finished"]


@pytest.mark.slow
def test_a_contender_that_makes_the_gpu_unusable_again_costs_its_configuration_and_no_more(tmp_path):
    done, rows = run_made_up(tmp_path, first="raise timing.Unusable('bad', RuntimeError('illegal memory access'))")
    assert done.returncode == 0, done.stderr
    assert [row["number"] for row in rows if "error" in row] == [0, 1]
    assert rows[-1]["finished"]


@pytest.mark.slow
def test_pytest_runs_the_same_cases_and_fails_on_a_slowdown_only_when_asked_to(tmp_path):
    def run(*options):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", BENCHMARKS, "--size", "tiny"]
        command += ["--suite", "token_stats", "--device", "cpu", "-k", "eager or ours"]
        # pytest-benchmark takes no times in a process that is one of several workers.
        environment = {key: value for key, value in ENVIRONMENT.items() if not key.startswith("PYTEST_")}
        return subprocess.run([*command, *options], cwd=tmp_path, env=environment, capture_output=True, text=True)

    first = run("--benchmark-json", tmp_path / "before.json")
    assert first.returncode == 0, first.stdout
    saved = json.loads((tmp_path / "before.json").read_text())
    assert len(saved["benchmarks"]) == 8
    both = [entry for entry in saved["benchmarks"] if "forward+backward" in entry["name"]]
    assert all(error < 1e-4 for entry in both for error in entry["extra_info"].values())
    for entry in saved["benchmarks"]:
        for statistic in ("median", "mean", "min", "max"):
            entry["stats"][statistic] /= 100
    (tmp_path / "before.json").write_text(json.dumps(saved))
    compare = ("--benchmark-compare", tmp_path / "before.json")
    assert run(*compare).returncode == 0
    slower = run(*compare, "--benchmark-compare-fail=median:400%")
    assert slower.returncode != 0
    assert "Performance has regressed" in slower.stdout + slower.stderr
