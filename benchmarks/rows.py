"""Measurements are kept as rows of JSON, each with the machine and the versions that it was measured on."""

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
    """Append a row to the file as one line of JSON.

    The line is on disk when this returns, because the process may be stopped at any time.
    """
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")
        lines.flush()
        os.fsync(lines.fileno())


def machine(device: torch.device) -> dict[str, Any]:
    """Return what a number was measured on: hardware, versions, commit and time."""
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
    """Return the type of an error and the first line of its text that is not empty."""
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
    """Return the commit, and whether anything but results differs from it.

    Where the history is absent, the environment variable EM_COMMIT gives both, in the form of `git describe --always
    --abbrev=40 --dirty --exclude '*'`.
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
