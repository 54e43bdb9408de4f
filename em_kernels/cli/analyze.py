"""em-kernels analyze: what runs, models and graded completions say beyond a loss and an accuracy."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from em_kernels.cli.chat import add_chat_options, chat_format
from em_kernels.cli.measuring import positive, temperature
from em_kernels.cli.shared import import_quietly, print_note
from em_kernels.one_shot.config import DTYPES
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.json_lines import json_line

if TYPE_CHECKING:
    from em_kernels.one_shot.evaluation.models import NamedModel
    from em_kernels.one_shot.policy.chat import ChatFormat

# The folder of what was measured, a file for each model.
_MEASURED = "measured"


def add_parser(commands: Any) -> None:
    analyze = commands.add_parser("analyze", help="look into runs, models and graded completions")
    kinds = analyze.add_subparsers(dest="kind", required=True, metavar="KIND")

    steps = kinds.add_parser("steps", help="runs by step: loss, entropy, accuracy, lengths, and where accuracy peaked")
    steps.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="folder that train has written")
    _add_output(steps)
    steps.set_defaults(run=_steps)

    logits = kinds.add_parser("logits", help="mean, deviation and skewness of the raw logits of models")
    tokens = kinds.add_parser("tokens", help="which tokens carry the entropy of models")
    for parser in (logits, tokens):
        _add_models(parser)
        parser.set_defaults(run=_models)

    calibration = kinds.add_parser("calibration", help="how reliable votes and log-probabilities are")
    calibration.add_argument("files", nargs="+", type=Path, metavar="FILE", help="completions.jsonl of evaluate")
    _add_output(calibration)
    calibration.set_defaults(run=_calibration)


def _add_models(parser: Any) -> None:
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name, folder, run folder, or built-in")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--prompt", action="append", metavar="TEXT", help="what the models complete; may be repeated")
    what.add_argument("--prompt-file", type=Path, metavar="FILE", help="rows with a question, or a text (.txt)")
    what.add_argument(
        "--task", default="built-in", metavar="FILE", help="problems whose questions are taken, or built-in (built-in)"
    )
    parser.add_argument("--limit", type=positive, default=20, metavar="N", help="prompts taken from a file (20)")
    parser.add_argument("--max-new-tokens", type=positive, default=256, metavar="N", help="longest completion (256)")
    parser.add_argument(
        "--temperature", type=temperature, default=1.0, metavar="X", help="0: the most likely token (1)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of sampling (0)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="what the model computes in (float32)")
    parser.add_argument("--trust-remote-code", action="store_true", help="let the model's repository run its own code")
    _add_output(parser)
    parser.add_argument("--resume", action="store_true", help="measure only the models that the folder lacks")
    parser.add_argument("--quiet", action="store_true", help="no progress on standard error")
    add_chat_options(parser)


def _add_output(parser: Any) -> None:
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="folder for what is written (a new one in runs/)")


def _steps(kind: str, runs: Sequence[Path], output: Path | None) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis.built_in import built_in_lines
    from em_kernels.one_shot.analysis.runs import read_runs
    from em_kernels.one_shot.analysis.settings import settings_lines
    from em_kernels.one_shot.analysis.steps import UNITS, describe_steps, draw_steps, step_rows
    from em_kernels.one_shot.files import write_text
    from em_kernels.one_shot.runs.figures import save_figure
    from em_kernels.one_shot.runs.folder import page_folder

    folder = page_folder(output, kind)
    read = read_runs(runs)
    folder.mkdir(parents=True, exist_ok=True)
    save_figure(draw_steps(read), folder / "steps.png")
    write_text(folder / "steps.jsonl", "".join(json_line(row) for run in read for row in step_rows(run)))
    lines = [line for run in read for line in (*describe_steps(run), "")]
    lines += [UNITS, ""]
    lines += [line for note in built_in_lines(run.made for run in read) for line in (note, "")]
    lines += ["## Settings", "", *settings_lines({run.name: run.made for run in read}), ""]
    _finish(folder, kind, lines)


def _models(kind: str, models: Sequence[str], output: Path | None, resume: bool, **options: Any) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis import logits, tokens
    from em_kernels.one_shot.analysis.built_in import built_in_lines
    from em_kernels.one_shot.analysis.settings import settings_lines
    from em_kernels.one_shot.evaluation.folder import output_folder
    from em_kernels.one_shot.evaluation.models import find_models
    from em_kernels.one_shot.files import write_text
    from em_kernels.one_shot.progress import be_quiet
    from em_kernels.one_shot.runs.figures import save_figure
    from em_kernels.one_shot.runs.folder import default_run_folder
    from em_kernels.one_shot.runs.surroundings import surroundings

    if options["quiet"]:
        be_quiet()
    analysis: Any = {"logits": logits, "tokens": tokens}[kind]
    of_kind: Any = {"logits": logits.LogitMoments, "tokens": tokens.TokenEntropies}[kind]
    chat = chat_format(options["system"], options["chat_template"], options["stop"])
    prompts, source = _prompts(options["prompt"], options["prompt_file"], options["task"], options["limit"])
    named = find_models(models)
    settings = {
        "analysis": kind,
        "models": {model.name: model.source for model in named},
        "weights": {model.name: model.weights for model in named},
        "prompts": source,
        **{name: options[name] for name in ("temperature", "max_new_tokens", "seed", "dtype")},
        **dataclasses.asdict(chat),
    }
    folder = output or default_run_folder(kind, resume=resume)
    with output_folder(folder, settings, surroundings(), resume=resume, kept=_MEASURED) as config:
        measure = functools.partial(_measure, analysis, chat=chat, prompts=prompts, options=options)
        found = _measured(folder / _MEASURED, named, measure, options["trust_remote_code"])
        measured = {name: of_kind.from_json(values) for name, values in found.items()}
        rows = [{"model": name, **analysis.figures(of)} for name, of in measured.items()]
        write_text(folder / f"{kind}.jsonl", "".join(json_line(row) for row in rows))
        save_figure(analysis.draw(measured), folder / f"{kind}.png")
        about = [line for note in built_in_lines([config]) for line in ("", note)]
        _finish(
            folder, kind, [*analysis.describe(measured), *about, "", "## Settings", "", *settings_lines({"": config})]
        )


def _measured(
    folder: Path, models: "Sequence[NamedModel]", measure: "Callable[[NamedModel], Any]", trust_remote_code: bool
) -> dict[str, Any]:
    """What was measured of each model, by its name; a file each in the folder, in which some may be."""
    from em_kernels.one_shot.evaluation.engines.in_process import check_model
    from em_kernels.one_shot.files import write_text

    kept = {model: folder / f"{number}.json" for number, model in enumerate(models, start=1)}
    missing = [model for model, path in kept.items() if not path.exists()]
    # A mistake in a later model's name would be seen when the first is measured.
    for model in missing[1:]:
        if model.source is not None:
            check_model(model.source, trust_remote_code=trust_remote_code)
    for model in missing:
        text = json.dumps(measure(model).to_json()) + "\n"
        folder.mkdir(exist_ok=True)
        write_text(kept[model], text)
    return {model.name: json.loads(path.read_text(encoding="utf-8")) for model, path in kept.items()}


def _measure(
    analysis: Any, model: "NamedModel", *, chat: "ChatFormat", prompts: Sequence[str], options: dict[str, Any]
) -> Any:
    from em_kernels.one_shot.evaluation.engines.in_process import load_policy
    from em_kernels.one_shot.policy.sampling import Sampling

    policy = load_policy(
        model.source, chat=chat, dtype=options["dtype"], trust_remote_code=options["trust_remote_code"]
    )
    sampling = Sampling(options["temperature"] or None, options["max_new_tokens"])
    return analysis.measure(policy, prompts, sampling, seed=options["seed"], description=model.name)


def _prompts(prompt: Sequence[str] | None, prompt_file: Path | None, task: str, limit: int) -> tuple[list[str], Any]:
    """The prompts, and what the settings say of them: themselves if they were given, otherwise where they are from."""
    from em_kernels.one_shot.data.prompts import read_prompts
    from em_kernels.one_shot.evaluation.tasks import read_tasks

    if prompt:
        if not all(text.strip() for text in prompt):
            raise UsageError("a prompt is empty, expected a text")
        return list(prompt), list(prompt)
    if prompt_file is not None:
        prompts = read_prompts(prompt_file, note=print_note)[:limit]
    else:
        (read,) = read_tasks([task], limit=limit, note=print_note, with_answers=False)
        prompts = [problem.question for problem in read.problems]
    digest = hashlib.sha256(repr(prompts).encode("utf-8", "surrogatepass")).hexdigest()
    return prompts, f"{len(prompts)} of {prompt_file or task}, SHA-256 {digest[:16]}"


def _calibration(kind: str, files: Sequence[Path], output: Path | None) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis.calibration_page import (
        calibrate,
        calibration_lines,
        describe_calibration,
        draw_calibration,
    )
    from em_kernels.one_shot.evaluation.grading import Grader
    from em_kernels.one_shot.files import write_text
    from em_kernels.one_shot.runs.figures import save_figure
    from em_kernels.one_shot.runs.folder import page_folder

    folder = page_folder(output, kind)
    with Grader() as grader:
        cells = calibrate(files, grader.same)
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "calibration.jsonl", calibration_lines(cells))
    save_figure(draw_calibration(cells), folder / "calibration.png")
    _finish(folder, kind, describe_calibration(cells, files))


def _finish(output: Path, name: str, lines: Sequence[str]) -> None:
    """Prints the table, writes it beside the picture, and says where they are."""
    from em_kernels.one_shot.files import write_text

    text = "\n".join(lines).rstrip() + "\n"
    write_text(output / f"{name}.md", text)
    print(text)
    print(f"Table:   {output / name}.md\nNumbers: {output / name}.jsonl\nPicture: {output / name}.png")
