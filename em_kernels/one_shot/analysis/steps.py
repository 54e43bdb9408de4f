"""A run by step: loss, entropy, accuracy and lengths, where the accuracy was highest, and what to make of it."""

from collections.abc import Iterator, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from em_kernels.one_shot.analysis.accuracies import CHOSEN_ON, Course, courses, difference, difference_text, when
from em_kernels.one_shot.analysis.drawing import begin_at_zero, colour, draw_absence, draw_legend, new_axes
from em_kernels.one_shot.analysis.run_rows import run_rows
from em_kernels.one_shot.analysis.runs import Run
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.metrics import DECIDED
from em_kernels.one_shot.runs.figures import label_steps
from em_kernels.one_shot.stopping import AGREEMENT, first_stop

# The rules that a run is held against besides its own.
_RULES = ("decided>0.5", "decided>0.9", "loss<0.1", "loss<0.03", AGREEMENT)
# Columns of the table: the name in metrics.jsonl, the heading, and the form of a value.
_COLUMNS = (
    ("loss", "loss", ".4f"),
    ("entropy", "entropy", ".4f"),
    ("decided", "decided", ".1%"),
    ("length_mean", "mean length", ".1f"),
    ("length_max", "longest", ".0f"),
    ("truncated", "truncated", ".1%"),
    ("repetition", "repeated", ".1%"),
    ("kl", "KL", ".4f"),
)
# What the headings leave out.
UNITS = (
    "Loss, entropy (at temperature 1) and KL (to the model before training) are in nats per token, lengths in tokens. "
    f"Decided tokens have less than {DECIDED:g} nats; repeated are runs of four tokens. Under greedy and sampled "
    "stands the accuracy, after ± its standard error over problems."
)


def describe_steps(run: Run) -> list[str]:
    """The lines of a Markdown section about a run: a row a step, and sentences on where its accuracy was highest."""
    measured = [column for column in _COLUMNS if run.values(column[0])]
    evaluated = courses(run)
    rows = []
    for step in sorted({row["step"] for row in run.metrics} | {row["step"] for row in run.evaluations}):
        metrics = [_text(run.values(name).get(step), form) for name, _, form in measured]
        rows.append([str(step), *metrics, *(_text(course.by_step.get(step)) for course in evaluated)])
    header = ["step", *(heading for _, heading, _ in measured), *(course.decoding for course in evaluated)]
    table = markdown_table(header, rows, texts=0) if rows else ["No step is finished."]
    return [f"## {run.name}", "", *table, "", *_state(run), *_accuracy_lines(run), "", *_stop_table(run)]


def step_rows(run: Run) -> Iterator[dict[str, Any]]:
    """The same numbers, and those of the picture, for a script: a row is a line of JSON, and "what" names its kind."""
    yield from run_rows(run)
    for row in run.metrics:
        yield {"what": "step", "run": run.name, "step": row["step"], **{name: row.get(name) for name, *_ in _COLUMNS}}
    for rule, step in _stops(run).items() if run.metrics else ():
        yield {"what": "stopping rule", "run": run.name, "rule": rule, "step": step}


def draw_steps(runs: Sequence[Run]) -> Figure:
    """Draws loss and entropy, accuracy with its standard error, lengths and truncated share by step, a line a run."""
    figure, (losses, accuracy, lengths, shares) = new_axes(2, 2)
    for number, run in enumerate(runs):
        line = {"color": colour(number), "markersize": 3.5}
        _plot(losses, run.values("loss"), **line, marker="o", label=run.name)
        _plot(losses, run.values("entropy"), **line, marker="o", linestyle=":")
        for course in courses(run):
            steps = sorted(course.by_step)
            accuracy.errorbar(
                # Bars at the same step would hide each other.
                [step + 0.06 * number for step in steps],
                [100 * course.by_step[step].mean for step in steps],
                [100 * course.by_step[step].standard_error for step in steps],
                color=colour(number),
                marker="o",
                markersize=3.5,
                capsize=2,
                linestyle="-" if course.decoding == "greedy" else ":",
            )
        _plot(lengths, run.values("length_mean"), **line, marker="o")
        _plot(shares, {step: 100 * share for step, share in run.values("truncated").items()}, **line, marker="o")
        _plot(shares, {step: 100 * share for step, share in run.values("decided").items()}, **line, linestyle=":")
    losses.set_title("loss (solid), entropy at temperature 1 (dotted)", loc="left", fontsize=9)
    losses.set_ylabel("nats per token")
    accuracy.set_title("accuracy: greedy (solid), temperature 1 (dotted)", loc="left", fontsize=9)
    accuracy.set_ylabel("% ± standard error")
    lengths.set_title("mean length of a completion", loc="left", fontsize=9)
    lengths.set_ylabel("tokens")
    shares.set_title("truncated completions (solid), decided tokens (dotted)", loc="left", fontsize=9)
    shares.set_ylabel("%")
    if not any(run.evaluations for run in runs):
        draw_absence(accuracy)
    for axes in (losses, accuracy, lengths, shares):
        begin_at_zero(axes)
        label_steps(axes)
    draw_legend(figure, losses, columns=3)
    return figure


def _state(run: Run) -> list[str]:
    steps = run.config.get("steps")
    if run.finished or len(run.metrics) == steps:
        return []
    return [f"- The run is unfinished: {len(run.metrics)} of {steps} steps."]


def _accuracy_lines(run: Run) -> list[str]:
    evaluated = courses(run)
    if not evaluated:
        return ["- Its accuracy was not measured."]
    lines = []
    for course in evaluated:
        best, last = course.by_step[course.best], course.by_step[course.last]
        where = f"{course.problems} problems, {course.decoding}"
        if course.best == course.last:
            lines.append(f"- {where}: accuracy was highest {when(course.best)}, the last step measured: {best}.")
        else:
            change = difference_text(difference(run, course.decoding, course.best, course.last))
            lines.append(
                f"- {where}: accuracy was highest {when(course.best)} ({best}); {when(course.last)}, the last step "
                f"measured, it is {last}. The change between the two, problem by problem: {change}."
            )
    return [*lines, f"- {CHOSEN_ON}"]


def _stop_table(run: Run) -> list[str]:
    """The step that each stopping rule would have chosen, and the accuracy there where it was measured."""
    if not run.metrics:
        return []
    evaluated = courses(run)
    rows = []
    for rule, step in _stops(run).items():
        chosen = "never" if step is None else str(step)
        if rule == AGREEMENT and not any("agreement" in row for row in run.evaluations):
            chosen = "not measured"
        rows.append([rule, chosen, *("" if step is None else _at(course, step) for course in evaluated)])
    header = ["stopping rule", "would have stopped after step", *(f"{course.decoding} there" for course in evaluated)]
    return markdown_table(header, rows)


def _stops(run: Run) -> dict[str, int | None]:
    """By rule, the step after which it would have ended the run; None where it never would."""
    rules = dict.fromkeys((*run.config.get("stop_when", ()), *_RULES))
    return {rule: first_stop(rule, run.metrics, run.evaluations) for rule in rules}


def _at(course: Course, step: int) -> str:
    return str(course.by_step.get(step, "not measured"))


def _plot(axes: Axes, by_step: dict[int, float], **style: Any) -> None:
    if by_step:
        axes.plot(list(by_step), list(by_step.values()), **style)


def _text(value: object, form: str = "") -> str:
    return "" if value is None else format(value, form)
