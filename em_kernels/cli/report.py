"""em-kernels report: one page about several runs."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.cli.shared import import_quietly


def add_parser(commands: Any) -> None:
    report = commands.add_parser(
        "report",
        help="write one page about several runs",
        description="Write report.md, its numbers and its pictures: settings, curves with bands over seeds, lengths, "
        "accuracies with errors, and the published figures. Runs that differ in nothing but the seed are a group.",
    )
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that train has written")
    report.add_argument("--output", type=Path, metavar="FOLDER", help="folder for what is written (a new one in runs/)")
    report.set_defaults(run=_report)


def _report(runs: Sequence[Path], output: Path | None) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis.groups import named_groups
    from em_kernels.one_shot.analysis.report import write_page
    from em_kernels.one_shot.analysis.report_pictures import draw_accuracy, draw_curves
    from em_kernels.one_shot.analysis.report_rows import report_rows
    from em_kernels.one_shot.analysis.runs import read_runs
    from em_kernels.one_shot.files import write_text
    from em_kernels.one_shot.json_lines import json_line
    from em_kernels.one_shot.runs.figures import save_figure
    from em_kernels.one_shot.runs.folder import page_folder

    folder = page_folder(output, "report")
    groups = named_groups(read_runs(runs))
    page = write_page(groups)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(draw_curves(groups), folder / "curves.png")
    if any(run.evaluations for group in groups for run in group.runs):
        save_figure(draw_accuracy(groups), folder / "accuracy.png")
    write_text(folder / "report.jsonl", "".join(json_line(row) for row in report_rows(groups)))
    write_text(folder / "report.md", page)
    print(f"Report:  {folder / 'report.md'}\nNumbers: {folder / 'report.jsonl'}")
