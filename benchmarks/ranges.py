"""This module computes ranges over the shapes at which something was measured."""

from collections.abc import Callable, Iterable

from stored_rows import Row, by_shape

# A shape holds the rows that were measured at it, by "contender | variant".
Shape = dict[str, Row]
# A value is a function that returns a number of a row, or None where it was not measured.
Value = Callable[[Row], float | None]

BEST_PEER = "the best peer"
# These contenders are not published implementations, and their names do not begin with "ours".
_NO_PEERS = ("eager", "torch.compile", "entropy_loss on logits")


def shapes_of(rows: Iterable[Row]) -> list[Shape]:
    """Return the shapes in the order of measurement, with the best peer beside the contenders of each."""
    return [shape | _best_peer(shape) for shape in by_shape(rows)]


def by_dtype(shapes: list[Shape]) -> dict[str, list[Shape]]:
    """Return the shapes of each dtype, the dtype with the most shapes first."""
    found: dict[str, list[Shape]] = {}
    for shape in shapes:
        found.setdefault(next(iter(shape.values()))["dtype"], []).append(shape)
    return dict(sorted(found.items(), key=lambda entry: -len(entry[1])))


def values(shapes: list[Shape], name: str, value: Value) -> list[float]:
    """Return the contender's value at each shape where it was measured."""
    found = (value(shape[name]) for shape in shapes if name in shape)
    return [number for number in found if number is not None]


def ratios(shapes: list[Shape], name: str, other: str, value: Value) -> list[float]:
    """Return one contender's value over another's, at each shape where both were measured."""
    both = [shape for shape in shapes if values([shape], name, value) and values([shape], other, value)]
    return [x / y for x, y in zip(values(both, name, value), values(both, other, value), strict=True)]


def spread(numbers: list[float]) -> str:
    """Return the least and the greatest number, in two digits: one number where both are written alike, "" for none."""
    ends = [_two_digits(x) for x in sorted(numbers)]
    return " to ".join(dict.fromkeys((ends[0], ends[-1]))) if ends else ""


def _two_digits(x: float) -> str:
    return f"{x:,.0f}" if x >= 9.95 else f"{x:.1f}" if x >= 0.995 else f"{x:.2f}"


def peers(shapes: list[Shape]) -> list[str]:
    """Return the names of the published implementations of an entropy and its gradient, in the order of measurement."""
    rows = [row for shape in shapes for row in shape.values() if _is_peer(row)]
    return list(dict.fromkeys(row["contender"] for row in rows if row["variant"] != "forward"))


def _best_peer(shape: Shape) -> Shape:
    """Return the row of the fastest peer for each variant, with the memory of the peer that takes least."""
    variants: dict[str, list[Row]] = {}
    for row in shape.values():
        if _is_peer(row):
            variants.setdefault(row["variant"], []).append(row)
    found = {}
    for variant, rows in variants.items():
        fastest = min(rows, key=lambda row: row.get("seconds", float("inf")))
        memory = [row["extra_bytes"] for row in rows if "extra_bytes" in row]
        found[f"{BEST_PEER} | {variant}"] = fastest | ({"extra_bytes": min(memory)} if memory else {})
    return found


def _is_peer(row: Row) -> bool:
    name = row["contender"]
    return row.get("computes") == "entropy" and not name.startswith("ours") and name not in _NO_PEERS
