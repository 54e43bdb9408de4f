"""Measure em_kernels beside its peers on this machine, and append every measurement to FOLDER/SUITE.jsonl.

python benchmarks                                    all suites, small: under ten minutes on two CPU cores
python benchmarks --suite linear_entropy --size full --out FOLDER
"""

import argparse
import importlib
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NoReturn

import torch
from memory import keep_freed_memory
from options import SIZES, SUITES
from suite import run

# These suites are for people who work on the kernels, and run only when they are named.
_BY_NAME = ("tune_tiles", "fused_before_lag")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message}\n")


def main() -> int:
    """Return the exit status: 1 if something of ours failed, 2 for a wrong argument, 130 for Ctrl-C.

    The failure of a peer is kept as a row and does not change the status.
    """
    parser = _Parser(prog=os.environ.get("EM_BENCH_NAME", "benchmarks"), description=(__doc__ or "").partition("\n")[0])
    parser.add_argument(
        "--suite",
        action="append",
        choices=(*SUITES, *_BY_NAME),
        help=f"may be repeated (all but {' and '.join(_BY_NAME)})",
    )
    parser.add_argument(
        "--size",
        choices=SIZES,
        default="small",
        help=f"{'; '.join(f'{size}: {meaning}' for size, meaning in SIZES.items())} (small)",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/bench"), metavar="FOLDER", help="for the rows (runs/bench)"
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), help="what is measured (cuda where there is one)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device is cuda, but torch finds no CUDA device here; expected cpu")
    device = torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        if not os.access(options.out, os.W_OK):
            raise PermissionError("not writable")
    except OSError as error:
        parser.error(f"--out is {options.out}, expected a folder that can be written to ({error})")

    suites = options.suite or list(SUITES)
    try:
        if len(suites) == 1:
            keep_freed_memory()
            return 1 if run(importlib.import_module(suites[0]), options.size, device, options.out) else 0
        start, failed = time.monotonic(), []
        for suite in suites:
            # Each suite has a process of its own, so that it inherits neither memory nor the state of a GPU from
            # another.
            command = [sys.executable, str(Path(__file__).parent), "--suite", suite, "--size", options.size]
            with subprocess.Popen([*command, "--out", str(options.out), "--device", device.type]) as process:
                if process.wait():
                    failed.append(suite)
    except KeyboardInterrupt:
        # With several suites, the process of the running one prints the message, and leaving Popen has waited for it.
        if len(suites) == 1:
            print(f"\n{parser.prog}: interrupted; what was measured is in {options.out}", file=sys.stderr)
        return 130
    minutes, seconds = divmod(round(time.monotonic() - start), 60)
    print(
        f"\n{len(suites)} suites in {minutes} min {seconds} s; every measurement, one to a line: {options.out}/*.jsonl"
    )
    if failed:
        print(f"{parser.prog}: something of ours failed in {', '.join(failed)}: see above", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
