"""The folder of a sweep: what was asked for, a run folder for each combination of the grid, and the results.

sweep.json         the grid, the settings that all runs share, and the versions and device of the sweep's start
runs/NAME/         the run folder of a combination, as `train` leaves it
logs/NAME.log      what the run printed
table.jsonl        a row per run
table.md           means and standard errors over seeds
curves.png         the loss by step, and the accuracy
"""

import dataclasses
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.files import write_text
from em_kernels.one_shot.runs.folder import RunFolder
from em_kernels.one_shot.runs.lock import is_lock
from em_kernels.one_shot.runs.surroundings import surroundings
from em_kernels.one_shot.sweeps.grid import Grid, combinations, run_name

ConfigOf = Callable[[Mapping[str, Any]], TrainConfig]


@dataclass(frozen=True)
class Run:
    """One run of a sweep.

    Attributes:
        number: its place in the sweep, from 1.
        settings: its combination of the grid.
        config: all of its settings.
        folder: its run folder.
        log: the file that keeps what it prints.
    """

    number: int
    settings: Mapping[str, Any]
    config: TrainConfig
    folder: RunFolder
    log: Path

    @property
    def name(self) -> str:
        return self.folder.path.name

    @property
    def finished(self) -> bool:
        return self.folder.is_finished(self.config)


class SweepFolder:
    """The files of one sweep."""

    def __init__(self, path: Path) -> None:
        # The processes of a cluster may have another working directory.
        self.path = path.absolute()
        self.description = self.path / "sweep.json"
        self.runs = self.path / "runs"
        self.logs = self.path / "logs"
        self.rows = self.path / "table.jsonl"
        self.table = self.path / "table.md"
        self.picture = self.path / "curves.png"

    def check(self, config_of: ConfigOf, grid: Grid, *, resume: bool) -> Grid:
        """Checks that a sweep can start in the folder or go on, and returns the grid with the values it had before.

        Args:
            config_of: the settings of a run, from its combination of the grid; and what all runs share, from none.
            grid: the grid.
            resume: whether the folder's sweep is to go on.

        Raises:
            UsageError: a combination is refused; or the folder is not empty, and either `resume` is false, or the
                folder holds no sweep, or its sweep has other settings.
        """
        if self.path.exists() and not all(is_lock(path) for path in self.path.iterdir()):
            if not self.description.exists():
                raise UsageError(f"folder {self.path} is not empty, but holds no sweep (no sweep.json)")
            # A sweep whose runs all failed to begin, for a mistyped model perhaps, is no reason to keep its settings.
            if self.runs.exists() and any(self.runs.iterdir()):
                if not resume:
                    raise UsageError(
                        f"sweep folder {self.path} is not empty; --resume continues the sweep in it, --output names "
                        "another"
                    )
                grid = self._grown(_shared(config_of, grid), grid)
        for settings in combinations(grid):
            config_of(settings)
        return grid

    def begin(self, config_of: ConfigOf, grid: Grid) -> list[Run]:
        """Makes the folder, which `check` has let pass, ready for the sweep, and returns all of its runs."""
        for folder in (self.runs, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        values = {"grid": grid, "settings": _shared(config_of, grid), **surroundings()}
        write_text(self.description, f"{json.dumps(values, indent=2, ensure_ascii=False)}\n")
        return [
            Run(
                number,
                settings,
                config_of(settings),
                RunFolder(self.runs / run_name(settings)),
                self.logs / f"{run_name(settings)}.log",
            )
            for number, settings in enumerate(combinations(grid), 1)
        ]

    def _grown(self, shared: Mapping[str, Any], grid: Grid) -> Grid:
        """The grid of the sweep in the folder, with the values that are new in `grid`."""
        try:
            written = json.loads(self.description.read_text(encoding="utf-8"))
            old, old_shared = dict(written["grid"]), dict(written["settings"])
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


def _shared(config_of: ConfigOf, grid: Grid) -> dict[str, Any]:
    """The settings that the grid does not change, as JSON has them."""
    settings = json.loads(json.dumps(dataclasses.asdict(config_of({}))))
    return {name: value for name, value in settings.items() if name not in grid}
