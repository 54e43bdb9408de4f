"""Models beside each other: the accuracy of each by task and temperature, and what tells them apart."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from matplotlib.figure import Figure

from em_kernels.one_shot.analysis.accuracies import difference_text
from em_kernels.one_shot.analysis.built_in import built_in_lines
from em_kernels.one_shot.analysis.drawing import begin_at_zero, colour, draw_legend, new_axes
from em_kernels.one_shot.analysis.published import published_table
from em_kernels.one_shot.analysis.settings import settings_lines
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.evaluation.scores import Scores
from em_kernels.one_shot.evaluation.statistics import Estimate, paired_difference

_MEAN = "mean of the tasks"


def describe_comparison(scores: Sequence[Scores], config: dict[str, Any]) -> list[str]:
    """The lines of a Markdown page: the scores, the differences from the first model, and the published figures.

    Args:
        scores: the scores of every task, model and temperature; the first is of the model to compare with.
        config: the settings that the completions were drawn by, and the versions, as `config.json` has them.
    """
    settings = config["settings"]
    tasks = list(dict.fromkeys(one.task for one in scores))
    lines = ["# Accuracy", "", *_table(scores), "", *_explanation(scores)]
    lines += [line for note in built_in_lines([config]) for line in ("", note)]
    if len(settings["models"]) > 1:
        lines += ["", f"## Differences from {scores[0].model} on the same problems", "", *_differences(scores)]
    published = published_table(tasks)
    if published:
        lines += ["", "## Published, not measured here", "", *published]
    return [*lines, "", "## Settings", "", *settings_lines({"": config})]


def draw_comparison(scores: Sequence[Scores]) -> Figure:
    """Draws the accuracy of each model by temperature, with a band of one standard error, a panel for each task."""
    tasks = list(dict.fromkeys(one.task for one in scores))
    columns = min(3, len(tasks))
    figure, panels = new_axes(math.ceil(len(tasks) / columns), columns)
    for axes in panels[len(tasks) :]:
        axes.set_axis_off()
    models = list(dict.fromkeys(one.model for one in scores))
    for axes, task in zip(panels, tasks, strict=False):
        for number, model in enumerate(models):
            own = sorted(
                (one for one in scores if (one.task, one.model) == (task, model)), key=lambda one: one.temperature
            )
            at = [one.temperature for one in own]
            mean = [100 * one.accuracy.mean for one in own]
            error = [
                0.0 if math.isnan(one.accuracy.standard_error) else 100 * one.accuracy.standard_error for one in own
            ]
            axes.errorbar(at, mean, error, color=colour(number), marker="o", markersize=4, capsize=2, label=model)
            low, high = ([m + sign * e for m, e in zip(mean, error, strict=True)] for sign in (-1, 1))
            axes.fill_between(at, low, high, color=colour(number), alpha=0.15, linewidth=0)
        axes.set_title(f"{task} ({len(own[0].by_problem)} problems)", loc="left", fontsize=10)
        axes.set_xticks(sorted({one.temperature for one in scores}))
        # Where nothing is right, the axis would have no extent.
        axes.set_ylim(top=max(axes.get_ylim()[1], 5.0))
        begin_at_zero(axes)
        axes.set_xlabel("temperature (0: most likely token)")
        axes.set_ylabel("accuracy, %")
    draw_legend(figure, panels[0], columns=columns)
    return figure


def _table(scores: Sequence[Scores]) -> list[str]:
    ks = sorted({k for one in scores for k in one.pass_at if k > 1})
    voted = any(one.voted for one in scores)
    header = ["task", "model", "temperature", "accuracy", *(f"pass@{k}" for k in ks), *(["majority"] if voted else [])]
    header += ["mean tokens", "truncated", "unreadable", "unfinished"]
    rows = [
        [
            one.task,
            one.model,
            _temperature(one.temperature),
            _text(one.accuracy),
            *(_text(one.pass_at.get(k)) for k in ks),
            *([_text(one.voted)] if voted else []),
            f"{one.length:.0f}",
            f"{one.truncated:.1%}",
            str(one.unreadable),
            str(one.unfinished),
        ]
        for one in scores
    ]
    blank = [""] * (len(header) - 4)
    means = [
        [_MEAN, model, _temperature(temperature), _text(estimate), *blank]
        for (model, temperature), estimate in _means(scores, lambda one: one.accuracy).items()
    ]
    return markdown_table(header, rows + means, texts=3)


def _explanation(scores: Sequence[Scores]) -> list[str]:
    problems = {one.task: len(one.by_problem) for one in scores}
    completions = max(len(values) for one in scores for values in one.by_problem.values())
    alike = [
        f"All completions of each problem are the same: {one.model} on {one.task} at temperature {one.temperature:g}. "
        "Some servers draw only where the model's generation_config.json has do_sample."
        for one in scores
        if one.voted is not None and not one.varied
    ]
    return [
        *alike,
        f"Problems: {', '.join(f'{task} {count}' for task, count in problems.items())}; completions of a problem: "
        f"{completions}, and 1 at temperature 0. After ± stands one standard error over the problems, which are the "
        "sample, however many completions each has; where all came out alike it is 0, which says too little. "
        "Unreadable are completions without an answer that can be read; unfinished are those that were cut off before "
        "they concluded. Neither is right.",
    ]


def _differences(scores: Sequence[Scores]) -> list[str]:
    first = {(one.task, one.temperature): one for one in scores if one.model == scores[0].model}
    rows = []
    pairs: list[Scores] = []
    for one in scores:
        base = first[one.task, one.temperature]
        if one.model != base.model:
            difference = paired_difference(base.by_problem, one.by_problem)
            pairs.append(one)
            rows.append([one.task, one.model, _temperature(one.temperature), difference_text(difference)])
    means = _means(pairs, lambda one: paired_difference(first[one.task, one.temperature].by_problem, one.by_problem))
    rows += [
        [_MEAN, model, _temperature(temperature), difference_text(estimate)]
        for (model, temperature), estimate in means.items()
    ]
    return markdown_table(["task", "model", "temperature", "difference"], rows, texts=3)


def _means(scores: Sequence[Scores], estimate: Callable[[Scores], Estimate]) -> dict[tuple[str, float], Estimate]:
    """The mean over the tasks of an estimate, by model and temperature, where there are several tasks."""
    cells: dict[tuple[str, float], list[Estimate]] = {}
    for one in scores:
        cells.setdefault((one.model, one.temperature), []).append(estimate(one))
    return {
        cell: Estimate(
            math.fsum(one.mean for one in own) / len(own),
            # The tasks are fixed, and their problems are drawn independently of each other.
            math.sqrt(math.fsum(one.standard_error**2 for one in own)) / len(own),
        )
        for cell, own in cells.items()
        if len(own) > 1
    }


def _temperature(value: float) -> str:
    return f"{value:g}" if value else "greedy"


def _text(estimate: Estimate | None) -> str:
    return "" if estimate is None else str(estimate)
