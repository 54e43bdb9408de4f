"""The process of a run of a sweep, as the system lists it."""

import contextlib
import time
from pathlib import Path

import psutil


def train_processes(run: Path) -> list[psutil.Process]:
    return [process for process in psutil.process_iter(["cmdline"]) if str(run) in (process.info["cmdline"] or [])]


def wait_for_end(process: psutil.Process) -> None:
    """Waits a minute at most; a process that nobody has asked for its exit status has ended too."""
    deadline = time.monotonic() + 60
    # It may be gone between the two questions.
    with contextlib.suppress(psutil.NoSuchProcess):
        while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
            assert time.monotonic() < deadline, f"{process} still runs"
            time.sleep(0.01)
