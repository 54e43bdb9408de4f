"""The folder of a sweep: what was asked for, a run folder for each combination of the grid, and the results.

sweep.json         the grid, the settings that all runs share, and versions
runs/NAME/         the run folder of a combination, as `train` leaves it
logs/NAME.log      what the run printed
table.jsonl        a row per run
table.md           means and standard errors over seeds
curves.png         the loss by step, and the accuracy
"""

import dataclasses
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.runs.files import write_text
from em_kernels.one_shot.sweeps.grid import Grid, combinations, run_name


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        number: its place in the sweep, from 1.
        settings: its combination of the grid.
        folder: its run folder.
        log: the file that keeps what it prints.
    """

    number: int
    settings: Mapping[str, Any]
    folder: Path
    log: Path

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def finished(self) -> bool:
        # The checkpoint is the last that `train` writes.
        return (self.folder / "checkpoint").exists()


class SweepFolder:
    """The files of one sweep."""

    def __init__(self, path: Path) -> None:
        # The processes of a cluster may have another working directory.
        self.path = path.absolute()
        self.description = self.path / "sweep.json"
        self.rows = self.path / "table.jsonl"
        self.table = self.path / "table.md"
        self.picture = self.path / "curves.png"

    def open(self, config: TrainConfig, grid: Grid, *, resume: bool) -> list[Run]:
        """Makes the folder ready for the sweep to start or go on, and returns all of its runs.

        On resumption the grid may bring new values, which are added to those of before.

        Raises:
            UsageError: `train` refuses a combination; or the folder is not empty, and either `resume` is false, or the
                folder holds no sweep, or its sweep has other settings.
        """
        shared = json.loads(json.dumps(dataclasses.asdict(config)))
        shared = {name: value for name, value in shared.items() if name not in grid}
        if self.path.exists() and any(self.path.iterdir()):
            if not resume:
                raise UsageError(f"sweep folder {self.path} is not empty; --resume continues the sweep in it")
            grid = self._grown(shared, grid)
        settings = list(combinations(grid))
        for combination in settings:
            dataclasses.replace(config, **combination)
        for folder in ("runs", "logs"):
            (self.path / folder).mkdir(parents=True, exist_ok=True)
        versions = {"em_kernels": version("em-kernels"), "python": sys.version.split()[0]}
        text = json.dumps({"grid": grid, "settings": shared, "versions": versions}, indent=2, ensure_ascii=False)
        write_text(self.description, f"{text}\n")
        return [self._run(number, combination) for number, combination in enumerate(settings, 1)]

    def _run(self, number: int, settings: Mapping[str, Any]) -> Run:
        name = run_name(settings)
        return Run(number, settings, self.path / "runs" / name, self.path / "logs" / f"{name}.log")

    def _grown(self, shared: Mapping[str, Any], grid: Grid) -> Grid:
        """The grid of the sweep in the folder, with the values that are new in `grid`."""
        try:
            written = json.loads(self.description.read_text(encoding="utf-8"))
            old, old_shared = dict(written["grid"]), dict(written["settings"])
        except FileNotFoundError:
            raise UsageError(
                f"sweep folder {self.path} is not empty, but holds no sweep to resume (no sweep.json)"
            ) from None
        except (KeyError, TypeError, ValueError):
            raise UsageError(f"{self.description} is not of a sweep of this version") from None
        if old.keys() != grid.keys():
            raise UsageError(
                f"the sweep in {self.path} has a grid of {', '.join(old)}, not {', '.join(grid)}; values may be added, "
                "settings may not"
            )
        differences = [
            f"{name}: {old_shared.get(name)!r}, not {shared.get(name)!r}"
            for name in {**old_shared, **shared}
            if old_shared.get(name) != shared.get(name)
        ]
        if differences:
            raise UsageError(f"the sweep in {self.path} has other settings: {'; '.join(differences)}")
        kept = {name: [tuple(v) if isinstance(v, list) else v for v in values] for name, values in old.items()}
        return {name: list(dict.fromkeys([*values, *grid[name]])) for name, values in kept.items()}
