"""The pictures of the report: a colour a group, lines of means and bands of one standard deviation over seeds."""

from collections.abc import Sequence

from matplotlib.figure import Figure

from em_kernels.one_shot.analysis.accuracies import DECODINGS
from em_kernels.one_shot.analysis.drawing import begin_at_zero, colour, draw_absence, draw_band, draw_legend, new_axes
from em_kernels.one_shot.analysis.group_accuracies import accuracy_band
from em_kernels.one_shot.analysis.groups import Group
from em_kernels.one_shot.analysis.published import AUTHOR_LOSSES, AUTHOR_LOSSES_SOURCE
from em_kernels.one_shot.runs.figures import label_steps

# What a panel shows: the name in metrics.jsonl, the title, the unit, and the factor to that unit.
_PANELS = (
    ("loss", "loss", "nats per token", 1),
    ("entropy", "entropy at temperature 1", "nats per token", 1),
    ("decided", "decided tokens", "%", 100),
    ("prompt_tokens", "prompt length", "tokens", 1),
    ("length_mean", "response length", "tokens", 1),
    ("truncated", "truncated responses", "%", 100),
)
_PUBLISHED_MODEL = "Qwen2.5-Math-7B"


def draw_curves(groups: Sequence[Group]) -> Figure:
    """Draws loss, entropy and lengths by step; the author's losses too, where a group trained the same model."""
    figure, panels = new_axes(2, 3, width=4.0)
    for axes, (metric, title, unit, factor) in zip(panels, _PANELS, strict=True):
        for number, group in enumerate(groups):
            band = group.band(metric)
            if not band.steps:
                continue
            mean, spread = ([factor * value for value in values] for values in (band.mean, band.deviation))
            draw_band(axes, band.steps, mean, spread, color=colour(number), label=_label(group))
        if metric == "loss" and any(_PUBLISHED_MODEL in str(group.config.get("model")) for group in groups):
            steps = range(1, len(AUTHOR_LOSSES) + 1)
            axes.plot(steps, AUTHOR_LOSSES, "--", color="gray", label=f"published: {AUTHOR_LOSSES_SOURCE}")
        if not axes.lines:
            draw_absence(axes)
        axes.set_title(title, loc="left", fontsize=10)
        axes.set_ylabel(unit)
        begin_at_zero(axes)
        label_steps(axes)
    draw_legend(figure, panels[0])
    return figure


def draw_accuracy(groups: Sequence[Group]) -> Figure:
    """Draws the accuracy by step, with the deviation over seeds, or over problems where a group has one run."""
    figure, panels = new_axes(1, len(DECODINGS), sharey=True)
    for axes, decoding in zip(panels, DECODINGS, strict=True):
        for number, group in enumerate(groups):
            band, over_seeds = accuracy_band(group, decoding)
            if not band.steps:
                continue
            axes.errorbar(
                # Bars at the same step would hide each other.
                [step + 0.08 * number for step in band.steps],
                [100 * value for value in band.mean],
                [100 * value for value in band.deviation],
                color=colour(number),
                marker="o",
                markersize=3.5,
                capsize=2,
                label=f"{group.title}, {'deviation over seeds' if over_seeds else 'standard error over problems'}",
            )
        axes.set_title(f"accuracy, {decoding}", loc="left", fontsize=10)
        label_steps(axes)
    # The panels share the axis, whose end is known once all are drawn.
    begin_at_zero(panels[0])
    panels[0].set_ylabel("%")
    draw_legend(figure, panels[0])
    return figure


def _label(group: Group) -> str:
    return f"{group.title}, {len(group.runs)} {'run' if len(group.runs) == 1 else 'seeds'}"
