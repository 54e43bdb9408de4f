"""em-kernels analyze: what runs, models and graded completions say beyond a loss and an accuracy."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.cli.shared import import_quietly


def add_parser(commands: Any) -> None:
    analyze = commands.add_parser("analyze", help="look into runs, models and graded completions")
    kinds = analyze.add_subparsers(dest="kind", required=True, metavar="KIND")

    steps = kinds.add_parser("steps", help="runs by step: loss, entropy, accuracy, lengths, and where accuracy peaked")
    steps.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that train has written")
    _add_output(steps, "steps")
    steps.set_defaults(run=_steps)


def _add_output(parser: Any, name: str) -> None:
    default = Path("analysis", name)
    parser.add_argument(
        "--output", type=Path, default=default, metavar="FOLDER", help=f"where the table and the picture go ({default})"
    )


def _steps(kind: str, runs: Sequence[Path], output: Path) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis.runs import read_run
    from em_kernels.one_shot.analysis.steps import describe_steps, draw_steps

    read = [read_run(path) for path in runs]
    output.mkdir(parents=True, exist_ok=True)
    draw_steps(output / "steps.png", read)
    _finish(output, "steps", [line for run in read for line in (*describe_steps(run), "")])


def _finish(output: Path, name: str, lines: Sequence[str]) -> None:
    """Prints the table, writes it beside the picture, and says where they are."""
    from em_kernels.one_shot.runs.files import write_text

    text = "\n".join(lines).rstrip() + "\n"
    write_text(output / f"{name}.md", text)
    print(text)
    print(f"Table:   {output / name}.md\nPicture: {output / name}.png")
