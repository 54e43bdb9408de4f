"""One page about several runs: settings, curves, lengths, accuracies with their errors, and the published figures."""

from collections.abc import Iterator, Sequence

import em_kernels
from em_kernels.one_shot.analysis.accuracies import (
    BUILT_IN_NOTE,
    CHOSEN_ON,
    DECODINGS,
    courses,
    difference,
    difference_text,
    last_scores,
    points_text,
    when,
)
from em_kernels.one_shot.analysis.groups import Band, Group, setting_text
from em_kernels.one_shot.analysis.published import AUTHOR_LOSSES, AUTHOR_LOSSES_SOURCE, PAPER, published_table
from em_kernels.one_shot.analysis.runs import Run, differing
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.evaluation.statistics import Estimate, mean_over_problems, paired_difference

# Rows of the table of curves: the name in metrics.jsonl, the heading, and the form of a value.
_CURVES = (
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
_COUNTED = (("unreadable", ""), ("truncated", ""), ("length_mean", ".1f"))


def write_page(groups: Sequence[Group]) -> str:
    """The page as Markdown; it shows curves.png and accuracy.png, which have to lie beside it."""
    runs = [run for group in groups for run in group.runs]
    sections = [_title(groups, runs), _runs_section(groups, runs), _settings_section(groups)]
    sections += [_curves_section(groups), _accuracy_section(groups), _published_section(groups)]
    return "\n\n".join("\n".join(lines) for lines in sections) + "\n"


def _title(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    lines = ["# Entropy minimisation: " + ("1 run" if len(runs) == 1 else f"{len(runs)} runs")]
    if len(groups) > 1:
        lines += ["", "Runs whose settings differ in nothing but the seed are a group:", ""]
        lines += [f"- {group.title}, {_count(group)}" for group in groups]
    elif len(runs) > 1:
        lines += ["", "The runs differ in nothing but the seed."]
    if any(run.config.get("model") is None for run in runs):
        lines += ["", f"**{BUILT_IN_NOTE}**"]
    return lines


def _count(group: Group) -> str:
    return "1 run" if len(group.runs) == 1 else f"{len(group.runs)} seeds"


def _runs_section(groups: Sequence[Group], runs: Sequence[Run]) -> list[str]:
    rows = [
        [group.name, run.name, str(run.config.get("seed")), _state(run), _text(run.surroundings.get("device"))]
        for group in groups
        for run in group.runs
    ]
    versions = [dict(run.surroundings.get("versions") or {}) for run in runs]
    different = differing(versions)
    same = ", ".join(f"{name} {value}" for name, value in versions[0].items() if name not in different)
    lines = ["## Runs", "", *markdown_table(["group", "run", "seed", "state", "device"], rows, texts=5), ""]
    lines.append(
        f"Versions, the same in all runs: {same or 'none'}. Page written by em_kernels {em_kernels.__version__}."
    )
    if different:
        lines += ["", "**Versions that are not the same in all runs**, so that differences may come from them:", ""]
        lines += markdown_table(
            ["version", *(run.name for run in runs)],
            [[name, *(_text(of_run.get(name)) for of_run in versions)] for name in different],
        )
    return lines


def _state(run: Run) -> str:
    steps = run.config.get("steps")
    state = f"{len(run.metrics)} of {steps} steps" if len(run.metrics) != steps else f"{steps} steps"
    if not run.finished:
        return f"{state}, unfinished"
    return state if len(run.metrics) == steps else f"{state}, ended by a rule"


def _settings_section(groups: Sequence[Group]) -> list[str]:
    configs = [group.config for group in groups]
    different = differing(configs)
    lines = ["## Settings"]
    if different:
        rows = [[name, *(setting_text(name, config.get(name)) for config in configs)] for name in different]
        lines += ["", "What differs between the groups:", "", *markdown_table(["setting", *_names(groups)], rows)]
        lines += ["", "What all have:"]
    rows = [[name, setting_text(name, value)] for name, value in configs[0].items() if name not in different]
    lines += ["", *markdown_table(["setting", "value"], rows, texts=2), ""]
    lines += [f"- Prompts of {group.name}: {_prompts_text(group.config['prompts'])}" for group in groups]
    return lines


def _prompts_text(prompts: Sequence[str]) -> str:
    first = " ".join(prompts[0].split())
    shown = first if len(first) <= 300 else first[:300] + " ..."
    return f'"{shown}"' + (f" and {len(prompts) - 1} more." if len(prompts) > 1 else "")


def _curves_section(groups: Sequence[Group]) -> list[str]:
    lines = ["## Loss, entropy and lengths", ""]
    rows = []
    for name, heading, form in _CURVES:
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
    said = list(_between(groups))
    if unmeasured:
        said.append(f"Not measured in: {', '.join(unmeasured)}.")
    if said:
        lines += [*(f"- {line}" for line in said), ""]
    return [*lines, *_completions_table(groups), "", "![Accuracy by step](accuracy.png)"]


def _accuracy_rows(group: Group) -> Iterator[list[str]]:
    seen: dict[str, list[tuple[float, float, float]]] = {}
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
            if start is not None:
                seen.setdefault(course.decoding, []).append((start.mean, last.mean, best.mean))
    for decoding, values in seen.items():
        if len(values) > 1:
            start, last, best = (_over_seeds([value[i] for value in values]) for i in range(3))
            changes = (points_text(_over_seeds([value[i] - value[0] for value in values])) for i in (1, 2))
            yield [group.name, f"mean of {len(values)} seeds", decoding, "", str(start), str(last), str(best), *changes]


def _completions_table(groups: Sequence[Group]) -> list[str]:
    """What became of the completions of each run's first and last evaluation."""
    rows = []
    for run in (run for group in groups for run in group.runs):
        for decoding in DECODINGS:
            steps = run.accuracies(decoding)
            if steps:
                first, last = steps[min(steps)], steps[max(steps)]
                cells = [f"{_text(first.get(name), form)} → {_text(last.get(name), form)}" for name, form in _COUNTED]
                tasks = sorted({record.task for record in run.records(max(steps))})
                rows.append([run.name, decoding, ", ".join(tasks), *cells])
    header = ["run", "decoding", "problems", "unreadable", "truncated", "mean length (tokens)"]
    return ["The completions of the first evaluation and of the last one:", "", *markdown_table(header, rows, texts=3)]


def _over_seeds(values: Sequence[float]) -> Estimate:
    # The sample is that of the seeds here.
    return mean_over_problems({seed: [value] for seed, value in enumerate(values)})


def _between(groups: Sequence[Group]) -> Iterator[str]:
    """The accuracies of the other groups less that of the first one that was measured, on the same problems."""
    for decoding in DECODINGS:
        measured = [(group.name, scores) for group in groups if (scores := last_scores(group.runs, decoding))]
        for name, scores in measured[1:]:
            first_name, first = measured[0]
            if first.keys() == scores.keys():
                change = difference_text(paired_difference(first, scores))
                yield f"Last step, {decoding}, {name} less {first_name}, problem by problem over all seeds: {change}."


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
