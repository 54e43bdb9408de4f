"""This module writes the tables of docs/benchmarks.md: what the latest run of each suite measured on one machine."""

import math
from collections.abc import Callable
from typing import Any

from marks import legend, marks
from markup import folded, number, plain, table
from stored_rows import Row, by_shape
from targets import Outcome, outcomes

# The columns hold the rows that were measured at each configuration, by the fields that its title shows.
Columns = dict[tuple[str, ...], list[Row]]
# A column has a heading and a function that returns the cell of a contender's row.
Column = tuple[str, Callable[[Row], str]]


def full_tables(runs: dict[str, list[Row]], device: str, picture: str) -> str:
    """Return all that is reported of one machine, under its name.

    That is the picture, a table for each suite, the targets, what was not run, and what the marks mean.
    """
    shown = "Share of a copy's speed by vocabulary, memory by tokens, time by mask share, time by grad_tolerance"
    machine = next(rows[0]["machine"] for rows in runs.values() if rows)
    every = [row for rows in runs.values() for row in rows]
    parts = [
        f"## {machine['name']}, {machine['threads']} threads" if device == "cpu" else f"## {machine['name']}",
        f"![{shown}]({picture})",
        *(_TABLES[suite](rows) for suite, rows in runs.items() if rows and suite in _TABLES),
        _targets(outcomes(every, device)),
        _not_run(every),
    ]
    parts.append(legend("".join(parts)))
    for suite, rows in runs.items():
        if rows and not any(row.get("finished") for row in rows):
            parts.append(f"The run of {suite} was stopped before its end.")
    return "\n\n".join(part for part in [*parts, _origin(runs)] if part)


def _logits(rows: list[Row]) -> str:
    rows = [row for row in rows if "contender" in row and "not_run" not in row]
    shown = ("copy", "forward+backward", "inplace_backward", "reduction none", "masked 0.5", "masked 0.9")
    columns = _columns(
        [row for row in rows if row["variant"] in shown and row["logits"] == "peaked"], ("dtype", "rows", "vocab"), 2
    )
    text = (
        "**The loss on logits**, forward + backward of the mean: milliseconds (20th to 80th percentile), and the time "
        "over that of a copy of the logits; memory beyond the logits, the gradient included; error of the gradient "
        "against float64, over the row's largest entry (memory and error of the last column's logits)."
    )
    memory = ("MiB", lambda row: f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else "")
    error = ("error", lambda row: "" if row.get("gradient_error") is None else f"{row['gradient_error']:.1e}")
    titles = [f"{dtype} {tokens:,} x {vocab:,}" for dtype, tokens, vocab in columns]
    parts = [_contenders(text, columns, titles, _name, [memory, error])]
    whole = [row for row in rows if row["variant"] in ("copy", "forward+backward", "inplace_backward")]
    parts.append(
        _every_shape(
            "The loss on logits at every shape that was measured",
            whole,
            lambda row: f"{row['dtype']} {row['rows']:,} x {row['vocab']:,}, {row['logits']}",
            "a copy of the logits",
        )
    )
    return _joined(parts)


def _hidden(rows: list[Row]) -> str:
    rows = [row for row in rows if "contender" in row and "not_run" not in row]
    timed = [row for row in rows if "seconds" in row or "error" in row]
    columns = _columns(timed, ("model", "dtype", "rows"), 3)
    # The column shows the model whose memory was measured at the most numbers of tokens, at the largest of these.
    measured: dict[str, dict[int, dict[str, int]]] = {}
    for row in rows:
        if "extra_bytes" in row:
            tokens = measured.setdefault(row["model"], {}).setdefault(row["rows"], {})
            tokens[row["contender"]] = row["extra_bytes"]
    model = max(measured, key=lambda name: len(measured[name]), default="")
    most = max(measured.get(model, {}), default=0)
    memory = measured.get(model, {}).get(most, {})

    def mebibytes(row: Row) -> str:
        return number(memory[row["contender"]] / 2**20) if row["contender"] in memory else ""

    extra: list[Column] = [("error", lambda row: _first(row, ("weight_gradient_error",), "{:.1e}"))]
    if memory:
        extra.append((f"MiB, {model}, {most:,} tokens", mebibytes))
    text = (
        "**The loss on hidden states**, forward + backward of the mean at temperature 0.5: milliseconds (20th to 80th "
        "percentile), and the time over that of the three plain matmuls; error of the weight's gradient against "
        "float64, its norm over the gradient's (of the last column's operands)"
        f"{'; memory beyond the operands, gradients included' if memory else ''}. On a CPU the operands of "
        "SmolLM2-135M are those of its own completions; all others are drawn, about as peaked."
    )
    titles = [f"{model}, {dtype}, {tokens:,} tokens" for model, dtype, tokens in columns]
    parts = [_contenders(text, columns, titles, lambda row: row["contender"], extra)]
    sparse = next((row for row in timed if "columns_kept" in row), None)
    if sparse is not None:
        parts.append(
            "In 512 of the first column's tokens, entries of the logits' gradient above 1e-6 lie in "
            f"{sparse['rows_kept']:.0%} of the rows and {sparse['columns_kept']:.1%} of the columns."
        )
    parts.append(
        _every_shape(
            "The loss on hidden states at every shape that was measured",
            rows,
            lambda row: f"{row['model']}, {row['dtype']}, {row['rows']:,} tokens",
            "the three plain matmuls",
        )
    )
    return _joined(parts)


