"""A sweep on a Ray cluster of two workers, one of which is killed."""

import _thread
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from processes import printed_by
from train_process import train_processes, wait_for_end

from em_kernels.cli import main
from em_kernels.one_shot.sweeps.ray_launch import _train

ray = pytest.importorskip("ray")

_STEPS = 3

# Python reads this module when it starts, also on the workers: runs wait in their second step until there is a file.
_HELD = """
import sys

if "train" in sys.orig_argv:
    import time
    from pathlib import Path
    from em_kernels.one_shot.runs.folder import RunFolder

    append_metrics = RunFolder.append_metrics

    def held(run, values):
        append_metrics(run, values)
        deadline = time.monotonic() + 300
        while values["step"] == 2 and not Path({file!r}).exists() and time.monotonic() < deadline:
            time.sleep(0.01)

    RunFolder.append_metrics = held
"""


@pytest.fixture
def go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that the runs wait for."""
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "sitecustomize.py").write_text(_HELD.format(file=str(tmp_path / "go_on")))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "start"), prepend=os.pathsep)
    return tmp_path / "go_on"


@pytest.fixture
def cluster(go_on: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=80_000_000, log_to_driver=False)
    yield ray.get_runtime_context().gcs_address
    ray.shutdown()


def _kill_worker(run: Path, sweep: subprocess.Popen[str]) -> psutil.Process:
    """Kills the worker of a run in the middle of it, and returns the run's own process."""
    metrics = run / "metrics.jsonl"
    # The state of the first step is kept before the line of the second is written.
    while not (metrics.exists() and metrics.read_text().count("\n") > 1):
        assert sweep.poll() is None, sweep.communicate()
        time.sleep(0.01)
    [train] = train_processes(run)
    worker = train.parent()
    assert worker is not None
    assert worker.name().startswith("ray::")
    worker.kill()
    return train


@pytest.mark.slow
def test_the_run_of_a_killed_worker_is_done_again(cluster: str, go_on: Path, tiny_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "s"
    command = f"sweep --grid temperature=0.5,1 --grid seed=0:2 --output {output} --ray {cluster} --model {tiny_folder} "
    command += f"--prompt 2+2? --steps {_STEPS} --batch-size 8 --max-new-tokens 32 --evaluation-size 0 --state-every 1"
    killed = output / "runs" / "temperature=0.5,seed=1"
    with subprocess.Popen(
        [sys.executable, "-m", "em_kernels.cli", *command.split()],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    ) as sweep:
        try:
            train = _kill_worker(killed, sweep)
            wait_for_end(train)
            assert not (killed / "checkpoint").exists()
        finally:
            go_on.touch()
        told, said = printed_by(sweep)
    assert sweep.returncode == 0, said

    rows = [json.loads(line) for line in (output / "table.jsonl").read_text().splitlines()]
    assert [(row["temperature"], row["seed"], row["state"]) for row in rows] == [
        (temperature, seed, "finished") for temperature in (0.5, 1.0) for seed in (0, 1)
    ]
    for row in rows:
        metrics = (output / "runs" / row["run"] / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(line)["step"] for line in metrics] == list(range(1, _STEPS + 1))
        starts = (output / "logs" / f"{row['run']}.log").read_text().count("35,040 parameters")
        assert starts == (2 if row["run"] == killed.name else 1)
        for event in ("starts", "done in"):
            assert told.count(f"{row['run']}  {event}") == 1
    assert "Resuming after step" in (output / "logs" / f"{killed.name}.log").read_text()


@pytest.mark.parametrize("address", ["ray://127.0.0.1:1", "127.0.0.1:1", "nowhere"])
def test_no_cluster_is_one_line(address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["sweep", "--grid", "seed=0", "--output", str(tmp_path / "s"), "--ray", address]
    assert main(arguments) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("em-kernels")]
    assert f"--ray is '{address}', where no Ray cluster can be joined" in line
    assert not (tmp_path / "s").exists()


def _interrupt_once_it_exists(file: Path, stop: threading.Event) -> None:
    while not (file.exists() or stop.is_set()):
        time.sleep(0.01)
    if not stop.is_set():
        # Ray interrupts the main thread of a worker by this very call.
        _thread.interrupt_main()


@pytest.mark.slow
def test_a_cancelled_task_ends_its_process_where_ctrl_c_is_ignored(tiny_folder: Path, tmp_path: Path) -> None:
    command = f"train --model {tiny_folder} --prompt 2+2? --steps 100000 --batch-size 2 --max-new-tokens 4"
    command += f" --evaluation-size 0 --output {tmp_path / 'run'}"
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    stop = threading.Event()
    cancel = threading.Thread(target=_interrupt_once_it_exists, args=(tmp_path / "run" / "metrics.jsonl", stop))
    cancel.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            _train(command.split(), tmp_path / "log", str(tmp_path))
    finally:
        stop.set()
        cancel.join()
        signal.signal(signal.SIGINT, handler)
    assert not train_processes(tmp_path / "run")
    assert "--resume" in (tmp_path / "log").read_text().splitlines()[-1]
