"""This module writes what README.md says of the measurements: each number is the range over all measured shapes."""

import math

from marks import legend, marks
from markup import table
from ranges import BEST_PEER, Shape, Value, by_dtype, peers, ratios, shapes_of, spread, values
from stored_rows import Row
from targets import gradient_bytes, itemsize

# Each column of the table has a contender in the loss on logits and one in the loss on hidden states.
_COLUMNS = {
    "eager PyTorch": ("eager | forward+backward", "eager | "),
    "`torch.compile`": ("torch.compile | forward+backward", "torch.compile | "),
    BEST_PEER: (f"{BEST_PEER} | forward+backward", f"{BEST_PEER} | "),
    "ours": ("ours | forward+backward", "ours | "),
    'ours, `reduction="none"`': ("ours | reduction none", "ours, reduction none | "),
    "ours, `inplace_backward=True`": ("ours | inplace_backward", ""),
    "ours, `grad_tolerance=1e-6`": ("", "ours, grad_tolerance 1e-06 | "),
}
_OTHERS = ("eager PyTorch", "`torch.compile`")


def sentences(runs: dict[str, list[Row]], device: str) -> str:
    """Return the speed and memory of both losses on one machine, beside eager PyTorch and `torch.compile`."""
    logits, hidden = shapes_of(runs["entropy_loss"]), shapes_of(runs["linear_entropy"])
    said = [text for text in (_of_logits(logits, device), _of_hidden(hidden)) if text]
    if not said:
        return ""
    machine = _machine(runs)
    where = f"{machine['threads']} threads of one {machine['name']}" if device == "cpu" else f"one {machine['name']}"
    counts = [f"{len(shapes)} of {name}" for name, shapes in (("logits", logits), ("hidden states", hidden)) if shapes]
    return f"On {where}, {' '.join(said)} These are the ranges over all measured shapes, {' and '.join(counts)}."


def summary_table(runs: dict[str, list[Row]], device: str) -> str:
    """Return a table of time over the floor's, and of memory, for both losses beside eager, compiled and best peer."""
    logits, hidden = shapes_of(runs["entropy_loss"]), shapes_of(runs["linear_entropy"])
    on_logits, on_hidden = (list(names) for names in zip(*_COLUMNS.values(), strict=True))
    lines = [
        *(
            _line(f"{dtype} logits, time over a copy's", shapes, on_logits, _over_floor)
            for dtype, shapes in by_dtype(logits).items()
        ),
        _line("logits, memory over their own", logits, on_logits, _over_logits),
        *(
            _line(f"{dtype} hidden states, time over three matmuls'", shapes, on_hidden, _over_floor)
            for dtype, shapes in by_dtype(hidden).items()
        ),
        _line(f"hidden states, MiB for {_tokens(hidden)}", hidden, on_hidden, _mebibytes),
    ]
    lines = [line for line in lines if any(line[1:])]
    if not lines:
        return ""
    text = table(["", *_COLUMNS], lines)
    machine = _machine(runs)
    threads = f", {machine['threads']} threads" if device == "cpu" else ""
    notes = f"{machine['name']}{threads}, torch {machine['torch']}, {machine['time'][:10]}."
    if compared := peers(logits + hidden):
        notes += f" The best peer's time and memory are, at each shape, the least of these: {'; '.join(compared)}."
    return "\n\n".join(part for part in (text, notes, legend(text)) if part)


def _of_logits(shapes: list[Shape], device: str) -> str:
    parts = []
    for dtype, found in by_dtype(shapes).items():
        speeds = {name: ratios(found, _COLUMNS[name][0], _COLUMNS["ours"][0], _seconds) for name in _OTHERS}
        faster = [f"{spread(speed)} times as fast as {name}" for name, speed in speeds.items() if speed]
        if faster:
            parts.append(f"{' and '.join(faster)} in {dtype}")
    if not parts:
        return ""
    text = f"`entropy_loss` and its gradient are computed {'; '.join(parts)}."
    beyond = values(shapes, _COLUMNS["ours"][0], _mebibytes_beyond_gradient)
    if not beyond:
        return text
    # The number is rounded up, because a bound must not be lower than what was measured.
    most = math.ceil(10 * max(0, *beyond)) / 10
    # A thread takes them in the first call, and the second is measured.
    kept = " and two rows of float32 that each thread keeps" if device == "cpu" else ""
    amount = f"at most {most} MiB" if most else "no memory"
    return f"{text} They take {amount} beyond the gradient{kept}."


def _of_hidden(shapes: list[Shape]) -> str:
    times = {name: spread(values(shapes, _COLUMNS[name][1], _over_floor)) for name in ("ours", *_OTHERS)}
    if not times["ours"]:
        return ""
    others = [f"{name} {times[name]}" for name in _OTHERS if times[name]]
    text = f"`linear_entropy_loss` and its gradients take {times['ours']} times as long as the three matmuls in them"
    text += f" ({', '.join(others)})" if others else ""
    ours, eager = _COLUMNS["ours"][1], _COLUMNS["eager PyTorch"][1]
    both = [shape for shape in shapes if all(values([shape], name, _mebibytes) for name in (ours, eager))]
    if both:
        text += f", and {spread(values(both, ours, _mebibytes))} MiB for {_tokens(both)}"
        text += f" where eager PyTorch takes {spread(values(both, eager, _mebibytes))}"
    return f"{text}."


def _line(heading: str, shapes: list[Shape], names: list[str], value: Value) -> list[str]:
    """Return the heading, with the number of shapes, and a cell for each contender."""
    counts = [len(values(shapes, name, value)) for name in names]
    cells = []
    for name, count in zip(names, counts, strict=True):
        rows = [shape[name] for shape in shapes if name in shape]
        failed = sum("error" in row for row in rows)
        cell = f"{spread(values(shapes, name, value))}{marks(rows)}" if count else ""
        if 0 < count < max(counts):
            cell += f" ({_shapes(count)})"
        cells.append(", ".join(part for part in (cell, f"failed at {_shapes(failed)}" if failed else "") if part))
    return [f"{heading}, {_shapes(max(counts))}", *cells]


def _machine(runs: dict[str, list[Row]]) -> Row:
    return next(rows[0]["machine"] for rows in runs.values() if rows)


def _tokens(shapes: list[Shape]) -> str:
    """Return the numbers of tokens at which memory was measured."""
    found = sorted({row["rows"] for shape in shapes for row in shape.values() if "extra_bytes" in row})
    return f"{spread(found)} tokens"


def _shapes(count: int) -> str:
    return f"{count} shape{'' if count == 1 else 's'}"


def _seconds(row: Row) -> float | None:
    return row.get("seconds")


def _over_floor(row: Row) -> float | None:
    return row.get("over_floor")


def _mebibytes(row: Row) -> float | None:
    return row["extra_bytes"] / 2**20 if "extra_bytes" in row else None


def _over_logits(row: Row) -> float | None:
    return row["extra_bytes"] / (row["rows"] * row["vocab"] * itemsize(row)) if "extra_bytes" in row else None


def _mebibytes_beyond_gradient(row: Row) -> float | None:
    return (row["extra_bytes"] - gradient_bytes(row)) / 2**20 if "extra_bytes" in row else None
