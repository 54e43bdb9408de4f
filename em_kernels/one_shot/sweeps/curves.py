"""The picture of a sweep: the loss by step, and the accuracy by the grid's first setting, with errors over seeds."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from em_kernels.one_shot.evaluation.statistics import Estimate
from em_kernels.one_shot.runs.files import whole_or_absent
from em_kernels.one_shot.sweeps.grid import label
from em_kernels.one_shot.sweeps.results import Group

_COLOURS = matplotlib.colormaps["viridis"]
_DECODINGS = {"greedy": ("-", "o", "greedy"), "sampled": ("--", "s", "temperature 1")}
# More names than these are not told apart by their colours anyway.
_MOST_NAMES = 12
# What was before training is drawn paler than what came of it.
_PALE = 0.35


def draw_curves(target: Path, groups: Sequence[Group]) -> None:
    """Draws a PNG; a group without a finished run is left out."""
    groups = [group for group in groups if group.finished]
    figure = Figure(figsize=(13, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    loss_axes, accuracy_axes = figure.subplots(1, 2)
    _draw_losses(loss_axes, groups)
    if not any(group.accuracy(decoding) for group in groups for decoding in _DECODINGS):
        accuracy_axes.text(0.5, 0.5, "no accuracy was measured", ha="center", color="grey")
    elif groups[0].settings:
        _draw_accuracy_by_setting(accuracy_axes, groups)
    else:
        _draw_accuracy_by_step(accuracy_axes, groups)
    for axes in (loss_axes, accuracy_axes):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
    with whole_or_absent(target) as temporary:
        figure.savefig(temporary, format="png")


def _draw_losses(axes: Axes, groups: Sequence[Group]) -> None:
    for number, group in enumerate(groups):
        name = _name(group) if number < _MOST_NAMES else ""
        _draw_band(axes, group.curve("loss"), _colour(number, len(groups)), name)
    axes.set_title("Loss: mean over seeds ± standard error", loc="left", fontsize=11)
    axes.set_ylabel("entropy at the training temperature (nats)")
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_ylim(bottom=0)
    if groups and groups[0].settings:
        axes.legend(frameon=False, fontsize=9)


def _draw_accuracy_by_step(axes: Axes, groups: Sequence[Group]) -> None:
    for group in groups:
        for decoding, (line, marker, name) in _DECODINGS.items():
            _draw_band(axes, group.accuracy(decoding), "#41566b", name, line, marker)
    axes.set_xlabel("optimiser step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    _finish_accuracy(axes)


def _draw_accuracy_by_setting(axes: Axes, groups: Sequence[Group]) -> None:
    """A colour for each combination of the other settings; the first setting's values stand evenly, in their order."""
    first = next(iter(groups[0].settings))
    places = {value: place for place, value in enumerate(dict.fromkeys(group.settings[first] for group in groups))}
    families: dict[str, list[Group]] = {}
    for group in groups:
        families.setdefault(_name(group, but=first), []).append(group)
    for number, (others, members) in enumerate(families.items()):
        colour = _colour(number, len(families))
        if others and number < _MOST_NAMES:
            axes.plot([], [], color=colour, label=others)
        for decoding, (line, marker, _) in _DECODINGS.items():
            measured = {places[group.settings[first]]: group.accuracy(decoding) for group in members}
            measured = {place: accuracy for place, accuracy in measured.items() if 0 in accuracy}
            before = {place: accuracy[0] for place, accuracy in measured.items()}
            after = {place: accuracy[max(accuracy)] for place, accuracy in measured.items()}
            for points, alpha in ((before, _PALE), (after, 1.0)):
                _draw_errors(axes, points, line + marker, color=colour, alpha=alpha)
    for line, marker, name in _DECODINGS.values():
        for when, alpha in (("before", _PALE), ("after", 1.0)):
            axes.plot([], [], line + marker, color="black", alpha=alpha, label=f"{name}, {when} training")
    axes.set_xticks(list(places.values()), [label(value) for value in places])
    axes.set_xlabel(first)
    _finish_accuracy(axes)


def _finish_accuracy(axes: Axes) -> None:
    axes.set_title("Accuracy: mean over seeds ± standard error", loc="left", fontsize=11)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False, fontsize=9)


def _draw_band(
    axes: Axes, curve: Mapping[int, Estimate], colour: Any, name: str, line: str = "-", marker: str | None = None
) -> None:
    if not curve:
        return
    steps, means = list(curve), [estimate.mean for estimate in curve.values()]
    low = [estimate.mean - _error(estimate) for estimate in curve.values()]
    high = [estimate.mean + _error(estimate) for estimate in curve.values()]
    axes.fill_between(steps, low, high, color=colour, alpha=0.2, linewidth=0)
    shown = marker or ("o" if len(steps) <= 20 else None)
    axes.plot(steps, means, line, color=colour, marker=shown, markersize=4, label=name or None)


def _draw_errors(axes: Axes, points: Mapping[int, Estimate], form: str, **style: Any) -> None:
    if points:
        means = [estimate.mean for estimate in points.values()]
        axes.errorbar(
            list(points), means, [_error(estimate) for estimate in points.values()], fmt=form, capsize=3, **style
        )


def _error(estimate: Estimate) -> float:
    # One seed has no spread to show.
    return 0.0 if math.isnan(estimate.standard_error) else estimate.standard_error


def _name(group: Group, but: str = "") -> str:
    return ", ".join(f"{name} {label(value)}" for name, value in group.settings.items() if name != but)


def _colour(number: int, total: int) -> Any:
    # The light end of the scale is hard to see on white.
    return _COLOURS(0.85 * number / max(1, total - 1))
