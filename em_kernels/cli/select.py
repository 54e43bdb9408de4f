"""em-kernels select: the training prompt on which a model's success varies most."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from em_kernels.cli.measuring import add_measuring_options, plan_measurement, positive, temperature
from em_kernels.cli.shared import print_note
from em_kernels.one_shot.data.fields import NoAnswerError
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.json_lines import json_line

if TYPE_CHECKING:
    from em_kernels.one_shot.data.selection import Candidate


def add_parser(commands: Any) -> None:
    select = commands.add_parser(
        "select",
        help="choose a training prompt from problems",
        description="Draw completions of each problem of a pool, and rank the problems by how much success varies. The "
        "first ones are written to a prompt file for train.",
    )
    select.set_defaults(run=_select)
    select.add_argument(
        "pool",
        nargs="+",
        metavar="POOL",
        help="problems (.jsonl, .json, .csv, .parquet), hub:NAME[[:CONFIG]:SPLIT], or built-in",
    )
    select.add_argument(
        "--by",
        choices=("variance", "agreement"),
        default="variance",
        help="variance of being right, or of agreeing with the majority, which needs no answers (variance)",
    )
    select.add_argument("--temperature", type=temperature, default=0.5, metavar="X", help="of sampling (0.5)")
    select.add_argument("--count", type=positive, default=1, metavar="M", help="problems in the prompt file (1)")
    add_measuring_options(select, samples=8)


def _select(pool: Sequence[str], by: str, temperature: float, count: int, **options: Any) -> None:
    if options["samples"] < 2 or not temperature:
        raise UsageError(
            f"samples is {options['samples']} and temperature {temperature:g}, expected at least 2 and above 0: "
            "completions that cannot differ have no variance"
        )
    if len(options["model"] or ()) > 1:
        raise UsageError(f"{len(options['model'])} models are given, expected one to choose a prompt for")
    from em_kernels.one_shot.evaluation.tasks import read_tasks

    try:
        tasks = read_tasks(pool, limit=options["limit"], note=print_note, with_answers=by == "variance")
    except NoAnswerError as error:
        raise UsageError(f"{error}; --by agreement needs no answers") from None
    measurement = plan_measurement("select", tasks, [temperature], (), options)

    from em_kernels.one_shot.analysis.selection import describe_selection, draw_selection
    from em_kernels.one_shot.data.selection import ranked
    from em_kernels.one_shot.evaluation.candidates import candidates
    from em_kernels.one_shot.evaluation.gold import gold_notes
    from em_kernels.one_shot.evaluation.grading import Grader
    from em_kernels.one_shot.files import write_text
    from em_kernels.one_shot.runs.figures import save_figure

    folder = measurement.folder
    for line in gold_notes(tasks) if by == "variance" else ():
        print_note(line)
    with measurement.drawn() as (records, config):
        if not any(record.completion.strip() for record in records):
            raise UsageError(f"the model generated nothing in {len(records)} completions, so no problem can be chosen")
        with Grader() as grader:
            order = ranked(candidates(records, same=grader.same if by == "agreement" else None))
        if count > len(order):
            print_note(f"--count is {count}, but the pool has {len(order)} problems; the prompt file has all of them")
        if not order[0].variance:
            print_note("no problem varies, so the order says nothing; more samples or other problems may help")
        write_text(folder / "ranking.jsonl", "".join(_line(i, candidate) for i, candidate in enumerate(order, 1)))
        write_text(folder / "prompts.jsonl", "".join(_line(i, one) for i, one in enumerate(order[:count], 1)))
        save_figure(draw_selection(order, by), folder / "histogram.png")
        text = "\n".join(describe_selection(order, by, config)) + "\n"
        write_text(folder / "table.md", text)
    print(text)
    print(f"Table:   {folder / 'table.md'}\nRanking: {folder / 'ranking.jsonl'}\nPicture: {folder / 'histogram.png'}")
    print(f"Train:   em-kernels train --prompt-file {folder / 'prompts.jsonl'}")


def _line(rank: int, candidate: "Candidate") -> str:
    values = {
        "rank": rank,
        "prompt": candidate.question,
        "answers": candidate.answers,
        "task": candidate.task,
        "problem": candidate.problem,
        "p": candidate.share,
        "variance": candidate.variance,
        "standard_error": candidate.standard_error,
        "samples": len(candidate.successes),
    }
    return json_line(values)
