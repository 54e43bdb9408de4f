"""One page about several runs: settings, curves, lengths, accuracies with their errors, and the published figures."""

from collections.abc import Iterator, Sequence

from em_kernels.one_shot.analysis.accuracies import (
    CHOSEN_ON,
    DECODINGS,
    courses,
    difference,
    difference_text,
    points_text,
    when,
)
from em_kernels.one_shot.analysis.built_in import built_in_lines
from em_kernels.one_shot.analysis.group_accuracies import group_differences, seed_means
from em_kernels.one_shot.analysis.groups import Band, Group
from em_kernels.one_shot.analysis.published import AUTHOR_LOSSES, AUTHOR_LOSSES_SOURCE, PAPER, published_table
from em_kernels.one_shot.analysis.runs import Run, differing
from em_kernels.one_shot.analysis.settings import setting_text, settings_lines
from em_kernels.one_shot.analysis.tables import markdown_table

# Rows of the table of curves: the name in metrics.jsonl, the heading, and the form of a value.
CURVES = (
    ("loss", "loss (nats)", ".4f"),
    ("entropy", "entropy at temperature 1 (nats)", ".4f"),
    ("decided", "decided tokens", ".1%"),
    ("kl", "KL to the start (nats per token)", ".4f"),
    ("prompt_tokens", "prompt length (tokens)", ".1f"),
    ("length_mean", "response length, mean (tokens)", ".1f"),
    ("length_max", "response length, longest (tokens)", ".0f"),
    ("truncated", "truncated responses", ".1%"),
    ("repetition", "repeated 4-grams", ".1%"),
)
_ERRORS = (
    "The errors of a run are standard errors over problems, and its differences are taken problem by problem on the "
    "same problems; an error of 0 says that all of them came out alike, and not that the accuracy is known exactly. "
    "The errors of a mean over seeds are standard errors over the seeds: they leave the choice of problems out, and "
    f"with two or three seeds they are themselves uncertain. {CHOSEN_ON} It is chosen for each run and decoding by "
    "itself."
)
# What is told of an evaluation's completions: the name in evaluations.jsonl, and the form of a value.
COUNTED = (("unreadable", ""), ("truncated", ""), ("length_mean", ".1f"))


