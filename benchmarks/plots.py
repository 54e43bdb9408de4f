"""The picture of docs/benchmarks.md has four panels of a run; a panel is left out where nothing was measured for it."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from stored_rows import Row

_OURS, _OURS_TOO, _OURS_BARE, _GRAY = "#1f4e9c", "#6fa3e0", "#a8c4e8", "#8a8a8a"
_OTHERS = ("#d98c2b", "#5d9e52", "#b05c8e", "#c0504d", "#7a6fb0", "#4aa3a3", "#a58b4f", "#d1729b", "#6b8e23", "#8c564b")


def plot(runs: dict[str, list[Row]], file: Path) -> None:
    """Write a PNG: share of the floor by vocabulary, memory by tokens, time by mask share, time by grad_tolerance."""
    panels = (
        (_share_of_floor, runs.get("entropy_loss", [])),
        (_memory, runs.get("linear_entropy", [])),
        (_mask, runs.get("entropy_loss", [])),
        (_tolerance, runs.get("linear_entropy", [])),
    )
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axes, (draw, rows) in zip(figure.subplots(2, 2).flat, panels, strict=True):
        draw(axes, rows)
        if not axes.has_data():
            axes.set_visible(False)
            continue
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
        many = len(axes.get_legend_handles_labels()[0]) > 6
        axes.legend(fontsize=7, frameon=False, **({"loc": "center left", "bbox_to_anchor": (1, 0.5)} if many else {}))
    figure.savefig(file, dpi=110)


def _share_of_floor(axes: Axes, rows: list[Row]) -> None:
    rows = [row for row in rows if row.get("part") == "vocabularies" and "over_floor" in row]
    rows = [row for row in rows if row["variant"] in ("forward+backward", "inplace_backward")]
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = row["contender"] + (", in place" if row["variant"] == "inplace_backward" else "")
        name += " *" if row["computes"] == "cross entropy" else ""
        series.setdefault(name, []).append((row["vocab"], 100 / row["over_floor"]))
    vocabularies = sorted({row["vocab"] for row in rows})
    for name, points in series.items():
        x, y = zip(*sorted(points), strict=True)
        x = [vocabularies.index(vocab) for vocab in x]
        axes.plot(x, y, marker="o", markersize=4, label=name, color=_color(name, list(series)))
    if rows:
        axes.set_xticks(range(len(vocabularies)), [f"{vocab:,}" for vocab in vocabularies])
        axes.set_title(f"Loss on {rows[0]['dtype']} logits, forward + backward", fontsize=9)
        axes.set_xlabel("vocabulary  (* cross entropy, computes less)", fontsize=8)
        axes.set_ylabel("time of a copy of the logits / time, %", fontsize=8)


def _memory(axes: Axes, rows: list[Row]) -> None:
    rows = [row for row in rows if "extra_bytes" in row]
    shapes: dict[tuple[int, int], set[int]] = {}
    for row in rows:
        shapes.setdefault((row["dim"], row["vocab"]), set()).add(row["rows"])
    # The panel shows the operands that were measured at the most numbers of tokens.
    shape = max(shapes, key=lambda key: len(shapes[key]), default=None)
    rows = [row for row in rows if (row["dim"], row["vocab"]) == shape and not row["contender"].startswith("ours,")]
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        if row.get("computes") == "entropy":
            series.setdefault(row["contender"], []).append((row["rows"], row["extra_bytes"] / 2**30))
    for name, points in series.items():
        axes.plot(
            *zip(*sorted(points), strict=True), marker="o", markersize=4, label=name, color=_color(name, list(series))
        )
    if rows:
        first = rows[0]
        axes.set_title(
            f"Loss on hidden states: hidden {first['dim']}, vocabulary {first['vocab']:,}, {first['dtype']}", fontsize=9
        )
        axes.set_xlabel("tokens", fontsize=8)
        axes.set_ylabel("GiB beyond the operands, gradients included", fontsize=8)


def _mask(axes: Axes, rows: list[Row]) -> None:
    rows = [row for row in rows if row.get("part") == "vocabularies" and "over_floor" in row]
    series: dict[tuple[int, int], list[tuple[float, float]]] = {}
    for row in rows:
        if row["variant"].startswith("masked "):
            share = float(row["variant"].removeprefix("masked "))
            series.setdefault((row["rows"], row["vocab"]), []).append((100 * share, row["over_floor"]))
    for (tokens, vocab), points in series.items():
        axes.plot(*zip(*sorted(points), strict=True), marker="o", markersize=4, label=f"{tokens:,} x {vocab:,}")
    if series:
        axes.set_title(f"Loss on {rows[0]['dtype']} logits, forward + backward, with a mask", fontsize=9)
        axes.set_xlabel("masked tokens, %", fontsize=8)
        axes.set_ylabel("time / time of a copy of the logits", fontsize=8)


def _tolerance(axes: Axes, rows: list[Row]) -> None:
    prefix = "ours, grad_tolerance "
    series: dict[tuple[str, int], dict[float, float]] = {}
    for row in rows:
        if "over_floor" in row and (row["contender"] == "ours" or row["contender"].startswith(prefix)):
            tolerance = 0.0 if row["contender"] == "ours" else float(row["contender"].removeprefix(prefix))
            series.setdefault((row["model"], row["rows"]), {})[tolerance] = row["over_floor"]
    tolerances = sorted({tolerance for points in series.values() for tolerance in points})
    for (model, tokens), points in series.items():
        x = [tolerances.index(tolerance) for tolerance in sorted(points)]
        axes.plot(x, [points[t] for t in sorted(points)], marker="o", markersize=4, label=f"{model}, {tokens:,} tokens")
    if series:
        axes.axhline(1, color=_GRAY, linewidth=0.8, linestyle=":")
        axes.set_xticks(range(len(tolerances)), [f"{tolerance:.0e}" if tolerance else "0" for tolerance in tolerances])
        axes.set_title("Loss on hidden states, forward + backward", fontsize=9)
        axes.set_xlabel("grad_tolerance", fontsize=8)
        axes.set_ylabel("time / time of the three plain matmuls", fontsize=8)


def _color(name: str, names: list[str]) -> str:
    if name.startswith("ours"):
        return {"ours": _OURS, "ours, in place": _OURS_TOO}.get(name, _OURS_BARE)
    if name == "eager":
        return _GRAY
    others = [other for other in names if not other.startswith("ours") and other != "eager"]
    return _OTHERS[others.index(name) % len(_OTHERS)]
