"""em-kernels analyze: what runs, models and graded completions say beyond a loss and an accuracy."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from em_kernels.cli.chat import add_chat_options, chat_format
from em_kernels.cli.measuring import positive, temperature
from em_kernels.cli.shared import import_quietly, print_note
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.json_lines import json_line


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
    parser.add_argument("--resume", action="store_true", help="measure only the models that the folder lacks")
    add_chat_options(parser)


def _add_output(parser: Any, name: str) -> None:
    default = Path("analysis", name)
    parser.add_argument(
        "--output", type=Path, default=default, metavar="FOLDER", help=f"where the table and the picture go ({default})"
    )


def _steps(kind: str, runs: Sequence[Path], output: Path) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis.accuracies import BUILT_IN_NOTE
    from em_kernels.one_shot.analysis.runs import read_runs
    from em_kernels.one_shot.analysis.settings import settings_lines
    from em_kernels.one_shot.analysis.steps import describe_steps, draw_steps, step_rows
    from em_kernels.one_shot.runs.files import write_text

    read = read_runs(runs)
    output.mkdir(parents=True, exist_ok=True)
    draw_steps(output / "steps.png", read)
    write_text(output / "steps.jsonl", "".join(json_line(row) for run in read for row in step_rows(run)))
    lines = [line for run in read for line in (*describe_steps(run), "")]
    lines += ["## Settings", "", *settings_lines({run.name: run.made for run in read}), ""]
    if any(run.config.get("model") is None for run in read):
        lines.append(BUILT_IN_NOTE)
    _finish(output, "steps", lines)


def _models(kind: str, models: Sequence[str], output: Path, resume: bool, **options: Any) -> None:
    import_quietly()
    from em_kernels.one_shot.analysis import logits, tokens
    from em_kernels.one_shot.analysis.accuracies import BUILT_IN_NOTE
    from em_kernels.one_shot.analysis.generated import load_policy
    from em_kernels.one_shot.analysis.settings import settings_lines
    from em_kernels.one_shot.evaluation.models import find_models
    from em_kernels.one_shot.policy.sampling import Sampling
    from em_kernels.one_shot.runs.files import write_text
    from em_kernels.one_shot.runs.surroundings import surroundings

    analysis: Any = {"logits": logits, "tokens": tokens}[kind]
    of_kind: Any = {"logits": logits.LogitMoments, "tokens": tokens.TokenEntropies}[kind]
    chat = chat_format(options["system"], options["chat_template"], options["stop"])
    prompts, source = _prompts(options["prompt"], options["prompt_file"], options["task"], options["limit"])
    sampling = Sampling(options["temperature"] or None, options["max_new_tokens"])
    chosen = {name: options[name] for name in ("temperature", "max_new_tokens", "seed")}
    settings = {"prompts": source, **chosen, **dataclasses.asdict(chat)}
    measured = {}
    named = find_models(models)
    for number, model in enumerate(named, start=1):
        # What decides the result of the model, for --resume to tell it from that of other settings.
        by = json.loads(json.dumps({**settings, "model": model.source, "weights": model.weights, "texts": prompts}))
        kept = output / "measured" / f"{number}.json"
        values = _read_kept(kept, by) if resume else None
        if values is None:
            policy = load_policy(model.source, chat)
            made = analysis.measure(policy, prompts, sampling, seed=options["seed"], description=model.name)
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_text(kept, json.dumps({"by": by, "measured": made.to_json()}) + "\n")
        else:
            made = of_kind.from_json(values)
        measured[model.name] = made
    made_by = {"models": {model.name: model.source for model in named}, **settings}
    config = {"settings": made_by, **surroundings()}
    write_text(output / "config.json", json.dumps(config, indent=2, ensure_ascii=False) + "\n")
    rows = [{"model": name, **analysis.figures(of)} for name, of in measured.items()]
    write_text(output / f"{kind}.jsonl", "".join(json_line(row) for row in rows))
    analysis.draw(output / f"{kind}.png", measured)
    about = ["", BUILT_IN_NOTE] if any(model.source is None for model in named) else []
    _finish(output, kind, [*analysis.describe(measured), "", *settings_lines({"": config}), *about])


def _read_kept(path: Path, by: dict[str, Any]) -> Any:
    """What was measured of a model by these settings, or None."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return values["measured"] if values["by"] == by else None
    except (FileNotFoundError, KeyError, TypeError, ValueError):
        return None


def _prompts(prompt: Sequence[str] | None, prompt_file: Path | None, task: str, limit: int) -> tuple[list[str], str]:
    """The prompts, and where they are from."""
    from em_kernels.one_shot.data.prompts import read_prompts
    from em_kernels.one_shot.evaluation.tasks import read_tasks

    if prompt:
        if not all(text.strip() for text in prompt):
            raise UsageError("a prompt is empty, expected a text")
        return list(prompt), "given"
    if prompt_file is not None:
        prompts = read_prompts(prompt_file, note=print_note)[:limit]
    else:
        (read,) = read_tasks([task], limit=limit, note=print_note, with_answers=False)
        prompts = [problem.question for problem in read.problems]
    return prompts, f"{len(prompts)} of {prompt_file or task}"


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
    _finish(output, "calibration", describe_calibration(cells, files))


def _finish(output: Path, name: str, lines: Sequence[str]) -> None:
    """Prints the table, writes it beside the picture, and says where they are."""
    from em_kernels.one_shot.runs.files import write_text

    text = "\n".join(lines).rstrip() + "\n"
    write_text(output / f"{name}.md", text)
    print(text)
    print(f"Table:   {output / name}.md\nNumbers: {output / name}.jsonl\nPicture: {output / name}.png")
