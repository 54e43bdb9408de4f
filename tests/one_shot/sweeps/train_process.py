"""The process of one run of a sweep."""

import time
from pathlib import Path

import psutil


def train_process(run: Path) -> psutil.Process:
    [process] = [process for process in psutil.process_iter(["cmdline"]) if str(run) in (process.info["cmdline"] or [])]
    return process


def wait_for_end(process: psutil.Process) -> None:
    """Waits ten seconds at most; a process that nobody has asked for its exit status has ended too."""
    deadline = time.monotonic() + 10
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{process} still runs"
        time.sleep(0.01)
