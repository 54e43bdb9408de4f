"""Write what README.md and docs/benchmarks.md say of the rows in benchmarks/results, and draw the pictures.

Of each suite, the latest run on the CPU and the latest on a GPU count. README.md gets the ranges over all measured
shapes as sentences, between the markers <!-- benchmark:ranges --> and <!-- /benchmark:ranges -->, and as a table,
between the markers of benchmark:summary. docs/benchmarks.md gets the tables in full, between those of benchmark:tables;
and between those of benchmark:machine-code, where there are rows of it, what benchmarks/machine_code.py read.
Rows of a checkout with uncommitted changes are refused, because nobody could check out what they measured.
"""

import argparse
import os
import re
import sys
import textwrap
from pathlib import Path
from typing import NoReturn

from full_tables import full_tables
from machine_code_tables import machine_code_tables
from options import SUITES
from plots import plot
from stored_rows import Row, latest_run, read
from summary import sentences, summary_table

_ROOT = Path(__file__).parents[1]
_DEVICES = {"cpu": "cpu", "gpu": "cuda"}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        print(f"report.py: {message}", file=sys.stderr)
        raise SystemExit(2)


def main() -> None:
    parser = Parser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--results", type=Path, default=_ROOT / "benchmarks" / "results", metavar="FOLDER")
    parser.add_argument("--readme", type=Path, default=_ROOT / "README.md", metavar="FILE")
    parser.add_argument("--docs", type=Path, default=_ROOT / "docs" / "benchmarks.md", metavar="FILE")
    options = parser.parse_args()
    for option, file in (("--readme", options.readme), ("--docs", options.docs)):
        if not file.is_file():
            parser.error(f"{option} is {file}, expected a file")
    try:
        runs = latest_runs(options.results)
        pictures = {kind: options.results / f"measured_{kind}.png" for kind in runs}
        parts = {
            "ranges": "\n".join(_filled(sentences(suites, _DEVICES[kind])) for kind, suites in runs.items()),
            "summary": "\n\n".join(summary_table(suites, _DEVICES[kind]) for kind, suites in runs.items()),
            "tables": "\n\n".join(
                full_tables(suites, _DEVICES[kind], os.path.relpath(pictures[kind], options.docs.parent))
                for kind, suites in runs.items()
            ),
        }
        readme = options.readme.read_text()
        for name in ("ranges", "summary"):
            readme = insert(readme, name, parts[name], options.readme)
        docs = insert(options.docs.read_text(), "tables", parts["tables"], options.docs)
        if machine_code := machine_code_tables(latest_machine_code(options.results)):
            docs = insert(docs, "machine-code", machine_code, options.docs)
    except ValueError as error:
        parser.error(str(error))
    for kind, suites in runs.items():
        plot(suites, pictures[kind])
    options.readme.write_text(readme)
    options.docs.write_text(docs)


def latest_runs(results: Path) -> dict[str, dict[str, list[Row]]]:
    """Return the rows by "cpu" or "gpu" and by suite; ValueError says which rows cannot be reported."""
    rows = read(results)
    runs = {kind: {suite: latest_run(rows, suite, device) for suite in SUITES} for kind, device in _DEVICES.items()}
    runs = {kind: suites for kind, suites in runs.items() if any(suites.values())}
    if not runs:
        raise ValueError(f"--results is {results}, which holds no rows of {', '.join(SUITES)}")
    for kind, suites in runs.items():
        for suite, found in suites.items():
            _refuse_without_commit(found, f"{suite} on the {kind}")
            if found and found[0].get("size") == "tiny":
                raise ValueError(f"the latest rows of {suite} on the {kind} are of size tiny, which measures nothing")
        surroundings = {
            tuple(found[0]["machine"].get(key) for key in ("name", "threads", "driver", "torch", "triton", "python"))
            for found in suites.values()
            if found
        }
        if len(surroundings) > 1:
            raise ValueError(
                f"the latest rows on the {kind} are of different machines or versions: {sorted(surroundings)}"
            )
    return runs


def latest_machine_code(results: Path) -> dict[str, list[Row]]:
    """Return the rows on machine code by what it was compiled for; ValueError says which cannot be reported."""
    rows = read(results)
    targets = sorted({row["device"] for row in rows if row.get("benchmark") == "machine_code"}, key=len)
    runs = {target: latest_run(rows, "machine_code", target) for target in targets}
    for target, found in runs.items():
        _refuse_without_commit(found, f"machine_code for {target}")
    return runs


def _refuse_without_commit(rows: list[Row], name: str) -> None:
    if rows and (rows[0]["machine"]["dirty"] or not rows[0]["machine"]["commit"]):
        when = f"{name}, of {rows[0]['machine']['time']}"
        raise ValueError(f"the latest rows of {when}, are of no commit: commit all changes, measure again")


def _filled(text: str) -> str:
    return textwrap.fill(text, 120, break_long_words=False, break_on_hyphens=False)


def insert(text: str, name: str, content: str, file: Path) -> str:
    """Return `text` with `content` between the markers of `name`; ValueError unless `text` has them exactly once."""
    start, end = f"<!-- benchmark:{name} -->", f"<!-- /benchmark:{name} -->"
    inserted, count = re.subn(
        f"{re.escape(start)}.*?{re.escape(end)}", lambda _: f"{start}\n{content}\n{end}", text, flags=re.DOTALL
    )
    if count != 1:
        raise ValueError(f"{file.name} has {count} parts {start} ... {end}, expected one")
    return inserted


if __name__ == "__main__":
    main()
