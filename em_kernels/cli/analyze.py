"""em-kernels analyze: what runs, models and graded completions say beyond a loss and an accuracy."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.cli.shared import import_quietly, print_note
from em_kernels.one_shot.errors import UsageError


def add_parser(commands: Any) -> None:
    analyze = commands.add_parser("analyze", help="look into runs, models and graded completions")
    kinds = analyze.add_subparsers(dest="kind", required=True, metavar="KIND")

    steps = kinds.add_parser("steps", help="runs by step: loss, entropy, accuracy, lengths, and where accuracy peaked")
    steps.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that train has written")
    _add_output(steps, "steps")
    steps.set_defaults(run=_steps)

    logits = kinds.add_parser("logits", help="mean, deviation and skewness of the raw logits of models")
    tokens = kinds.add_parser("tokens", help="which tokens carry the entropy of models")
    for parser, name in ((logits, "logits"), (tokens, "tokens")):
        _add_models(parser)
        _add_output(parser, name)
        parser.set_defaults(run=_models)

    calibration = kinds.add_parser("calibration", help="how reliable votes and log-probabilities are")
    calibration.add_argument("files", nargs="+", type=Path, metavar="FILE", help="completions.jsonl of evaluate")
    _add_output(calibration, "calibration")
    calibration.set_defaults(run=_calibration)


def _add_models(parser: Any) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name or folder of a model, or built-in")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", action="append", metavar="TEXT", help="what the models complete; may be repeated")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="rows with a question, or a text (.txt)")
    what.add_argument("--task", type=Path, metavar="FILE", help="problems, of which the questions are taken")
    parser.add_argument("--limit", type=int, default=20, metavar="N", help="prompts that are taken from a file (20)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="longest completion (256)")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="X", help="0: the most likely token (1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")


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


def _models(
    kind: str,
    models: Sequence[str],
    prompt: Sequence[str] | None,
    prompt_file: Path | None,
    task: Path | None,
    limit: int,
    max_new_tokens: int,
    temperature: float,
    seed: int,
    output: Path,
) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis import logits, tokens
    from em_kernels.one_shot.analysis.generated import load_policy
    from em_kernels.one_shot.policy.sampling import Sampling
    from em_kernels.one_shot.runs.files import write_text
    from em_kernels.one_shot.runs.versions import versions

    analysis: Any = {"logits": logits, "tokens": tokens}[kind]
    prompts, source = _prompts(prompt, prompt_file or task, limit)
    sampling = Sampling(temperature or None, max_new_tokens)
    measured = {
        name: analysis.measure(load_policy(name), prompts, sampling, seed=seed, description=name)
        for name in dict.fromkeys(models)
    }
    settings = {"prompts": source, "temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed}
    rows = [
        {"model": name, **analysis.figures(of), **settings, "versions": versions()} for name, of in measured.items()
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / f"{kind}.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    analysis.draw(output / f"{kind}.png", measured)
    text = ", ".join(f"{name} {value}" for name, value in {**settings, **versions()}.items())
    _finish(output, kind, [*analysis.describe(measured), "", f"Settings: {text.replace('_', ' ')}."])


def _calibration(kind: str, files: Sequence[Path], output: Path) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis.calibration_page import (
        calibrate,
        calibration_lines,
        describe_calibration,
        draw_calibration,
    )
    from em_kernels.one_shot.evaluation.grading import Grader
    from em_kernels.one_shot.runs.files import write_text

    with Grader() as grader:
        cells = calibrate(files, grader.same)
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "calibration.jsonl", calibration_lines(cells))
    draw_calibration(output / "calibration.png", cells)
    _finish(output, "calibration", describe_calibration(cells))


def _prompts(prompt: Sequence[str] | None, path: Path | None, limit: int) -> tuple[list[str], str]:
    """The prompts, and where they are from."""
    from em_kernels.one_shot.data.built_in import make_problems
    from em_kernels.one_shot.data.prompts import read_prompts

    if limit < 1:
        raise UsageError(f"limit is {limit}, expected an integer of at least 1")
    if prompt:
        return list(prompt), "given"
    if path is not None:
        prompts = read_prompts(path, note=print_note)[:limit]
        return prompts, f"{len(prompts)} of {path}"
    return [problem.question for problem in make_problems(limit, seed=0)], f"{limit} of the project's own problems"


def _finish(output: Path, name: str, lines: Sequence[str]) -> None:
    """Prints the table, writes it beside the picture, and says where they are."""
    from em_kernels.one_shot.runs.files import write_text

    text = "\n".join(lines).rstrip() + "\n"
    write_text(output / f"{name}.md", text)
    print(text)
    print(f"Table:   {output / name}.md\nPicture: {output / name}.png")
