"""The rows of JSON in which measurements are kept, each with what it was measured on."""

import json
import os
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_ROOT = Path(__file__).parents[1]


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """One line of JSON at the end of the file, on disk before this returns to a process that may be stopped."""
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def machine(device: torch.device) -> dict[str, Any]:
    """What a number was measured on: hardware, versions, commit, time."""
    on_gpu = device.type == "cuda"
    commit, dirty = _commit()
    return {
        "name": torch.cuda.get_device_name(device) if on_gpu else _cpu_name(),
        "threads": torch.get_num_threads(),
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if on_gpu else None,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": version("triton"),
        "transformers": version("transformers"),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def error_text(error: BaseException) -> str:
    """The first line that says something, and of which type it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool]:
    """The commit, and whether anything but results differs from it.

    Where the history is absent, EM_COMMIT says both, as `git describe --always --abbrev=40 --dirty --exclude '*'` does.
    """
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        commit = os.environ.get("EM_COMMIT")
        return commit, commit is None or commit.endswith("-dirty")
    return commit, _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results") != ""


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
