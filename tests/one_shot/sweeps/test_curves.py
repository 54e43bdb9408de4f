import math
from pathlib import Path
from typing import Any

import pytest
from drawn import bands, error_bars, lines
from matplotlib import image
from matplotlib.figure import Figure
from written_runs import write_run, write_sweep

from em_kernels.one_shot.runs.figures import save_figure
from em_kernels.one_shot.sweeps.curves import draw_curves
from em_kernels.one_shot.sweeps.results import group_by_settings, read_result


def _drawn(folder: Path, grid: dict[str, tuple[Any, ...]], *, measured: bool = True) -> Figure:
    """The picture of runs whose values tell temperature t and seed s: losses of t + s and half, accuracies from t."""
    runs = write_sweep(folder, grid)
    for run in runs:
        temperature, seed = run.settings.get("temperature", 0.5), run.settings.get("seed", 0)
        greedy = {0: temperature, 2: temperature + 0.25 * seed} if measured else {}
        sampled = {step: accuracy / 2 for step, accuracy in greedy.items()}
        write_run(run, [temperature + seed, (temperature + seed) / 2], greedy, sampled)
    return draw_curves(group_by_settings([read_result(run, failed=False) for run in runs]))


def _legend(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.get_legend().get_texts()]


def test_losses_are_means_with_a_band_of_the_standard_error_over_seeds(tmp_path: Path) -> None:
    losses, _ = _drawn(tmp_path, {"temperature": (0.1, 0.3), "seed": (0, 1)}).axes
    assert lines(losses) == {
        "temperature 0.1": [(1, pytest.approx(0.6)), (2, pytest.approx(0.3))],
        "temperature 0.3": [(1, pytest.approx(0.8)), (2, pytest.approx(0.4))],
    }
    assert _legend(losses) == ["temperature 0.1", "temperature 0.3"]
    # Two seeds that are 1 apart have a standard error of a half.
    assert bands(losses) == [
        [(1, pytest.approx(0.1), pytest.approx(1.1)), (2, pytest.approx(0.05), pytest.approx(0.55))],
        [(1, pytest.approx(0.3), pytest.approx(1.3)), (2, pytest.approx(0.15), pytest.approx(0.65))],
    ]


def test_accuracies_stand_by_the_first_setting_before_and_after(tmp_path: Path) -> None:
    _, accuracy = _drawn(tmp_path, {"temperature": (0.1, 0.3), "seed": (0, 1)}).axes
    half = 0.125  # The standard error of two seeds that are a quarter apart.
    assert [bars for _, bars in error_bars(accuracy)] == [
        [(0, pytest.approx(0.1), 0), (1, pytest.approx(0.3), 0)],
        [(0, pytest.approx(0.225), pytest.approx(half)), (1, pytest.approx(0.425), pytest.approx(half))],
        [(0, pytest.approx(0.05), 0), (1, pytest.approx(0.15), 0)],
        [(0, pytest.approx(0.1125), pytest.approx(half / 2)), (1, pytest.approx(0.2125), pytest.approx(half / 2))],
    ]
    assert [text.get_text() for text in accuracy.get_xticklabels()] == ["0.1", "0.3"]
    assert accuracy.get_xlabel() == "temperature"
    assert _legend(accuracy) == [
        "greedy, before training",
        "greedy, after training",
        "temperature 1, before training",
        "temperature 1, after training",
    ]


def test_a_second_setting_is_a_family_of_its_own_colour(tmp_path: Path) -> None:
    _, accuracy = _drawn(tmp_path, {"temperature": (0.1, 0.3), "model": ("m", "n")}).axes
    assert _legend(accuracy)[:2] == ["model m", "model n"]
    assert len(error_bars(accuracy)) == 2 * 4
    colours = {series.lines[0].get_color() for series in accuracy.containers}
    assert len(colours) == 2


def test_seeds_alone_have_their_accuracy_by_step(tmp_path: Path) -> None:
    losses, accuracy = _drawn(tmp_path, {"seed": (0, 1)}).axes
    assert [[(float(x), float(y)) for x, y in line.get_xydata()] for line in losses.lines] == [[(1, 1), (2, 0.5)]]
    assert lines(accuracy) == {"greedy": [(0, 0.5), (2, 0.625)], "temperature 1": [(0, 0.25), (2, 0.3125)]}
    assert bands(accuracy)[0] == [(0, 0.5, 0.5), (2, pytest.approx(0.5), pytest.approx(0.75))]


def test_what_was_not_measured_is_said_and_one_seed_has_no_band(tmp_path: Path) -> None:
    losses, accuracy = _drawn(tmp_path, {"seed": (0,)}, measured=False).axes
    assert [text.get_text() for text in accuracy.texts] == ["not measured"]
    assert not accuracy.lines
    assert all(math.isnan(y) for band in bands(losses) for _, *edges in band for y in edges)


def test_no_finished_run_is_no_error(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, {"temperature": (0.1, 0.3)})
    figure = draw_curves(group_by_settings([read_result(run, failed=True) for run in runs]))
    assert not any(axes.lines or axes.containers for axes in figure.axes)


def test_a_picture_is_a_file_that_opens(tmp_path: Path) -> None:
    save_figure(_drawn(tmp_path / "s", {"seed": (0, 1)}), tmp_path / "curves.png")
    assert [path.name for path in tmp_path.iterdir() if path.name != "s"] == ["curves.png"]
    height, width, _ = image.imread(tmp_path / "curves.png").shape
    assert width > height > 500
