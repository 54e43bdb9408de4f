"""This module measures callables against each other.

All contenders are called in turn, forwards and backwards alternately, so that a change of the machine's clock or load
falls on all of them. On a GPU each call is enclosed by two events and enqueued behind a wait of a millisecond, so that
the time between the events is the device's. Where the host takes longer to launch a contender's kernels, or has to wait
for the device in between, the time contains the host's part, and `host_seconds` tells so. On the CPU, and for the
host's time to enqueue a call on a GPU, the clock is perf_counter.
"""

import gc
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

# The first calls load, compile, and fill caches, so that they do not count.
_WARM_UP = 3
# Two calls are enough to warm up a contender that has run for this many seconds.
_WARM_SECONDS = 1.0
_FEWEST_ROUNDS = 5
# The wait is about a millisecond at 2 GHz, longer than the host takes to enqueue most contenders.
_DEVICE_WAIT_CYCLES = 2_000_000
# Inputs of this many times the cache in all leave nothing of an input in the cache.
_CACHES_TO_EXCEED = 3
# On a CPU the smallest inputs whose times tell anything have 12 MB. Smaller ones, as the tests have, stay in the cache.
_MOST_SLOTS_ON_CPU = 128
_CPUS = Path("/sys/devices/system/cpu")
_USUAL_CPU_CACHE = 32 << 20


class Timing(NamedTuple):
    """The seconds of a call: the median, the 20th and the 80th percentile of `repeats` calls.

    `host_seconds` is the median time until the call returned to the host.
    """

    seconds: float
    p20: float
    p80: float
    repeats: int
    host_seconds: float


class Unusable(Exception):
    """A contender has left the GPU in an error that only a new process ends."""

    def __init__(self, contender: str, error: Exception) -> None:
        super().__init__(f"{contender}: {error}")
        self.contender = contender


class Call(NamedTuple):
    """A contender's `run(slot)` is timed on the input of that number.

    Then `restore(slot)`, which is not timed, repairs what the call overwrote.
    """

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
    """Return the timings of calls that are made in alternating order.

    A call that fails has its exception in place of a timing, and the others go on.

    Args:
        calls: the calls to time, by name.
        device: the device where they run.
        slots: the number of inputs to rotate, see `slots_beyond_cache`.
        budget: the seconds for all rounds, without warming up; the fewest rounds are made even where they take longer.
        most_rounds: the number of calls of each contender that suffices.
        enqueue: whether to time the host alone, which does not wait for the device.
        check: a function that is given the name and the result of each call of the last round.

    Raises:
        Unusable: the GPU answers every call with an error after a contender's failure.
    """
    clock = _host_clock if enqueue or device.type == "cpu" else _event_clock
    results: dict[str, Timing | Exception] = {}
    times: dict[str, list[float]] = {name: [] for name in calls}
    host_times: dict[str, list[float]] = {name: [] for name in calls}
    held: dict[int, Any] = {}
    turn = 0

    def one(name: str, last: bool = False) -> float:
        nonlocal turn
        slot, turn = turn % slots, turn + 1
        # A result is kept until its input comes up again, so that outputs rotate through memory as inputs do.
        held.pop(slot, None)
        restore = calls[name].restore
        try:
            seconds, host_seconds, held[slot] = clock(calls[name].run, slot, device)
            host_times[name].append(host_seconds)
            if last and check is not None:
                check(name, held[slot])
        # The next contender must find the input whole, also after a failure.
        finally:
            if restore is not None:
                restore(slot)
        return seconds

    def guarded(name: str, last: bool = False) -> float | None:
        if name in results:
            return None
        try:
            return one(name, last)
        # A contender may fail in any way: out of memory, in a compiler, or in its check.
        except Exception as error:
            results[name] = without_frames(error)
            held.clear()
            gc.collect()
            if device.type == "cuda":
                try:
                    synchronize(device)
                except Exception as lasting:
                    raise Unusable(name, lasting) from None
                torch.cuda.empty_cache()
            return None

    estimate = 0.0
    for name in calls:
        _show(f"warming up: {name}")
        first = last = time.perf_counter()
        for i in range(_WARM_UP):
            last = time.perf_counter()
            if guarded(name) is None or (i > 0 and time.perf_counter() - first > _WARM_SECONDS):
                break
        # A round takes the whole duration of its calls, not only the part that is timed.
        if name not in results:
            estimate += time.perf_counter() - last
        host_times[name].clear()
    rounds = min(max(int(budget / max(estimate, 1e-9)), _FEWEST_ROUNDS), most_rounds)
    for i in range(rounds):
        _show(f"round {i + 1} of {rounds}, about {estimate:.2g} s each")
        for name in calls if i % 2 == 0 else reversed(list(calls)):
            seconds = guarded(name, last=i == rounds - 1)
            if seconds is not None:
                times[name].append(seconds)
    _show("")
    return {
        name: results[name] if name in results else summary(times[name], statistics.median(host_times[name]))
        for name in calls
    }


