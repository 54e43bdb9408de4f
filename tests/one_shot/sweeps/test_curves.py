from pathlib import Path
from typing import Any

import numpy
import pytest
from matplotlib import image
from written_runs import write_run, write_sweep

from em_kernels.one_shot.sweeps.curves import draw_curves
from em_kernels.one_shot.sweeps.results import group_by_settings, read_result


def _draw(folder: Path, grid: dict[str, tuple[Any, ...]], *, spread: float = 0.0, measured: bool = True) -> Any:
    """The picture, as pixels, of runs whose losses differ by `spread` from one seed to the next."""
    runs = write_sweep(folder, grid)
    for run in runs:
        loss = 1 + spread * run.settings.get("seed", 0)
        accuracy = {0: 0.25, 2: 0.5} if measured else {}
        write_run(run, [loss, loss / 2], accuracy, accuracy)
    draw_curves(folder / "curves.png", group_by_settings([read_result(run, failed=False) for run in runs]))
    assert sorted(path.name for path in folder.iterdir()) == ["curves.png", "logs", "runs", "sweep.json"]
    return image.imread(folder / "curves.png")[..., :3]


def _coloured(pixels: Any) -> int:
    return int(numpy.sum(numpy.ptp(pixels, axis=-1) > 0.03))


@pytest.mark.parametrize(
    "grid",
    [{"seed": (0, 1)}, {"temperature": (0.1, 0.3)}, {"model": ("a/b", "c"), "temperature": (0.1, 0.3), "seed": (0, 1)}],
    ids=["seeds alone", "no seeds", "two settings"],
)
def test_losses_left_and_accuracies_right(tmp_path: Path, grid: dict[str, tuple[Any, ...]]) -> None:
    pixels = _draw(tmp_path, grid)
    width = pixels.shape[1]
    assert _coloured(pixels[:, : width // 2]) > 1000
    assert _coloured(pixels[:, width // 2 :]) > 1000


def test_band_shows_the_spread_over_seeds(tmp_path: Path) -> None:
    grid = {"seed": (0, 1, 2)}
    narrow = _draw(tmp_path / "narrow", grid, measured=False)
    wide = _draw(tmp_path / "wide", grid, spread=0.5, measured=False)
    assert _coloured(wide) > 3 * _coloured(narrow)


def test_no_finished_run_is_no_error(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, {"temperature": (0.1, 0.3)})
    draw_curves(tmp_path / "curves.png", group_by_settings([read_result(run, failed=True) for run in runs]))
    assert _coloured(image.imread(tmp_path / "curves.png")[..., :3]) == 0
