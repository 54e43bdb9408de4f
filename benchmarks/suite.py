"""This module times contenders on the same inputs, makes rows of the times, and runs a suite.

A suite is a module with these functions. `configurations(size, device)` yields the shapes to measure, as dataclasses,
those first that say most. `names(c)` and `prepare(c)` give the contenders of a shape; suites without peers lack both.
`rows(c)` measures the contenders. `missing(device)` gives the peers that do not run here, with the reasons.
`header(c)` and `line(row)` make the text to print.
"""

import gc
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn

import torch
from accuracy import SEED
from peers import versions
from rows import append_row, error_text, machine
from timing import Call, Timing, Unusable, measure, synchronize

# These fields of a configuration say how it is measured. Rows leave them out.
_HOW = ("budget", "compiled", "memory", "time")
# This environment variable tells a process that continues a run, after a contender has left the GPU unusable, what is
# done and which contenders to leave out.
_CONTINUED = "EM_BENCH_CONTINUED"


class Prepared(NamedTuple):
    """The contenders of a configuration on the same inputs.

    Attributes:
        calls: the calls, by "contender | variant".
        slots: the number of inputs that the contenders are given in turn.
        check: returns the errors of a contender's result, given the contender's name and the result.
        notes: what a contender's row says beside its time and errors, by the same names.
        floor: the name of the contender whose time divides the times of the others.
    """

    calls: dict[str, Call]
    slots: int
    check: Callable[[str, Any], dict[str, float | None]]
    notes: dict[str, dict[str, Any]]
    floor: str


def rows_of(benchmark: str, c: Any, prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Measure the contenders of a configuration and yield a row for each."""
    errors: dict[str, dict[str, float | None]] = {}
    timings = timed(
        benchmark,
        prepared.calls,
        torch.device(c.device),
        slots=prepared.slots,
        budget=c.budget,
        check=lambda name, result: errors.__setitem__(name, prepared.check(name, result)),
    )
    floor = timings[prepared.floor]
    for name, timing in timings.items():
        contender, _, variant = name.partition(" | ")
        row = {
            "benchmark": benchmark,
            **{key: value for key, value in asdict(c).items() if key not in _HOW},
            "contender": contender,
            "variant": variant,
            **prepared.notes.get(name, {}),
        }
        if not isinstance(timing, Timing):
            yield row | {"error": error_text(timing)}
            continue
        over = {"over_floor": timing.seconds / floor.seconds} if isinstance(floor, Timing) else {}
        yield row | timing._asdict() | errors[name] | over


def timed(benchmark: str, calls: dict[str, Call], device: torch.device, **how: Any) -> dict[str, Timing | Exception]:
    """Return the timings of `measure`, without calling contenders that made the GPU unusable earlier in this run."""
    without = _continued(benchmark)["without"]
    found = measure({name: call for name, call in calls.items() if name not in without}, device, **how)
    return {name: found.get(name, RuntimeError("left out: it made the GPU unusable before")) for name in calls}


def run(suite: ModuleType, size: str, device: torch.device, folder: Path) -> int:
    """Append a suite's rows to FOLDER/SUITE.jsonl as they come, print them, and return how many of ours failed.

    A contender fails by an exception, or by leaving the GPU in an error that only a new process ends. Its failure is
    recorded, and the others go on. The last row of a complete run says "finished".
    """
    name = suite.__name__
    continued = _continued(name)
    # All rows of a run have the same time, by which they are found.
    where = continued["machine"] or machine(device) | {"peers": versions()}
    file = folder / f"{name}.jsonl"
    common = {"benchmark": name, "device": device.type}

    def keep(row: dict[str, Any]) -> None:
        append_row(file, row | {"size": size, "seed": SEED, "machine": where})

    def go_on(done: int, without: list[str]) -> NoReturn:
        """Continue in a new process, with the configuration after `done` others."""
        state = {"done": done, "without": without, "failures": failures, "machine": where, "suite": name}
        os.environ[_CONTINUED] = json.dumps(state)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])

    print(f"\n== {name}: {' '.join((suite.__doc__ or '').split(chr(10))[0].split())}", flush=True)
    failures = continued["failures"]
    if not continued["done"] and not continued["without"]:
        for contender, why in suite.missing(device).items():
            print(f"{contender:>38} not run: {why}", flush=True)
            keep(common | {"contender": contender, "not_run": why})
    for i, c in enumerate(suite.configurations(size, device.type)):
        if i < continued["done"]:
            continue
        print(f"\n{suite.header(c)}", flush=True)
        try:
            for row in suite.rows(c):
                keep(row)
                failures += row["contender"].startswith("ours") and ("error" in row or "memory_error" in row)
                print(row_line(row, suite.line), flush=True)
        # The inputs of this shape may not fit in memory, and those of the next shape may.
        except Exception as error:
            print(error_text(error), file=sys.stderr, flush=True)
            failures += not isinstance(error, Unusable) or error.contender.startswith("ours")
            if isinstance(error, Unusable) and error.contender not in continued["without"]:
                go_on(i, [*continued["without"], error.contender])
            keep(common | asdict(c) | {"error": error_text(error)})
        gc.collect()
        try:
            synchronize(device)
            if device.type == "cuda":
                torch.cuda.empty_cache()
        except Exception as error:
            print(error_text(error), file=sys.stderr, flush=True)
            go_on(i + 1, continued["without"])
    keep(common | {"finished": True, "failures": failures})
    return failures


def _continued(name: str) -> dict[str, Any]:
    """Return what an earlier process has done of the suite of this name."""
    found = json.loads(os.environ.get(_CONTINUED, "{}"))
    if found.get("suite") == name:
        return found
    return {"done": 0, "without": [], "failures": 0, "machine": None}


def row_line(row: dict[str, Any], line: Callable[[dict[str, Any]], str]) -> str:
    start = f"{row['contender']:>38} {row.get('variant') or '':<17}"
    if "error" in row:
        return f"{start} {row['error']}"
    return f"{start} {line(row)}" + (f"\n{'':57}memory: {row['memory_error']}" if "memory_error" in row else "")