def write_page(groups: Sequence[Group]) -> str:
    """The page as Markdown; it shows curves.png and accuracy.png, which have to lie beside it."""
    runs = [run for group in groups for run in group.runs]
    sections = [_title(groups, runs), _runs_section(groups, runs), _settings_section(groups, runs)]
    sections += [_curves_section(groups), _accuracy_section(groups), _published_section(groups)]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _title(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    lines = ["# Entropy minimisation: " + ("1 run" if len(runs) == 1 else f"{len(runs)} runs")]
    if len(groups) > 1:
        lines += ["", "Runs whose settings differ in nothing but the seed are a group:", ""]
        lines += [f"- {group.title}, {_count(group)}" for group in groups]
    elif len(runs) > 1:
        lines += ["", "The runs differ in nothing but the seed."]
    return lines + [line for note in built_in_lines(run.made for run in runs) for line in ("", f"**{note}**")]


def _count(group: Group) -> str:
    return "1 run" if len(group.runs) == 1 else f"{len(group.runs)} seeds"


def _runs_section(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    rows = [
        [group.name, run.name, str(run.config.get("seed")), _state(run), _text(run.surroundings.get("device"))]
        for group in groups
        for run in group.runs
    ]
    return ["## Runs", "", *markdown_table(["group", "run", "seed", "state", "device"], rows, texts=5)]


def _state(run: Run) -> str:
    steps = run.config.get("steps")
    state = f"{len(run.metrics)} of {steps} steps" if len(run.metrics) != steps else f"{steps} steps"
    if not run.finished:
        return f"{state}, unfinished"
    return state if len(run.metrics) == steps else f"{state}, ended by a rule"


def _settings_section(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    configs = [group.config for group in groups]
    different = differing(configs)
    lines = ["## Settings"]
    if different:
        rows = [[name, *(setting_text(name, config.get(name)) for config in configs)] for name in different]
        lines += ["", "What differs between the groups:", "", *markdown_table(["setting", *_names(groups)], rows)]
    lines += ["", "The settings and versions of the runs; where they differ, their results may differ for it:", ""]
    lines += [*settings_lines({run.name: run.made for run in runs}), ""]
    lines += [f"- Prompts of {group.name}: {_prompts_text(group.config['prompts'])}" for group in groups]
    return lines


def _prompts_text(prompts: Sequence[str]) -> str:
    first = " ".join(prompts[0].split())
    shown = first if len(first) <= 300 else first[:300] + " ..."
    return f'"{shown}"' + (f" and {len(prompts) - 1} more." if len(prompts) > 1 else "")


def _curves_section(groups: Sequence[Group]) -> list[str]:
    lines = ["## Loss, entropy and lengths", ""]
    rows = []
    for name, heading, form in CURVES:
        bands = [group.band(name) for group in groups]
        if any(band.steps for band in bands):
            rows.append([heading, *(_ends(band, form) for band in bands)])
    if not rows:
        return [*lines, "No run has finished a step."]
    lines += [
        "Value at the first step and at the last one: the mean over the runs that got there, with the standard "
        "deviation over seeds where there are several.",
        "",
        *markdown_table(["", *_names(groups)], rows),
        "",
        "![Loss, entropy and lengths by step, with bands of one standard deviation over seeds](curves.png)",
    ]
    return lines


def _ends(band: Band, form: str) -> str:
    if not band.steps:
        return "not measured"
    return " → ".join(
        format(band.mean[i], form)
        + (f" ± {band.deviation[i]:{form}}" if band.deviation[i] == band.deviation[i] else "")
        for i in (0, -1)
    )


def _accuracy_section(groups: Sequence[Group]) -> list[str]:
    lines = ["## Accuracy", ""]
    unmeasured = [run.name for group in groups for run in group.runs if not run.evaluations]
    rows = [row for group in groups for row in _accuracy_rows(group)]
    if not rows:
        return [*lines, "No run has measured its accuracy, so nothing is known of a gain or a loss."]
    header = [
        "group",
        "run",
        "decoding",
        "problems",
        "before",
        "last step",
        "best step",
        "last - before",
        "best - before",
    ]
    lines += [*markdown_table(header, rows, texts=3), "", _ERRORS, ""]
    said = [
        f"Last step, {of.decoding}, {of.group} less {of.less}, problem by problem over all seeds: "
        f"{difference_text(of.change)}."
        for of in group_differences(groups)
    ]
    if unmeasured:
        said.append(f"Not measured in: {', '.join(unmeasured)}.")
    if said:
        lines += [*(f"- {line}" for line in said), ""]
    return [*lines, *_completions_table(groups), "", "![Accuracy by step](accuracy.png)"]


def _accuracy_rows(group: Group) -> Iterator[list[str]]:
    for run in group.runs:
        for course in courses(run):
            start, best, last = (course.by_step.get(step) for step in (0, course.best, course.last))
            assert best is not None
            assert last is not None
            yield [
                group.name,
                run.name,
                course.decoding,
                str(course.problems),
                _text(start),
                f"{last} ({when(course.last)})",
                f"{best} ({when(course.best)})",
                *(difference_text(difference(run, course.decoding, 0, step)) for step in (course.last, course.best)),
            ]
    for means in seed_means(group):
        accuracies = (str(means.accuracy[when]) for when in ("before", "last", "best"))
        changes = (points_text(means.change[when]) for when in ("last", "best"))
        yield [group.name, f"mean of {means.runs} seeds", means.decoding, "", *accuracies, *changes]


def _completions_table(groups: Sequence[Group]) -> list[str]:
    """What became of the completions of each run's first and last evaluation."""
    rows = []
    for run in (run for group in groups for run in group.runs):
        for decoding in DECODINGS:
            steps = run.accuracies(decoding)
            if steps:
                first, last = steps[min(steps)], steps[max(steps)]
                cells = [f"{_text(first.get(name), form)} → {_text(last.get(name), form)}" for name, form in COUNTED]
                tasks = sorted({record.task for record in run.records(max(steps))})
                rows.append([run.name, decoding, ", ".join(tasks), *cells])
    header = ["run", "decoding", "problems", "unreadable", "truncated", "mean length (tokens)"]
    return ["The completions of the first evaluation and of the last one:", "", *markdown_table(header, rows, texts=3)]


def _published_section(groups: Sequence[Group]) -> list[str]:
    losses = [dict(zip(band.steps, band.mean, strict=True)) for band in (group.band("loss") for group in groups)]
    rows = [
        [str(step), f"{loss:.4f}", *(_text(own.get(step), ".4f") for own in losses)]
        for step, loss in enumerate(AUTHOR_LOSSES, start=1)
    ]
    return [
        "## Published figures",
        "",
        f"Nothing in this section but the columns of the groups was measured here. The accuracies are those of {PAPER} "
        "and of a user, in percent, of the models and on the problem sets that are named:",
        "",
        *published_table(),
        "",
        f"Losses by step; published: {AUTHOR_LOSSES_SOURCE}. The script that gave them averages over micro-batches and "
        "leaves out the position that the first token was drawn from.",
        "",
        *markdown_table(["step", "published", *_names(groups)], rows, texts=0),
    ]


def _names(groups: Sequence[Group]) -> list[str]:
    return [group.name for group in groups]


def _text(value: object, form: str = "") -> str:
    return "" if value is None else format(value, form)
