"""Writes the tables and the plots of README.md from the rows in benchmarks/results.

For the CPU and for a GPU, the latest run of each suite goes between <!-- benchmark:cpu --> and <!-- /benchmark:cpu -->
(or gpu), and into benchmarks/results/measured_cpu.png (or gpu). Rows of a checkout with uncommitted changes are
refused: nobody could check out what they measured.
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

from options import SUITES
from plots import plot
from targets import Outcome, outcomes

_ROOT = Path(__file__).parents[1]
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}
# Marks behind a name; Markdown needs the backslash.
_MARKS = {
    "\\*": "computes less, the cross entropy: one logit of a row and a normaliser, no sum over the distribution",
    "†": "gives statistics of each token, for any upstream gradient, and so makes four matmuls",
    "‡": "the host takes as long to launch it, or waits for the device in between: not the device's time alone",
}

Row = dict[str, Any]


def fail(message: str) -> NoReturn:
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def read(results: Path) -> list[Row]:
    rows = []
    for file in sorted(results.glob("*.jsonl")):
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                rows.append(json.loads(text))
            except json.JSONDecodeError:
                fail(f"{file}, line {number}: not a JSON row")
    return rows


def latest_run(rows: Iterable[Row], benchmark: str, device: str) -> list[Row]:
    """The rows of the run of a suite on `device` that started last; empty if there was none."""
    rows = [row for row in rows if row.get("benchmark") == benchmark and row.get("device") == device]
    latest = max((row["machine"]["time"] for row in rows), default=None)
    return [row for row in rows if row["machine"]["time"] == latest]


def report(runs: dict[str, list[Row]], device: str, picture: str) -> str:
    """The picture, the suites' tables, what they have of the targets, and who was not measured."""
    shown = "Share of a copy's speed by vocabulary, memory by tokens, time by mask share, time by grad_tolerance"
    parts = [f"![{shown}]({picture})"]
    parts += [table(rows) for suite, rows in runs.items() if rows and (table := _TABLES.get(suite))]
    parts = [part for part in parts if part]
    every = [row for rows in runs.values() for row in rows]
    reached = outcomes(every, device)
    if reached:
        parts.append(_targets(reached))
    missing: dict[str, set[str]] = {}
    for row in every:
        if "not_run" in row:
            missing.setdefault(row["not_run"], set()).add(row["contender"])
    if missing:
        listed = "; ".join(f"{', '.join(sorted(names))} ({why})" for why, names in sorted(missing.items()))
        parts.append(f"Not run here: {listed}.")
    marks = {mark for row in every for mark in _marks(row)}
    if marks:
        parts.append("; ".join(f"{mark} {meaning}" for mark, meaning in _MARKS.items() if mark in marks) + ".")
    for suite, rows in runs.items():
        if rows and not any(row.get("finished") for row in rows):
            parts.append(f"The run of {suite} was stopped before its end.")
    parts.append(_origin(runs))
    return "\n\n".join(parts)


def _logits(rows: list[Row]) -> str:
    shown = ("copy", "forward+backward", "inplace_backward", "reduction none", "masked 0.5", "masked 0.9")
    rows = [row for row in rows if row.get("variant") in shown and row.get("logits") == "peaked"]
    shapes = _shapes(rows, ("dtype", "rows", "vocab"), 2)

    def name(row: Row) -> str:
        return row["contender"] if row["variant"] in shown[:2] else f"{row['contender']}, {row['variant']}"

    memory = ("MiB", lambda row: f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else "")
    error = ("error", lambda row: "" if row.get("gradient_error") is None else f"{row['gradient_error']:.1e}")
    titles = [f"{dtype} {tokens:,} x {vocab:,}" for dtype, tokens, vocab in shapes]
    return _table(
        "**The loss on logits**, forward + backward of the mean: milliseconds (20th to 80th percentile), and the time "
        "over that of a copy of the logits; memory beyond the logits, the gradient included; error of the gradient "
        "against float64, over the row's largest entry (memory and error of the last column's logits).",
        shapes,
        titles,
        name,
        [memory, error],
    )