def without_frames(error: Exception) -> Exception:
    """Return the same error without its traceback, which would keep every tensor of the failed call."""
    error.__context__ = error.__cause__ = None
    return error.with_traceback(None)


def _show(text: str) -> None:
    """Print a line that the next one overwrites, for a person who is watching."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def summary(times: list[float], host_seconds: float) -> Timing:
    p20, _, _, p80 = statistics.quantiles(times, n=5, method="inclusive")
    return Timing(statistics.median(times), p20, p80, len(times), host_seconds)


def slots_beyond_cache(input_bytes: int, device: torch.device) -> int:
    """Return how many inputs of this size to rotate, so that each has left the last cache before memory at its turn."""
    if device.type == "cuda":
        cache, most = torch.cuda.get_device_properties(device).L2_cache_size, sys.maxsize
    else:
        cache, most = _cpu_cache(), _MOST_SLOTS_ON_CPU
    return min(max(2, -(-_CACHES_TO_EXCEED * cache // input_bytes)), most)


def copier(rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return a function that copies tensors of this shape as PyTorch does: each number is read and written once.

    On the CPU the copies go into memory that is kept, because getting memory from the system takes as long as the copy.
    That memory rotates as inputs do.
    """
    if device.type == "cuda":
        return lambda logits: logits.detach().clone()
    slots = slots_beyond_cache(rows * vocab * dtype.itemsize, device)
    copies = itertools.cycle([torch.empty(rows, vocab, dtype=dtype, device=device) for _ in range(slots)])
    return lambda logits: next(copies).copy_(logits.detach())


def _cpu_cache() -> int:
    """The bytes of all third-level caches of the CPUs that this process may use; each serves several of them."""
    try:
        caches = [_CPUS / f"cpu{i}" / "cache" / "index3" for i in os.sched_getaffinity(0)]
        sizes = {(cache / "shared_cpu_list").read_text(): (cache / "size").read_text() for cache in caches}
        return sum(int(size.strip().removesuffix("K")) << 10 for size in sizes.values())
    except (AttributeError, OSError, ValueError):  # The system does not say.
        return _USUAL_CPU_CACHE


def _host_clock(run: Callable[[int], Any], slot: int, device: torch.device) -> tuple[float, float, Any]:
    synchronize(device)
    start = time.perf_counter()
    result = run(slot)
    seconds = time.perf_counter() - start
    return seconds, seconds, result


def _event_clock(run: Callable[[int], Any], slot: int, device: torch.device) -> tuple[float, float, Any]:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(_DEVICE_WAIT_CYCLES)
    start.record()
    enqueued = time.perf_counter()
    result = run(slot)
    host_seconds = time.perf_counter() - enqueued
    end.record()
    end.synchronize()
    return start.elapsed_time(end) * 1e-3, host_seconds, result


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
