"""em-kernels evaluate: the accuracy of models on problem sets, at temperatures, beside each other."""

import argparse
from collections.abc import Sequence
from typing import Any

from em_kernels.cli.measuring import add_measuring_options, plan_measurement, positive, temperature
from em_kernels.cli.shared import print_note
from em_kernels.one_shot.errors import UsageError


def add_parser(commands: Any) -> None:
    evaluate = commands.add_parser(
        "evaluate",
        help="measure models on problem sets",
        description="Draw completions of problems, grade them, and put the accuracies of models beside each other, "
        "with the error of each and of their difference. Every completion is kept.",
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument(
        "models",
        nargs="*",
        metavar="MODEL",
        help="name, folder, run folder, or built-in (built-in); the first is the base",
    )
    evaluate.add_argument(
        "--task",
        type=_list_of(str),
        default=["built-in"],
        metavar="FILE[,FILE]",
        help="problems with answers (.jsonl, .json, .csv, .parquet), hub:NAME[[:CONFIG]:SPLIT], or built-in (built-in)",
    )
    evaluate.add_argument(
        "--temperature", type=_list_of(temperature), default=[0.0], metavar="X[,X]", help="0: the most likely token (0)"
    )
    evaluate.add_argument(
        "--pass-at", type=_list_of(positive), metavar="K[,K]", help="k of pass@k, up to the samples (the samples)"
    )
    add_measuring_options(evaluate, samples=1)


def _list_of(kind: Any) -> Any:
    def read(text: str) -> list[Any]:
        try:
            return [kind(part.strip()) for part in text.split(",")]
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers with commas between them") from None

    return read


def _evaluate(
    models: Sequence[str],
    task: Sequence[str],
    temperature: Sequence[float],
    pass_at: Sequence[int] | None,
    **options: Any,
) -> None:
    if pass_at and max(pass_at) > options["samples"]:
        raise UsageError(f"--pass-at is {max(pass_at)}, expected at most the samples per problem, {options['samples']}")
    from em_kernels.one_shot.evaluation.tasks import read_tasks

    tasks = read_tasks(task, limit=options["limit"], note=print_note)
    measurement = plan_measurement("evaluate", tasks, temperature, models, options)

    from em_kernels.one_shot.analysis.comparison import describe_comparison, draw_comparison
    from em_kernels.one_shot.evaluation.gold import gold_notes
    from em_kernels.one_shot.evaluation.grading import Grader
    from em_kernels.one_shot.evaluation.scores import score
    from em_kernels.one_shot.files import write_text
    from em_kernels.one_shot.runs.figures import save_figure

    folder = measurement.folder
    of_gold = gold_notes(tasks)
    for line in of_gold:
        print_note(line)
    with measurement.drawn() as (records, config):
        with Grader() as grader:
            scores = score(
                records,
                tasks=[task.name for task in measurement.plan.tasks],
                models=[model.name for model in measurement.models],
                ks=pass_at or [options["samples"]],
                same=grader.same,
            )
        text = "\n".join([*describe_comparison(scores, config), *(f"- {line}" for line in of_gold)]) + "\n"
        save_figure(draw_comparison(scores), folder / "accuracy.png")
        write_text(folder / "table.md", text)
    print(text)
    for what, name in (("Table", "table.md"), ("Picture", "accuracy.png"), ("Completions", "completions.jsonl")):
        print(f"{f'{what}:':12} {folder / name}")