def _statistics(rows: list[Row]) -> str:
    columns = _columns([row for row in rows if row.get("variant") != "forward"], ("takes", "model", "dtype", "rows"), 4)
    titles = [f"{takes}, {model}, {dtype}, {tokens:,} tokens" for takes, model, dtype, tokens in columns]
    text = (
        "Forward + backward of a policy-gradient loss with an entropy bonus: milliseconds (20th to 80th percentile), "
        "and the time over that of a copy of the logits, or of the three plain matmuls."
    )
    error = ("error", lambda row: _first(row, ("gradient_error", "weight_gradient_error"), "{:.1e}"))
    return folded(
        "token_stats and linear_token_stats beside what policy-gradient trainers use",
        _contenders(text, columns, titles, lambda row: row["contender"], [error]),
    )


def _step(rows: list[Row]) -> str:
    steps = [row for row in rows if row.get("variant") == "" and ("phases" in row or "error" in row)]
    if not steps:
        return ""
    largest = {
        (row["model"], row["contender"]): row
        for row in rows
        if row.get("variant") == "largest batch" and "error" not in row
    }
    phases = list(next((row["phases"] for row in steps if "phases" in row), {}))
    head = ["model", "loss", "step, s", *phases, "peak, GiB", *(["largest batch"] if largest else [])]
    lines = []
    for row in steps:
        start = [f"{row['model']}, {row['dtype']}", row["contender"]]
        if "error" in row:
            lines.append([*start, plain(row["error"]), *("" for _ in head[3:])])
            continue
        spread = f"{row['seconds']:.2f} ({row['p20']:.2f} to {row['p80']:.2f})"
        peak = f"{row.get('peak_bytes', row.get('extra_bytes', 0)) / 2**30:.2f}"
        cells = [*start, spread, *(f"{row['phases'][phase]:.2f}" for phase in phases), peak]
        found = largest.get((row["model"], row["contender"]))
        if largest:
            cells.append("" if found is None else f"{found['largest_batch']}{' or more' if found['or_more'] else ''}")
        lines.append(cells)
    first, kind = steps[0], "beyond the model and the optimiser's state" if "extra_bytes" in steps[0] else "in all"
    text = (
        f"**An optimiser step** of one-shot EM, {first['batch']} completions of up to {first['new_tokens']} tokens, "
        f"{first['micro_batch']} at a time: seconds of its parts, and memory {kind}. Ours makes most of the gradient "
        "where the others make the loss."
    )
    if largest:
        any_row = next(iter(largest.values()))
        limit = f"{any_row['limit_bytes'] / 2**30:g} GiB of it" if "limit_bytes" in any_row else "the GPU's memory"
        text += f" The largest batch: completions of {any_row['tokens_each']} tokens that fit {limit} at once."
    return f"{text}\n\n{table(head, lines)}"


def _host(rows: list[Row]) -> str:
    rows = [row for row in rows if "seconds" in row]
    found: dict[str, dict[tuple[str, str], float]] = {}
    for row in rows:
        found.setdefault(row["contender"], {})[row["what"], row["variant"]] = row["seconds"]
    if not found:
        return ""
    columns = {
        "forward, us": ("host time", "forward", 1e6),
        "forward + backward, us": ("host time", "forward+backward", 1e6),
        "first call, ms": ("first call", "forward+backward", 1e3),
    }
    lines = [
        [
            contender,
            *(
                number(times[what, variant] * unit) if (what, variant) in times else ""
                for what, variant, unit in columns.values()
            ),
        ]
        for contender, times in found.items()
    ]
    shape = f"{rows[0]['rows']:,} x {rows[0]['vocab']:,} {rows[0]['dtype']} logits"
    return folded(
        f"The host's time for a call on {shape}, and for the first of a process", table(["", *columns], lines)
    )


def _targets(reached: list[Outcome]) -> str:
    lines = []
    for outcome in reached:
        unit = outcome.target.unit
        verdict = "reached" if outcome.met else "**behind**"
        worst = "failed" if math.isinf(outcome.worst) else f"{outcome.worst:.3g}{unit} of {outcome.count}"
        lines.append([outcome.target.text, f"{outcome.target.bound:.3g}{unit}", worst, verdict])
    return f"**Targets**\n\n{table(['target', 'bound', 'worst measured', ''], lines)}" if lines else ""


