"""em-kernels bench: the benchmarks of a checkout."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import em_kernels


def add_parser(commands: Any) -> None:
    commands.add_parser("bench", help="measure em_kernels beside its peers on this machine (needs a checkout)")


def bench(arguments: Sequence[str]) -> int:
    """Runs the benchmarks of the checkout and returns their exit status."""
    folder = Path(em_kernels.__file__).parents[1] / "benchmarks"
    if not (folder / "__main__.py").is_file():
        print(
            f"em-kernels bench: error: {folder} is not there; the benchmarks need a checkout of the repository",
            file=sys.stderr,
        )
        return 2
    environment = {**os.environ, "EM_BENCH_NAME": "em-kernels bench"}
    with subprocess.Popen([sys.executable, str(folder), *arguments], env=environment) as process:
        try:
            return process.wait()
        except KeyboardInterrupt:  # The benchmarks get Ctrl-C too, and end by themselves.
            return process.wait()