def _hidden(rows: list[Row]) -> str:
    timed = [row for row in rows if "seconds" in row or "error" in row]
    shapes = _shapes(timed, ("model", "dtype", "rows"), 3)
    # Of the model whose memory was measured at the most numbers of tokens, at the largest.
    measured: dict[str, dict[int, dict[str, int]]] = {}
    for row in rows:
        if "extra_bytes" in row:
            tokens = measured.setdefault(row["model"], {}).setdefault(row["rows"], {})
            tokens[row["contender"]] = row["extra_bytes"]
    model = max(measured, key=lambda name: len(measured[name]), default="")
    most = max(measured.get(model, {}), default=0)
    memory = measured.get(model, {}).get(most, {})
    columns: list[tuple[str, Callable[[Row], str]]] = [
        ("error", lambda row: f"{row['weight_gradient_error']:.1e}" if "weight_gradient_error" in row else "")
    ]
    where = ""
    if memory:
        columns.append(
            (
                f"MiB, {model}, {most:,} tokens",
                lambda row: _round(memory[row["contender"]] / 2**20) if row["contender"] in memory else "",
            )
        )
        where = "; memory beyond the operands, gradients included"
    text = _table(
        "**The loss on hidden states**, forward + backward of the mean at temperature 0.5: milliseconds (20th to 80th "
        "percentile), and the time over that of the three plain matmuls; error of the weight's gradient against "
        f"float64, its norm over the gradient's (of the last column's operands){where}. On a CPU the operands of "
        "SmolLM2-135M are those of its own completions; all others are drawn, about as peaked.",
        shapes,
        [f"{model}, {dtype}, {tokens:,} tokens" for model, dtype, tokens in shapes],
        lambda row: row["contender"],
        columns,
    )
    sparse = next((row for row in timed if "columns_kept" in row), None)
    if sparse is None:
        return text
    return (
        f"{text}\n\nIn 512 of the first column's tokens, entries of the logits' gradient above 1e-6 lie in "
        f"{sparse['rows_kept']:.0%} of the rows and {sparse['columns_kept']:.1%} of the columns."
    )


