"""A sweep: runs what of a grid is not finished, says how it goes on, and writes the results."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.sweeps.curves import draw_curves
from em_kernels.one_shot.sweeps.folder import Run, SweepFolder
from em_kernels.one_shot.sweeps.grid import Grid
from em_kernels.one_shot.sweeps.launch import Outcome
from em_kernels.one_shot.sweeps.results import group_by_settings, read_result
from em_kernels.one_shot.sweeps.table import write_table


class Launcher(Protocol):
    """Starts the runs, calls `started` with each as it starts, and yields each as it ends."""

    def __call__(self, runs: Sequence[Run], *, started: Callable[[Run], None]) -> Iterator[Outcome]: ...


def sweep(config: TrainConfig, grid: Grid, output: Path, *, resume: bool, launcher: Launcher) -> list[Outcome]:
    """Trains once for each combination of the grid and leaves runs and results in a folder, described in `folder`.

    A run that fails does not stop the others.

    Args:
        config: the settings that the grid does not change.
        grid: the settings that differ between the runs, and their values.
        output: the sweep's folder, which has to be new or empty unless `resume` is true.
        resume: whether to run what is not finished of the sweep in `output`, and what the grid adds to it.
        launcher: what starts the runs.

    Returns:
        how the runs that failed have ended.

    Raises:
        UsageError: a combination is refused by TrainConfig, or the folder by SweepFolder; no run has started then.
    """
    folder = SweepFolder(output)
    runs = folder.open(config, grid, resume=resume)
    left = [run for run in runs if not run.finished]
    print(f"{len(runs)} runs in {folder.path}" + (f", {len(left)} of them not finished" if resume else ""), flush=True)

    def say(run: Run, what: str) -> None:
        print(f"{run.number:>{len(str(len(runs)))}} of {len(runs)}  {run.name}  {what}", flush=True)

    for run in left:
        run.log.unlink(missing_ok=True)
    started = time.monotonic()
    failed: list[Outcome] = []
    for outcome in launcher(left, started=lambda run: say(run, "starts")):
        if outcome.status:
            failed.append(outcome)
        say(outcome.run, _ending(outcome))
    if left:
        print(f"{len(left)} runs in {_minutes(time.monotonic() - started)}")
    _write_results(folder, runs, failed)
    for outcome in failed:
        print(f"failed: {outcome.run.name}: {_last_line(outcome)} (see {outcome.run.log})")
    return failed


def _write_results(folder: SweepFolder, runs: Sequence[Run], failed: Sequence[Outcome]) -> None:
    names = {outcome.run.name for outcome in failed}
    results = [read_result(run, failed=run.name in names) for run in runs]
    groups = group_by_settings(results)
    print(f"\n{write_table(folder, results, groups)}")
    draw_curves(folder.picture, groups)
    print(f"Table:   {folder.table}\nRuns:    {folder.rows}\nPicture: {folder.picture}")


def _ending(outcome: Outcome) -> str:
    took = _minutes(outcome.seconds)
    if outcome.status:
        return f"failed after {took}: {_last_line(outcome)}"
    [*_, last] = read_result(outcome.run, failed=False).metrics
    return f"done in {took}, loss {last['loss']:.4f}"


def _last_line(outcome: Outcome) -> str:
    """The last line that the run printed, which names its error."""
    text = outcome.run.log.read_text(encoding="utf-8", errors="replace") if outcome.run.log.exists() else ""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else f"exit status {outcome.status}"


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes"
