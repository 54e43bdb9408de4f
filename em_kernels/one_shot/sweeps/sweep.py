"""A sweep: runs what of a grid is not finished, says how it goes on, and writes the results."""

import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from em_kernels.one_shot.runs.figures import save_figure
from em_kernels.one_shot.runs.lock import locked
from em_kernels.one_shot.sweeps.curves import draw_curves
from em_kernels.one_shot.sweeps.folder import ConfigOf, Run, SweepFolder
from em_kernels.one_shot.sweeps.grid import Grid
from em_kernels.one_shot.sweeps.launch import Outcome
from em_kernels.one_shot.sweeps.results import group_by_settings, read_result
from em_kernels.one_shot.sweeps.table import write_table


class Launcher(Protocol):
    """Starts the runs, calls `started` with each as it starts, and yields each as it ends."""

    def __call__(self, runs: Sequence[Run], *, started: Callable[[Run], None]) -> Iterator[Outcome]: ...


def sweep(config_of: ConfigOf, grid: Grid, output: Path, *, resume: bool, launcher: Launcher) -> list[Outcome]:
    """Trains once for each combination of the grid and leaves runs and results in a folder, described in `folder`.

    A run that fails does not stop the others.

    Args:
        config_of: the settings of a run, from its combination of the grid; and what all runs share, from none.
        grid: the settings that differ between the runs, and their values.
        output: the sweep's folder, which has to be new or empty unless `resume` is true.
        resume: whether to run what is not finished of the sweep in `output`, and what the grid adds to it.
        launcher: what starts the runs.

    Returns:
        how the runs that failed have ended.

    Raises:
        UsageError: no run has started, because a combination is refused, or the folder is, as `SweepFolder` says, or
            another process has it.
    """
    folder = SweepFolder(output)
    grid = folder.check(config_of, grid, resume=resume)
    folder.path.mkdir(parents=True, exist_ok=True)
    with locked(folder.path):
        runs = folder.begin(config_of, grid)
        failed = _run_unfinished(folder, runs, launcher)
        _write_results(folder, runs, failed)
    for outcome in failed:
        print(f"failed: {outcome.run.name}: {_last_line(outcome)} (see {outcome.run.log})")
    return failed


def _run_unfinished(folder: SweepFolder, runs: Sequence[Run], launcher: Launcher) -> list[Outcome]:
    left = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs in {folder.path}, {len(left)} of them to do; what they print: {folder.logs}", flush=True)
    for run in runs:
        if run.finished:  # It may have ended after the sweep was killed.
            _drop_states(run)
    for run in left:
        run.log.unlink(missing_ok=True)

    def say(run: Run, what: str) -> None:
        print(f"{run.number:>{len(str(len(runs)))}} of {len(runs)}  {run.name}  {what}", flush=True)

    began = time.monotonic()
    failed: list[Outcome] = []
    for outcome in launcher(left, started=lambda run: say(run, "starts")):
        say(outcome.run, _ending(outcome))
        if outcome.status:
            failed.append(outcome)
        else:
            _drop_states(outcome.run)
    print(f"{len(left)} runs in {_minutes(time.monotonic() - began)}")
    return failed


def _drop_states(run: Run) -> None:
    """Removes what the finished run could take further steps from: three models' worth of disk for each run."""
    for state in run.folder.path.glob("state-*"):
        shutil.rmtree(state)


def _write_results(folder: SweepFolder, runs: Sequence[Run], failed: Sequence[Outcome]) -> None:
    names = {outcome.run.name for outcome in failed}
    results = [read_result(run, failed=run.name in names) for run in runs]
    groups = group_by_settings(results)
    print(f"\n{write_table(folder, results, groups)}")
    save_figure(draw_curves(groups), folder.picture)
    print(f"Table:   {folder.table}\nRuns:    {folder.rows}\nPicture: {folder.picture}")


def _ending(outcome: Outcome) -> str:
    took = _minutes(outcome.seconds)
    if outcome.status:
        return f"failed after {took}: {_last_line(outcome)}"
    last = outcome.run.folder.read_metrics()[-1]
    return f"done in {took}, loss {last['loss']:.4f}"


def _last_line(outcome: Outcome) -> str:
    """The last line that the run printed, which names its error; or the signal that ended it."""
    if outcome.status < 0:
        return f"ended by {signal.Signals(-outcome.status).name}"
    text = outcome.run.log.read_text(encoding="utf-8", errors="replace") if outcome.run.log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {outcome.status}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"
