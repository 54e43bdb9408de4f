"""Measuring callables against each other, and the rows in which the measurements are kept.

All contenders are called in turn, forwards and backwards alternately, so that a change of the machine's clock or load
falls on all of them. On a GPU each call is enclosed by two events and enqueued behind a wait on the device, so that the
time between the events is the device's and not that of the host, which launches the kernels. On the CPU, and for the
host's time to enqueue a call on a GPU, the clock is perf_counter.
"""

import argparse
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch

_ROOT = Path(__file__).parents[1]
_WARM_UP = 3
_FEWEST_ROUNDS = 5
# About a millisecond at 2 GHz: longer than the host takes to enqueue the longest contender.
_DEVICE_WAIT_CYCLES = 2_000_000
# A rotation over inputs of this many times the second-level cache leaves nothing of an input in it.
_CACHES_TO_EXCEED = 3


class Timing(NamedTuple):
    """Seconds of a call: the median, the 20th and the 80th percentile of `repeats` calls."""

    seconds: float
    p20: float
    p80: float
    repeats: int


class Call(NamedTuple):
    """`run(slot)` is timed, on the input number `slot`; `restore(slot)` then repairs what it overwrote, untimed."""

    run: Callable[[int], Any]
    restore: Callable[[int], None] | None = None


def measure(
    calls: Mapping[str, Call],
    device: torch.device,
    *,
    slots: int = 1,
    budget: float = 5.0,
    most_rounds: int = 200,
    enqueue: bool = False,
    check: Callable[[str, Any], None] | None = None,
) -> dict[str, Timing | Exception]:
    """Times the calls in alternating order; one that fails is answered by its exception, and the others go on.

    Args:
        calls: what to time, by name.
        device: where they run.
        slots: how many inputs to rotate, see `slots_beyond_cache`.
        budget: seconds for all of it, warm-up excluded; the fewest rounds are made all the same.
        most_rounds: how many calls of each are enough.
        enqueue: time the host alone, which does not wait for the device.
        check: called with the name and the result of each call of the last round.
    """
    clock = _host_clock if enqueue or device.type == "cpu" else _event_clock
    results: dict[str, Timing | Exception] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    held: dict[int, Any] = {}
    turn = 0

    def one(name: str, last: bool = False) -> float:
        nonlocal turn
        slot, turn = turn % slots, turn + 1
        # A result is kept until its input comes up again, so that outputs rotate through memory as inputs do.
        held.pop(slot, None)
        seconds, held[slot] = clock(calls[name].run, slot, device)
        if last and check is not None:
            check(name, held[slot])
        restore = calls[name].restore
        if restore is not None:
            restore(slot)
        return seconds

    def guarded(name: str, last: bool = False) -> float | None:
        if name in results:
            return None
        try:
            return one(name, last)
        except Exception as error:  # A contender may fail in any way: out of memory, a compiler's own error, its check.
            results[name] = error
            held.clear()
            if device.type == "cuda":
                torch.cuda.empty_cache()
            return None

    estimate = 0.0
    for name in calls:
        warm = [guarded(name) for _ in range(_WARM_UP)]
        estimate += warm[-1] or 0.0
    rounds = min(max(int(budget / max(estimate, 1e-9)), _FEWEST_ROUNDS), most_rounds)
    for i in range(rounds):
        for name in calls if i % 2 == 0 else reversed(list(calls)):
            seconds = guarded(name, last=i == rounds - 1)
            if seconds is not None:
                times[name].append(seconds)
    return {name: results[name] if name in results else summary(times[name]) for name in calls}


def summary(times: list[float]) -> Timing:
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80, len(times))


def slots_beyond_cache(input_bytes: int, device: torch.device) -> int:
    """How many inputs of this size must be rotated before the first has left the GPU's second-level cache."""
    if device.type == "cpu":
        return 1
    cache = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-_CACHES_TO_EXCEED * cache // input_bytes))


def _host_clock(run: Callable[[int], Any], slot: int, device: torch.device) -> tuple[float, Any]:
    synchronize(device)
    start = time.perf_counter()
    result = run(slot)
    return time.perf_counter() - start, result


def _event_clock(run: Callable[[int], Any], slot: int, device: torch.device) -> tuple[float, Any]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_DEVICE_WAIT_CYCLES)
    start.record()
    result = run(slot)
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


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
        "triton": _version("triton"),
        "python": platform.python_version(),
        "commit": commit,
        "dirty": dirty,
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _commit() -> tuple[str | None, bool]:
    """The commit, and whether anything but results differs from it. EM_COMMIT names it where the history is absent."""
    commit = _output("git", "rev-parse", "HEAD")
    if commit is None:
        commit = os.environ.get("EM_COMMIT")
        return commit, commit is None
    return commit, _output("git", "status", "--porcelain", "--", ".", ":!benchmarks/results") != ""


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, cwd=_ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def append_row(file: Path, row: Mapping[str, Any]) -> None:
    """One line of JSON at the end of the file, on disk before this returns to a process that may be stopped."""
    with file.open("a") as lines:
        lines.write(json.dumps(row) + "\n")


def error_text(error: Exception) -> str:
    """The first line that says something, and of which type it is."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else ''}"[:300]


class Arguments(argparse.ArgumentParser):
    """The options that every benchmark takes; an error is one line on stderr and exit status 2."""

    def __init__(self, description: str | None, sizes: tuple[str, ...] = ("tiny", "default", "full")) -> None:
        super().__init__(description=(description or "").split("\n")[0])
        self.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the rows are appended")
        self.add_argument("--size", choices=sizes, default="default", help="tiny goes through every line in seconds")
        self.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}\n")

    def read(self) -> tuple[Path, str, torch.device]:
        """The folder, which is made, the size and the device."""
        options = self.parse_args()
        if options.device == "cuda" and not torch.cuda.is_available():
            self.error("--device is cuda, but torch finds no CUDA device here; expected cpu")
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            if not os.access(options.out, os.W_OK):
                raise PermissionError("not writable")
        except OSError as error:
            self.error(f"--out is {options.out}, expected a folder that can be written to ({error})")
        return (
            options.out,
            options.size,
            torch.device(options.device or ("cuda" if torch.cuda.is_available() else "cpu")),
        )


def run_all(
    name: str,
    folder: Path,
    device: torch.device,
    configurations: Iterable[Any],
    run: Callable,
    header: Callable,
    line: Callable,
) -> None:
    """Appends the rows of `run(configuration)` to FOLDER/NAME.jsonl as they come, and prints them; failures too."""
    where = machine(device)
    print(where)
    file = folder / f"{name}.jsonl"
    for c in configurations:
        print(f"\n{header(c)}", flush=True)
        try:
            for row in run(c):
                append_row(file, row | {"machine": where})
                print(line(row), flush=True)
        except Exception as error:  # Out of memory for the inputs themselves: the next shape may fit.
            print(error_text(error), file=sys.stderr)
            append_row(file, {"benchmark": name, **asdict(c), "error": error_text(error), "machine": where})
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
        synchronize(device)
