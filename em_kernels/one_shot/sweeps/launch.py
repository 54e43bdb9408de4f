"""The runs of a sweep as processes of this machine, a number of them at a time."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from em_kernels.one_shot.sweeps.folder import Run
from em_kernels.one_shot.sweeps.grid import train_options

# How often running processes are looked at, in seconds.
_PAUSE = 0.1
ENDING = "ending {} runs, each after its step under way; a second signal ends them at once"
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None
_KILL_WHEN_PARENT_DIES = 1  # PR_SET_PDEATHSIG of linux/prctl.h


@dataclass(frozen=True)
class Outcome:
    """How a run ended: its exit status, and the seconds it took."""

    run: Run
    status: int
    seconds: float


def launch(
    runs: Sequence[Run], *, options: Sequence[str], jobs: int, started: Callable[[Run], None]
) -> Iterator[Outcome]:
    """Runs `em-kernels train` for each of the runs, and yields each as it ends.

    If the caller leaves the loop or is interrupted, the processes are told to end: each finishes its step under way
    and keeps it, unless the caller is interrupted again.

    Args:
        runs: the runs; one that was started before goes on.
        options: the options of `train` that all runs share.
        jobs: how many run at a time; they share out the machine's threads unless OMP_NUM_THREADS is set.
        started: called with each run when it starts.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    environment = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **os.environ}
    waiting = list(reversed(runs))
    running: dict[subprocess.Popen[bytes], tuple[Run, float]] = {}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                run = waiting.pop()
                started(run)
                running[start_train(train_arguments(run, options), run.log, environment)] = run, time.monotonic()
            time.sleep(_PAUSE)
            for process in [process for process in running if process.poll() is not None]:
                run, since = running.pop(process)
                yield Outcome(run, process.returncode, time.monotonic() - since)
    except KeyboardInterrupt:
        print(ENDING.format(len(running)), file=sys.stderr)
        raise
    finally:
        end(list(running))


def train_arguments(run: Run, options: Sequence[str]) -> list[str]:
    return ["train", *options, *train_options(run.settings), "--output", str(run.folder.path), "--resume"]


def start_train(
    arguments: Sequence[str], log: Path, environment: Mapping[str, str], directory: str | None = None
) -> subprocess.Popen[bytes]:
    """Starts the command line in a process of its own, which adds what it prints to the log."""
    with log.open("ab") as file:
        return subprocess.Popen(
            [sys.executable, "-m", "em_kernels.cli", *arguments],
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            # Lines of standard output and standard error keep their order.
            env={**environment, "PYTHONUNBUFFERED": "1"},
            # Ctrl-C reaches the sweep alone, which passes it on once.
            start_new_session=True,
            preexec_fn=_die_with_parent,
        )


def end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Tells the processes to end after their step under way, or at once if interrupted, and waits until they have."""
    try:
        _signal(processes)
    except KeyboardInterrupt:
        _signal(processes)
        raise


def _signal(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    for process in processes:
        process.send_signal(signal.SIGTERM)
    # Waiting for a process would go on if another thread of this one got the signal.
    while any(process.poll() is None for process in processes):
        time.sleep(_PAUSE)


def _die_with_parent() -> None:
    # A sweep that is killed leaves no run behind that a resumed sweep would meet.
    if _LIBC is not None:
        _LIBC.prctl(_KILL_WHEN_PARENT_DIES, signal.SIGKILL)