def _statistics(rows: list[Row]) -> str:
    rows = [row for row in rows if row.get("variant") != "forward"]
    shapes = _shapes(rows, ("takes", "model", "dtype", "rows"), 4)
    error = ("error", lambda row: _first(row, ("gradient_error", "weight_gradient_error"), "{:.1e}"))
    titles = [f"{takes}, {model}, {dtype}, {tokens:,} tokens" for takes, model, dtype, tokens in shapes]
    return _folded(
        "token_stats and linear_token_stats beside what policy-gradient trainers use",
        _table(
            "Forward + backward of a policy-gradient loss with an entropy bonus: milliseconds (20th to 80th "
            "percentile), and the time over that of a copy of the logits, or of the three plain matmuls.",
            shapes,
            titles,
            lambda row: row["contender"],
            [error],
        ),
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
    lines = [_line(head), _line("---" for _ in head)]
    for row in steps:
        start = [f"{row['model']}, {row['dtype']}", row["contender"]]
        if "error" in row:
            lines.append(_line([*start, _plain(row["error"]), *("" for _ in head[3:])]))
            continue
        spread = f"{row['seconds']:.2f} ({row['p20']:.2f} to {row['p80']:.2f})"
        peak = f"{row.get('peak_bytes', row.get('extra_bytes', 0)) / 2**30:.2f}"
        cells = [*start, spread, *(f"{row['phases'][phase]:.2f}" for phase in phases), peak]
        found = largest.get((row["model"], row["contender"]))
        if largest:
            cells.append("" if found is None else f"{found['largest_batch']}{' or more' if found['or_more'] else ''}")
        lines.append(_line(cells))
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
    return "\n".join([text, "", *lines])


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
    lines = [_line(["", *columns]), _line("---" for _ in range(4))]
    for contender, times in found.items():
        cells = [
            _round(times[what, variant] * unit) if (what, variant) in times else ""
            for what, variant, unit in columns.values()
        ]
        lines.append(_line([contender, *cells]))
    shape = f"{rows[0]['rows']:,} x {rows[0]['vocab']:,} {rows[0]['dtype']} logits"
    return _folded(f"The host's time for a call on {shape}, and for the first of a process", "\n".join(lines))


def _targets(reached: list[Outcome]) -> str:
    lines = [_line(["target", "bound", "worst measured", ""]), _line("---" for _ in range(4))]
    for outcome in reached:
        unit = outcome.target.unit
        verdict = "reached" if outcome.met else "**behind**"
        worst = "failed" if math.isinf(outcome.worst) else f"{outcome.worst:.3g}{unit} of {outcome.count}"
        lines.append(_line([outcome.target.text, f"{outcome.target.bound:.3g}{unit}", worst, verdict]))
    return "\n".join(["**Targets**", "", *lines])


_TABLES: dict[str, Callable[[list[Row]], str]] = {
    "entropy_loss": _logits,
    "linear_entropy": _hidden,
    "training_step": _step,
    "token_stats": _statistics,
    "host_overhead": _host,
}


def _shapes(rows: list[Row], keys: tuple[str, ...], count: int) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of the first `count` configurations: a suite's first are those that say most."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if all(key in row for key in keys) and "contender" in row:
            found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return dict(list(found.items())[:count])


def _table(
    text: str,
    shapes: dict[tuple[Any, ...], list[Row]],
    titles: list[str],
    name: Callable[[Row], str],
    columns: list[tuple[str, Callable[[Row], str]]],
) -> str:
    """A line for each contender, two cells for each shape, and the columns of what its last measured shape says."""
    if not shapes:
        return ""
    contenders: dict[str, dict[int, Row]] = {}
    for i, rows in enumerate(shapes.values()):
        for row in rows:
            contenders.setdefault(name(row), {})[i] = row
    head = ["", *(cell for title in titles for cell in (title, "")), *(title for title, _ in columns)]
    lines = [text, "", _line(head), _line("---" for _ in head)]
    for contender, found in contenders.items():
        marked = {mark for row in found.values() for mark in _marks(row)}
        cells = [contender + "".join(mark for mark in _MARKS if mark in marked)]
        for i in range(len(shapes)):
            row = found.get(i)
            if row is None:
                cells += ["", ""]
            elif "error" in row:
                cells += [_plain(row["error"]), ""]
            else:
                over = f"{row['over_floor']:.2f}x" if "over_floor" in row else ""
                cells += [f"{_ms(row['seconds'])} ({_ms(row['p20'])} to {_ms(row['p80'])})", over]
        last = found[max(found)]
        lines.append(_line([*cells, *(value(last) for _, value in columns)]))
    return "\n".join(lines)


def _marks(row: Row) -> list[str]:
    found = {
        "\\*": row.get("computes") == "cross entropy",
        "†": bool(row.get("per_token")),
        "‡": row.get("device") == "cuda" and row.get("host_seconds", 0) > row.get("seconds", 0) > 0,
    }
    return [mark for mark, holds in found.items() if holds]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _folded(title: str, text: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{text}\n\n</details>" if text else ""


def _plain(text: str) -> str:
    return text.replace("|", " ")


def _first(row: Row, keys: tuple[str, ...], form: str) -> str:
    return next((form.format(row[key]) for key in keys if row.get(key) is not None), "")


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


def _ms(seconds: float) -> str:
    return _round(seconds * 1e3)


def _round(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def insert(text: str, kind: str, content: str) -> str:
    """`text` with `content` between the markers of `kind`."""
    start, end = f"<!-- benchmark:{kind} -->", f"<!-- /benchmark:{kind} -->"
    found = re.subn(
        f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{content}\n{end}", text, flags=re.DOTALL
    )
    if found[1] != 1:
        fail(f"the README has {found[1]} parts {start} ... {end}, expected one")
    return found[0]


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=_ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md", metavar="FILE")
    options = parser.parse_args()
    if not options.readme.is_file():
        fail(f"--readme is {options.readme}, expected a file")
    text, rows = options.readme.read_text(), read(options.results)
    runs = {kind: {suite: latest_run(rows, suite, device) for suite in SUITES} for kind, device in _DEVICES.items()}
    runs = {kind: suites for kind, suites in runs.items() if any(suites.values())}
    if not runs:
        fail(f"--results is {options.results}, which holds no rows of {', '.join(SUITES)}")
    for kind, suites in runs.items():
        for suite, found in suites.items():
            if found and (found[0]["machine"]["dirty"] or not found[0]["machine"]["commit"]):
                when = f"{suite} on the {kind}, of {found[0]['machine']['time']}"
                fail(f"the latest rows of {when}, are of no commit: commit all changes, measure again")
            if found and found[0].get("size") == "tiny":
                fail(f"the latest rows of {suite} on the {kind} are of size tiny, which measures nothing")
        surroundings = {
            tuple(found[0]["machine"].get(key) for key in ("name", "threads", "driver", "torch", "triton", "python"))
            for found in suites.values()
            if found
        }
        if len(surroundings) > 1:
            fail(f"the latest rows on the {kind} are of different machines or versions: {sorted(surroundings)}")
        text = insert(text, kind, report(suites, _DEVICES[kind], f"benchmarks/results/measured_{kind}.png"))
    for kind, suites in runs.items():
        plot(suites, options.results / f"measured_{kind}.png")
    options.readme.write_text(text)


if __name__ == "__main__":
    main()
