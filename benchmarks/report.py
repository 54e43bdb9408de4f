"""Writes the tables and plots of README.md from the rows in benchmarks/results.

For the CPU and the GPU each, the latest run of entropy_loss.py goes between <!-- benchmark:cpu --> and
<!-- /benchmark:cpu --> (or gpu), and into benchmarks/results/entropy_loss_cpu.png; that of linear_entropy.py between
<!-- benchmark:linear-cpu --> and its end, and into linear_entropy_cpu.png. Rows of a checkout with uncommitted changes
are refused: nobody could check out what they measured.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any, NoReturn

from matplotlib.figure import Figure

_ROOT = Path(__file__).parents[1]
_KINDS = {"cpu": "cpu", "gpu": "cuda"}
_VARIANTS = ("copy", "forward+backward", "inplace_backward", "masked 0.5", "masked 0.9")

Row = dict[str, Any]


def fail(message: str) -> NoReturn:
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(2)


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        fail(message)


def latest_run(results: Path, benchmark: str, device: str) -> list[Row]:
    """The rows of the run of a benchmark on `device` that started last; empty if there was none."""
    rows = []
    for file in sorted(results.glob("*.jsonl")):
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                row = json.loads(text)
            except json.JSONDecodeError:
                fail(f"{file}, line {number}: not a JSON row")
            if row.get("benchmark") == benchmark and row.get("device") == device:
                rows.append(row)
    latest = max((row["machine"]["time"] for row in rows), default=None)
    return [row for row in rows if row["machine"]["time"] == latest]


def shown(rows: list[Row]) -> dict[tuple[str, int, int], list[Row]]:
    """By dtype, tokens and vocabulary, the rows that the README shows: peaked logits, more than a few tokens."""
    tables: dict[tuple[str, int, int], list[Row]] = {}
    for row in rows:
        if row["logits"] == "peaked" and row.get("variant") in _VARIANTS:
            tables.setdefault((row["dtype"], row["rows"], row["vocab"]), []).append(row)
    most = max((tokens * vocab for _, tokens, vocab in tables), default=0)
    return {key: table for key, table in tables.items() if key[1] * key[2] * 10 >= most}


def table(rows: list[Row]) -> str:
    where = rows[0]["machine"]
    lines = [
        "Forward + backward of the mean, milliseconds (20th to 80th percentile); memory beyond the logits, the "
        "gradient included; error of the gradient against float64, over the row's largest entry.",
        "",
        "| logits | | ms | speed over eager | time over a copy | MiB | error |",
        "|---|---|---|---|---|---|---|",
    ]
    for (dtype, tokens, vocab), members in shown(rows).items():
        eager = [row for row in members if row["contender"] == "eager" and "seconds" in row]
        for row in members:
            name = f"{row['contender']}, {row['variant']}" if row["variant"] not in _VARIANTS[:2] else row["contender"]
            start = f"| {dtype} {tokens} x {vocab} | {name} |"
            if "error" in row:
                lines.append(f"{start} {row['error'].replace('|', ' ')} | | | | |")
                continue
            faster = f"{eager[0]['seconds'] / row['seconds']:.2f}x" if eager else ""
            copy = f"{row['over_copy']:.2f}x" if "over_copy" in row else ""
            memory = f"{row['extra_bytes'] / 2**20:.0f}" if "extra_bytes" in row else ""
            error = "" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
            lines.append(
                f"{start} {_ms(row['seconds'])} ({_ms(row['p20'])} to {_ms(row['p80'])}) "
                f"| {faster} | {copy} | {memory} | {error} |"
            )
    cross_entropy = "`cross_entropy` computes less and is there as the loss whose cost is known."
    return "\n".join([*lines, "", f"{_origin(where, 'entropy_loss.py')} {cross_entropy}"])


def linear_table(rows: list[Row]) -> str:
    where = rows[0]["machine"]
    lines = [
        "Forward + backward of the mean at temperature 0.5, milliseconds (20th to 80th percentile); error of the "
        "weight's gradient against float64, its norm over that of the gradient.",
        "",
        "| operands | | ms | speed over eager | time over three matmuls | error |",
        "|---|---|---|---|---|---|",
    ]
    timed = [row for row in rows if "seconds" in row or "error" in row]
    for row in timed:
        start = f"| {row['model']}, {row['dtype']}, {row['rows']} tokens | {row.get('contender', '')} |"
        if "error" in row:
            lines.append(f"{start} {row['error'].replace('|', ' ')} | | | |")
            continue
        same = [r for r in timed if (r["model"], r["dtype"], r["rows"]) == (row["model"], row["dtype"], row["rows"])]
        eager = [r for r in same if r.get("contender") == "eager" and "seconds" in r]
        faster = f"{eager[0]['seconds'] / row['seconds']:.2f}x" if eager else ""
        matmuls = f"{row['over_matmuls']:.2f}x" if "over_matmuls" in row else ""
        error = f"{row['weight_gradient_error']:.1e}" if "weight_gradient_error" in row else ""
        lines.append(
            f"{start} {_ms(row['seconds'])} ({_ms(row['p20'])} to {_ms(row['p80'])}) | {faster} | {matmuls} | {error} |"
        )
    sparsity = next((row for row in timed if "columns_kept" in row), None)
    if sparsity is not None:
        lines += [
            "",
            f"In 512 of these tokens, entries of the logits' gradient above 1e-6 lie in "
            f"{sparsity['rows_kept']:.0%} of the rows and {sparsity['columns_kept']:.1%} of the columns.",
        ]
    return "\n".join([*lines, "", _origin(where, "linear_entropy.py")])


def _origin(where: dict[str, Any], script: str) -> str:
    software = [f"{name} {where[name]}" for name in ("driver", "torch", "triton", "python") if where[name]]
    return (
        f"{where['name']}, {where['threads']} threads, {', '.join(software)}, commit {where['commit'][:10]}, "
        f"{where['time'][:10]}: `python benchmarks/{script} --out benchmarks/results`, then "
        "`python benchmarks/report.py`."
    )


def _ms(seconds: float) -> str:
    milliseconds = seconds * 1e3
    return f"{milliseconds:.0f}" if milliseconds >= 100 else f"{milliseconds:.3g}"


def insert(text: str, kind: str, content: str) -> str:
    """`text` with `content` between the markers of `kind`."""
    start, end = f"<!-- benchmark:{kind} -->", f"<!-- /benchmark:{kind} -->"
    found = re.subn(
        f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{content}\n{end}", text, flags=re.DOTALL
    )
    if found[1] != 1:
        fail(f"the README has {found[1]} parts {start} ... {end}, expected one")
    return found[0]


def plot(rows: list[Row], file: Path) -> None:
    tables = {
        key: [row for row in members if "seconds" in row and row["variant"] in _VARIANTS[:3]]
        for key, members in shown(rows).items()
    }
    figure = Figure(
        figsize=(7, 0.6 + 0.28 * sum(len(members) + 1 for members in tables.values())), layout="constrained"
    )
    heights = [len(members) + 1 for members in tables.values()]
    panels = figure.subplots(len(tables), 1, squeeze=False, height_ratios=heights)[:, 0]
    for axes, ((dtype, tokens, vocab), members) in zip(panels, tables.items(), strict=True):
        members = sorted(members, key=lambda row: -row["seconds"])
        names = [row["contender"] + (", in place" if row["variant"] == "inplace_backward" else "") for row in members]
        colors = ["#1f77b4" if row["contender"].startswith("ours") else "#b0b0b0" for row in members]
        milliseconds = [row["seconds"] * 1e3 for row in members]
        spread = [
            [(row["seconds"] - row["p20"]) * 1e3 for row in members],
            [(row["p80"] - row["seconds"]) * 1e3 for row in members],
        ]
        axes.barh(names, milliseconds, color=colors, xerr=spread, error_kw={"elinewidth": 0.8})
        axes.set_title(f"{tokens} x {vocab} {dtype}, forward + backward", fontsize=9)
        axes.tick_params(labelsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[-1].set_xlabel("ms", fontsize=8)
    figure.savefig(file, dpi=120)


def plot_linear(rows: list[Row], file: Path) -> None:
    """Memory by tokens."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    axes = figure.subplots()
    measured = [row for row in rows if "extra_bytes" in row]
    # Of the operands that were measured at the most numbers of tokens.
    series: dict[tuple[int, int], set[int]] = {}
    for row in measured:
        series.setdefault((row["dim"], row["vocab"]), set()).add(row["rows"])
    shape = max(series, key=lambda key: len(series[key]), default=None)
    measured = [row for row in measured if (row["dim"], row["vocab"]) == shape]
    for contender, color in (("eager", "#b0b0b0"), ("entropy_loss on logits", "#7fb2d9"), ("ours", "#1f77b4")):
        points = sorted((row["rows"], row["extra_bytes"] / 2**30) for row in measured if row["contender"] == contender)
        if points:
            label = "linear_entropy_loss" if contender == "ours" else contender
            axes.plot(*zip(*points, strict=True), marker="o", color=color, label=label)
    axes.set_xlabel("tokens", fontsize=8)
    axes.set_ylabel("GiB beyond the operands, gradients included", fontsize=8)
    if measured:
        axes.set_title(
            f"hidden {measured[0]['dim']}, vocabulary {measured[0]['vocab']}, {measured[0]['dtype']}", fontsize=9
        )
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.legend(fontsize=8, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(file, dpi=120)


# By the marker in the README: which run, and what is made of it.
_PARTS = {
    **{kind: ("entropy_loss", device, table, plot) for kind, device in _KINDS.items()},
    **{f"linear-{kind}": ("linear_entropy", device, linear_table, plot_linear) for kind, device in _KINDS.items()},
}


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=_ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md", metavar="FILE")
    options = parser.parse_args()
    if not options.readme.is_file():
        fail(f"--readme is {options.readme}, expected a file")
    text = options.readme.read_text()
    runs = {part: latest_run(options.results, benchmark, device) for part, (benchmark, device, *_) in _PARTS.items()}
    runs = {part: rows for part, rows in runs.items() if rows}
    if not runs:
        fail(f"--results is {options.results}, which holds no rows of entropy_loss.py or linear_entropy.py")
    for part, rows in runs.items():
        where = rows[0]["machine"]
        if where["dirty"] or not where["commit"]:
            fail(f"the latest {part} rows, of {where['time']}, are of no commit: commit all changes, measure again")
        text = insert(text, part, _PARTS[part][2](rows))
    for part, rows in runs.items():
        benchmark, *_, draw = _PARTS[part]
        draw(rows, options.results / f"{benchmark}_{part.removeprefix('linear-')}.png")
    options.readme.write_text(text)


if __name__ == "__main__":
    main()
