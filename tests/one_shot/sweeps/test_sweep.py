"""Whole sweeps of the tiny model, as a user starts them."""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from processes import printed_by
from train_process import train_processes, wait_for_end

from em_kernels.cli import main
from em_kernels.one_shot.interruption import Interrupted, Interruption
from em_kernels.one_shot.sweeps.launch import end

_TRAIN = shlex.split("--prompt 2+2? --batch-size 2 --max-new-tokens 4 --evaluation-size 0 --learning-rate 1e-3")


def _start(*arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "em_kernels.cli", "sweep", *arguments, *_TRAIN]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def _rows(sweep: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (sweep / "table.jsonl").read_text().splitlines()]


def _steps(run: Path) -> list[int]:
    metrics = run / "metrics.jsonl"
    return [json.loads(line)["step"] for line in metrics.read_text().splitlines()] if metrics.exists() else []


def _wait(until: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not until():
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the following arguments are required: --grid"),
        ("--grid tempo=1", "--grid is 'tempo=1', expected SETTING=VALUES with a setting of model, "),
        ("--grid temperature=0.1,0", "temperature is 0.0, expected a finite number above 0"),
        ("--grid optimizer=adamw,adamw8bit", "dtype is 'float32', expected 'bfloat16' with the optimizer adamw8bit"),
        ("--grid seed=0:2 --seed 4", "seed is in the grid and among the options of train, expected one of the two"),
        ("--grid prompts=a --prompt b", "prompts is in the grid and among the options of train"),
        ("--grid chat_template=plain,/nowhere/t", "/nowhere/t"),
        ("--grid seed=0 --steps many", "argument --steps: invalid int value: 'many'"),
        ("--grid seed=0 --colour red", "unrecognized arguments: --colour red"),
        ("--grid seed=0 --jobs 0", "--jobs is 0, expected at least 1"),
        ("--grid seed=0 --jobs 2 --ray auto", "not allowed with argument --jobs"),
        (
            "--grid seed=0 --ray auto --cpus-per-run 1.5",
            "--cpus-per-run is 1.5, expected a whole number, or a part of 1",
        ),
    ],
)
def test_no_run_starts_after_a_mistake(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status: object
    try:
        status = main(["sweep", "--output", str(tmp_path / "s"), *arguments.split()])
    except SystemExit as stopped:
        status = stopped.code
    said = capsys.readouterr()
    assert (status, said.out) == (2, "")
    [line] = [line for line in said.err.splitlines() if line.startswith("em-kernels sweep: error: ")]
    assert message in line
    assert not (tmp_path / "s").exists()


@pytest.mark.slow
def test_a_failed_run_stops_no_other_and_is_named(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep, late = tmp_path / "s", tmp_path / "late"
    grid = ["sweep", "--grid", f"model={late},{tiny_folder}", "--output", str(sweep), "--steps", "2", *_TRAIN]
    assert main([*grid, "--jobs", "2"]) == 1
    told = capsys.readouterr().out
    bad, good = _rows(sweep)
    assert (bad["state"], good["state"], good["steps"]) == ("failed", "finished", 2)
    lines = told.splitlines()
    assert lines[0] == f"2 runs in {sweep}, 2 of them to do; what they print: {sweep / 'logs'}"
    assert sum(line.endswith("starts") for line in lines) == 2
    [done] = [line for line in lines if "  done in " in line]
    assert done.startswith(f"2 of 2  {good['run']}  done in")
    assert done.endswith(f"loss {good['loss']:.4f}")
    assert lines[-1].startswith(f"failed: {bad['run']}: em-kernels train: error: model '{late}' cannot be loaded")
    assert str(sweep / "logs" / f"{bad['run']}.log") in lines[-1]
    assert (sweep / "table.md").read_text() in told
    # A finished run of a sweep takes no further steps, and its state is three times the model.
    assert not list((sweep / "runs").glob("*/state-*"))

    # What is finished is not run again.
    shutil.copytree(tiny_folder, late)
    assert main([*grid, "--resume"]) == 0
    started = [line for line in capsys.readouterr().out.splitlines() if line.endswith("starts")]
    assert started == [f"1 of 2  {bad['run']}  starts"]
    assert [row["state"] for row in _rows(sweep)] == ["finished", "finished"]


@pytest.mark.slow
def test_an_interrupted_sweep_ends_its_runs_and_says_how_to_go_on(tiny_folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "s" / "runs" / "seed=3"
    arguments = ["--grid", "seed=3", "--output", str(tmp_path / "s"), "--model", str(tiny_folder), "--steps", "100000"]
    sweep = _start(*arguments)
    _wait(lambda: bool(_steps(run)), sweep)
    [train] = train_processes(run)
    sweep.terminate()
    _, said = printed_by(sweep)
    assert sweep.returncode == 128 + signal.SIGTERM, said
    *_, ending, last = filter(None, said.splitlines())
    assert ending == "ending 1 runs, each after its step under way; a second signal ends them at once"
    assert last.startswith("em-kernels sweep: interrupted; go on with: em-kernels sweep --grid seed=3 ")
    assert last.endswith(" --resume")
    wait_for_end(train)
    # The run has kept the state of its last step, and was not killed.
    assert (run / f"state-{_steps(run)[-1]}").is_dir()
    assert "interrupted" in (tmp_path / "s" / "logs" / "seed=3.log").read_text()


def test_runs_are_told_once_more_to_end_if_the_sweep_is() -> None:
    program = """
        import signal
        signal.alarm(100)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        for said in ("ready", "heard"):
            print(said, flush=True)
            signal.sigwait([signal.SIGTERM])
        """
    with subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)], stdout=subprocess.PIPE) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == b"ready\n"
        again = threading.Thread(target=lambda: (run.stdout.readline(), os.kill(os.getpid(), signal.SIGTERM)))
        again.start()
        with Interruption(), pytest.raises(Interrupted):
            end([run])
        again.join()
        assert run.returncode == 0
