"""What is drawn on axes, as numbers, so that a test can compare a picture with what it was drawn from."""

import math
from typing import Any

from matplotlib.collections import PolyCollection

Points = list[tuple[float, float]]
Bars = list[tuple[float, float, float]]


def lines(axes: Any) -> dict[str, Points]:
    """The points of each line that has a label."""
    return {line.get_label(): _points(line) for line in axes.lines if not line.get_label().startswith("_")}


def bands(axes: Any) -> list[Bars]:
    """Of each filled band (x, lower edge, upper edge)."""
    found = []
    for collection in (one for one in axes.collections if isinstance(one, PolyCollection)):
        by_x: dict[float, list[float]] = {}
        for path in collection.get_paths():
            for x, y in path.vertices:
                by_x.setdefault(float(x), []).append(float(y))
        found.append([(x, min(ys), max(ys)) for x, ys in sorted(by_x.items())])
    return found


def error_bars(axes: Any) -> list[tuple[str, Bars]]:
    """Of each series with error bars its label and (x, y, half the bar); 0 where a point has no bar."""
    found = []
    for series in axes.containers:
        line, _, (bars,) = series.lines
        halves = [float(high[1] - low[1]) / 2 for low, high in bars.get_segments()]
        points = zip(_points(line), halves, strict=True)
        found.append((series.get_label(), [(x, y, 0.0 if math.isnan(half) else half) for (x, y), half in points]))
    return found


def _points(line: Any) -> Points:
    return [(float(x), float(y)) for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)]
