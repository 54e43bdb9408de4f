"""What the pictures of the analyses share: their size and style, bands and legends."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Distinct for readers who do not tell red from green (Okabe and Ito 2008), the lightest left out.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")


def colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def new_axes(
    rows: int, columns: int, *, width: float = 4.6, height: float = 3.0, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with rows x columns axes, in reading order; the sizes are those of one of them, in inches."""
    figure = Figure(figsize=(columns * width, rows * height), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(rows, columns, squeeze=False, **shared).flat)
    for one in axes:
        one.spines[["top", "right"]].set_visible(False)
        one.grid(alpha=0.25)
        one.set_axisbelow(True)
    return figure, axes


def short_name(name: str) -> str:
    """A model's or a file's name for a picture: of a long path, the last folder and the name."""
    return name if len(name) <= 24 else "/".join(Path(name).parts[-2:])


def begin_at_zero(axes: Axes) -> None:
    """Lets the vertical axis begin a little below 0 and end above its highest dot, so that dots at both are whole."""
    top = axes.get_ylim()[1]
    axes.set_ylim(-0.03 * top, 1.03 * top)


def draw_band(axes: Axes, at: Sequence[float], middle: Sequence[float], spread: Sequence[float], **style: Any) -> None:
    """A line with a band of one spread above and below; a spread of NaN has no band."""
    axes.plot(at, middle, marker="o" if len(at) <= 50 else None, markersize=3.5, **style)
    low = [m - s for m, s in zip(middle, spread, strict=True)]
    high = [m + s for m, s in zip(middle, spread, strict=True)]
    axes.fill_between(at, low, high, color=style.get("color"), alpha=0.18, linewidth=0)


def draw_absence(axes: Axes) -> None:
    axes.text(0.5, 0.5, "not measured", ha="center", transform=axes.transAxes, color="gray")


def draw_legend(figure: Figure, *axes: Axes, columns: int = 1) -> None:
    """One legend for the whole figure, below it, with each label that the given axes have."""
    labelled = [zip(*one.get_legend_handles_labels(), strict=True) for one in axes]
    handles = {label: handle for pairs in labelled for handle, label in pairs}
    if handles:
        figure.legend(
            handles.values(), handles.keys(), loc="outside lower left", ncols=columns, frameon=False, fontsize=9
        )
