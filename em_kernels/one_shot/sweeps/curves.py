"""The picture of a sweep: the loss by step, and the accuracy by the grid's first setting, with errors over seeds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from em_kernels.one_shot.analysis.drawing import begin_at_zero, draw_absence, draw_band, new_axes
from em_kernels.one_shot.evaluation.statistics import Estimate
from em_kernels.one_shot.runs.figures import label_steps
from em_kernels.one_shot.sweeps.grid import label
from em_kernels.one_shot.sweeps.results import Group

_COLOURS = matplotlib.colormaps["viridis"]
_DECODINGS = {"greedy": ("-", "o", "greedy"), "sampled": ("--", "s", "temperature 1")}
# More names than these are not told apart by their colours anyway.
_MOST_NAMES = 12
# What was before training is drawn paler than what came of it.
_PALE = 0.35


def draw_curves(groups: Sequence[Group]) -> Figure:
    """Draws the loss and the accuracy; a group without a finished run is left out."""
    groups = [group for group in groups if group.finished]
    figure, (loss_axes, accuracy_axes) = new_axes(1, 2, width=6.5, height=5)
    loss_axes.set_title("Loss: mean over seeds ± standard error", loc="left", fontsize=11)
    accuracy_axes.set_title("Accuracy: mean over seeds ± standard error", loc="left", fontsize=11)
    accuracy_axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    _draw_losses(loss_axes, groups)
    if not any(group.accuracy(decoding) for group in groups for decoding in _DECODINGS):
        draw_absence(accuracy_axes)
    elif groups[0].settings:
        _draw_accuracy_by_setting(accuracy_axes, groups)
    else:
        _draw_accuracy_by_step(accuracy_axes, groups[0])
    for axes in (loss_axes, accuracy_axes):
        begin_at_zero(axes)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(frameon=False, fontsize=9)
    return figure


def _draw_losses(axes: Axes, groups: Sequence[Group]) -> None:
    for number, group in enumerate(groups):
        name = _name(group) if number < _MOST_NAMES else None
        _draw_curve(axes, group.curve("loss"), color=_colour(number, len(groups)), label=name or None)
    axes.set_ylabel("entropy at the training temperature (nats)")
    label_steps(axes)


def _draw_accuracy_by_step(axes: Axes, group: Group) -> None:
    for decoding, (line, _, name) in _DECODINGS.items():
        _draw_curve(axes, group.accuracy(decoding), color=_colour(0, 1), linestyle=line, label=name)
    label_steps(axes)


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
            before, after = {}, {}
            for group in members:
                accuracy, last = group.accuracy(decoding), group.last_accuracy(decoding)
                if 0 in accuracy and last is not None:
                    place = places[group.settings[first]]
                    before[place], after[place] = accuracy[0], last
            for points, alpha in ((before, _PALE), (after, 1.0)):
                _draw_errors(axes, points, line + marker, color=colour, alpha=alpha)
    for line, marker, name in _DECODINGS.values():
        for when, alpha in (("before", _PALE), ("after", 1.0)):
            axes.plot([], [], line + marker, color="black", alpha=alpha, label=f"{name}, {when} training")
    axes.set_xticks(list(places.values()), [label(value) for value in places])
    axes.set_xlabel(first)


def _draw_curve(axes: Axes, curve: Mapping[int, Estimate], **style: Any) -> None:
    spread = [estimate.standard_error for estimate in curve.values()]
    draw_band(axes, list(curve), [estimate.mean for estimate in curve.values()], spread, **style)


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
