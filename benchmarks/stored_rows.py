"""This module reads stored measurements: the rows of a folder, the latest run of a suite, and the rows of one shape."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Row = dict[str, Any]

# These fields of a row describe the input that it was measured on.
_SHAPE = ("benchmark", "takes", "dtype", "rows", "dim", "vocab", "logits", "model")


def read(results: Path) -> list[Row]:
    """Return every row of the JSON-lines files in the folder; ValueError names a line that is no row."""
    rows = []
    for file in sorted(results.glob("*.jsonl")):
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError:
                raise ValueError(f"{file}, line {number}: not a JSON row") from None
    return rows


def latest_run(rows: Iterable[Row], benchmark: str, device: str) -> list[Row]:
    """Return the rows of the run of a suite on `device` that started last, an empty list if there was none."""
    rows = [row for row in rows if row.get("benchmark") == benchmark and row.get("device") == device]
    latest = max((row["machine"]["time"] for row in rows), default=None)
    return [row for row in rows if row["machine"]["time"] == latest]


def by_shape(rows: Iterable[Row]) -> list[dict[str, Row]]:
    """Return what was measured at each shape, by "contender | variant"; the shapes are in the order of measurement."""
    shapes: dict[tuple[Any, ...], dict[str, Row]] = {}
    for row in rows:
        if "contender" in row and "not_run" not in row:
            contenders = shapes.setdefault(tuple(row.get(key) for key in _SHAPE), {})
            # Time and memory may have been measured apart, in a row each.
            contenders.setdefault(f"{row['contender']} | {row.get('variant', '')}", {}).update(row)
    return list(shapes.values())