_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "entropy_loss": _logits,
    "linear_entropy": _hidden,
    "training_step": _step,
    "token_stats": _statistics,
    "host_overhead": _host,
}


def _columns(rows: list[Row], keys: tuple[str, ...], count: int) -> Columns:
    """Return the rows of the first `count` configurations; a suite's first configurations say most."""
    found: Columns = {}
    for row in rows:
        if all(key in row for key in keys) and "contender" in row:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return dict(list(found.items())[:count])


def _contenders(text: str, columns: Columns, titles: list[str], name: Callable[[Row], str], extra: list[Column]) -> str:
    """Return a table with a line for each contender.

    Each of `columns` has two cells, and the `extra` cells are those of the last of `columns` that has the contender.
    """
    contenders: dict[str, dict[int, Row]] = {}
    for i, rows in enumerate(columns.values()):
        for row in rows:
            contenders.setdefault(name(row), {})[i] = row
    lines = []
    for contender, found in contenders.items():
        cells = [contender + marks(found.values())]
        for i in range(len(columns)):
            cells += _time(found.get(i))
        last = found[max(found)]
        lines.append([*cells, *(value(last) for _, value in extra)])
    head = ["", *(cell for title in titles for cell in (title, "")), *(title for title, _ in extra)]
    return f"{text}\n\n{table(head, lines)}" if lines else ""


def _time(row: Row | None) -> list[str]:
    """Return a cell of milliseconds with their spread, or of the error, and a cell of the time over the floor's."""
    if row is None:
        return ["", ""]
    if "error" in row:
        return [plain(row["error"]), ""]
    median, p20, p80 = (number(row[key] * 1e3) for key in ("seconds", "p20", "p80"))
    return [f"{median} ({p20} to {p80})", f"{row['over_floor']:.2f}x" if "over_floor" in row else ""]


def _every_shape(title: str, rows: list[Row], shape_name: Callable[[Row], str], floor: str) -> str:
    """Return tables of times over the floor's and of memory, each where more than one shape was measured."""
    shapes = [
        (shape_name(next(iter(shape.values()))), {_name(row): row for row in shape.values()})
        for shape in by_shape(rows)
    ]
    tables = []
    for text, key, cell in (
        (f"Forward + backward, time over that of {floor}:", "over_floor", "{:.2f}".format),
        ("Forward + backward, MiB of memory beyond the input, gradients included:", "extra_bytes", _mebibytes),
    ):
        lines = {name: found for name, found in shapes if any(key in row for row in found.values())}
        columns = dict.fromkeys(
            name for found in lines.values() for name, row in found.items() if _cell(row, key, cell)
        )
        head = ["", *(name + marks(found[name] for found in lines.values() if name in found) for name in columns)]
        cells = [
            [name, *(_cell(found.get(column, {}), key, cell) for column in columns)] for name, found in lines.items()
        ]
        if len(cells) > 1:
            tables.append(f"{text}\n\n{table(head, cells)}")
    return folded(title, _joined(tables))


def _cell(row: Row, key: str, form: Callable[[Any], str]) -> str:
    if key in row:
        return form(row[key])
    return "failed" if "error" in row else ""


def _name(row: Row) -> str:
    plainest = ("copy", "forward+backward", "")
    return row["contender"] if row["variant"] in plainest else f"{row['contender']}, {row['variant']}"


def _mebibytes(size: int) -> str:
    return number(size / 2**20)


def _first(row: Row, keys: tuple[str, ...], form: str) -> str:
    return next((form.format(row[key]) for key in keys if row.get(key) is not None), "")


def _joined(parts: list[str]) -> str:
    return "\n\n".join(part for part in parts if part)


def _not_run(rows: list[Row]) -> str:
    missing: dict[str, set[str]] = {}
    for row in rows:
        if "not_run" in row:
            missing.setdefault(row["not_run"], set()).add(row["contender"])
    listed = "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in sorted(missing.items()))
    return f"Not run here: {listed}." if listed else ""


def _origin(runs: dict[str, list[Row]]) -> str:
    where = next(rows[0]["machine"] for rows in runs.values() if rows)
    software = [f"{name} {where[name]}" for name in ("driver", "torch", "triton", "python") if where.get(name)]
    peers = [f"{name} {found}" for name, found in where.get("peers", {}).items() if found and name != "torch"]
    commits = sorted({rows[0]["machine"]["commit"][:10] for rows in runs.values() if rows})
    text = (
        f"{where['name']}, {where['threads']} threads, {', '.join(software)}, commit {', '.join(commits)}, "
        f"{where['time'][:10]}"
    )
    return f"{text}; {', '.join(peers)}." if peers else f"{text}."
