"""The tables and the picture of how reliable votes and log-probabilities are."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from em_kernels.one_shot.analysis.built_in import built_in_lines
from em_kernels.one_shot.analysis.calibration import Bin, Logprobs, Votes, measure_logprobs, measure_votes
from em_kernels.one_shot.analysis.drawing import colour, draw_absence, draw_legend, new_axes, short_name
from em_kernels.one_shot.analysis.settings import settings_lines
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.records import Record, read_records
from em_kernels.one_shot.json_lines import json_line


@dataclass(frozen=True)
class Calibration:
    """What is known of the completions of one model on one task at one temperature, from one file."""

    votes: Votes | None
    logprobs: Logprobs | None


def calibrate(files: Sequence[Path], same: Callable[[str, str], bool]) -> dict[str, Calibration]:
    """The calibration of each model, task and temperature of the files, by a name that tells them apart.

    Args:
        files: files of graded completions.
        same: whether two answers that are not spelled alike are the same.

    Raises:
        UsageError: a line is no graded completion, or a file has none.
    """
    cells: dict[str, list[Record]] = {}
    for path in dict.fromkeys(files):
        records = [record for record in read_records(path) if record.verdict != "ungraded"]
        if not records:
            raise UsageError(f"{path} has no graded completions, expected the completions.jsonl of evaluate")
        for record in records:
            where = f", {short_name(str(path))}" if len(files) > 1 else ""
            how = f"temperature {record.temperature:g}" if record.temperature else "greedy"
            model = f"{record.model}, " if record.model else ""
            cells.setdefault(f"{model}{record.task}, {how}{where}", []).append(record)
    return {name: Calibration(measure_votes(own, same), measure_logprobs(own)) for name, own in cells.items()}


def describe_calibration(cells: Mapping[str, Calibration], files: Sequence[Path]) -> list[str]:
    """The lines of a Markdown page: the bins of each cell with their counts, what they come to, and what made them."""
    lines = ["# How reliable votes and log-probabilities are"]
    for name, cell in cells.items():
        lines += ["", f"## {name}", "", *_vote_lines(cell.votes), "", *_logprob_lines(cell.logprobs)]
    made = {str(path): config for path in files if (config := read_made(path))}
    lines += [line for note in built_in_lines(made.values()) for line in ("", note)]
    lines += ["", "## Settings", "", *settings_lines(made)]
    unknown = [str(path) for path in dict.fromkeys(files) if str(path) not in made]
    return lines + [f"- {path}: not known, as no config.json lies beside it" for path in unknown]


def calibration_lines(cells: Mapping[str, Calibration]) -> str:
    """The same figures, a JSON object a line; null where a figure is not defined."""
    return "".join(json_line({"of": name, **asdict(cell)}) for name, cell in cells.items())


def draw_calibration(cells: Mapping[str, Calibration]) -> Figure:
    """Draws accuracy by share of votes and by log-probability, a line a cell, larger dots for larger bins."""
    figure, (votes, logprobs) = new_axes(1, 2, width=5.0, height=4.2)
    for number, (name, cell) in enumerate(cells.items()):
        if cell.votes:
            _draw_bins(votes, cell.votes.bins, 100, colour(number), name)
        if cell.logprobs:
            _draw_bins(logprobs, cell.logprobs.bins, 1, colour(number), name)
    votes.plot([0, 100], [0, 100], "--", color="gray", linewidth=1)
    votes.set_xlim(0, 104)
    votes.set_xlabel("share of votes for the most frequent answer (%)")
    votes.set_title("majority votes (dashed: calibrated)", loc="left", fontsize=10)
    logprobs.set_xlabel("mean log-probability of the tokens (nats)")
    logprobs.set_title("completions by log-probability", loc="left", fontsize=10)
    for axes, measured in (
        (votes, [c.votes for c in cells.values()]),
        (logprobs, [c.logprobs for c in cells.values()]),
    ):
        if not any(measured):
            draw_absence(axes)
        axes.set_ylim(-6, 106)
        axes.set_ylabel("right (% ± standard error)")
    draw_legend(figure, logprobs, votes)
    return figure


def read_made(path: Path) -> dict[str, Any] | None:
    """What made a file of completions: "settings" and versions, as the command left them that wrote the file."""
    of_run = path.parent.name == "evaluations"
    try:
        written = json.loads(((path.parent.parent if of_run else path.parent) / "config.json").read_text("utf-8"))
        return {"settings": dict(written.pop("config" if of_run else "settings")), **written}
    except (AttributeError, KeyError, OSError, TypeError, ValueError):
        return None


def _draw_bins(axes: Axes, bins: Sequence[Bin], factor: float, own_colour: str, name: str) -> None:
    at = [factor * one.confidence for one in bins]
    right = [100 * one.accuracy.mean for one in bins]
    # A bin with one problem has no error to show.
    errors = [0.0 if math.isnan(error := one.accuracy.standard_error) else 100 * error for one in bins]
    axes.errorbar(at, right, errors, color=own_colour, capsize=2, linewidth=1.2, label=name)
    total = sum(one.count for one in bins)
    axes.scatter(at, right, [12 + 200 * one.count / total for one in bins], color=own_colour, alpha=0.7, linewidths=0)


def _vote_lines(votes: Votes | None) -> list[str]:
    if votes is None:
        return ["No votes: no problem has several completions of which one has an answer."]
    rows = [[f"{one.confidence:.1%}", str(one.count), str(one.accuracy)] for one in votes.bins]
    return [
        *markdown_table(["share of votes", "problems", "vote is right"], rows, texts=0),
        "",
        f"Majority votes are right in {votes.accuracy}, with a mean share of {votes.confidence:.1%} of the votes; the "
        f"expected calibration error is {votes.error:.1%}. Problems without any answer: {votes.silent}.",
    ]


def _logprob_lines(logprobs: Logprobs | None) -> list[str]:
    if logprobs is None:
        return ["No log-probabilities: the records have none, as where a server drew the completions."]
    rows = [[f"{one.confidence:.4f}", str(one.count), str(one.accuracy)] for one in logprobs.bins]
    return [
        *markdown_table(["mean log-probability", "completions", "right"], rows, texts=0),
        "",
        _order(logprobs),
    ]


def _order(logprobs: Logprobs) -> str:
    if math.isnan(logprobs.order):
        return "All completions are right, or all are wrong, so that there are no two whose order would say anything."
    within = "there is no such pair of one problem"
    if not math.isnan(logprobs.order_within):
        within = f"in {logprobs.order_within:.1%} of the pairs of one problem, in which its difficulty plays no part"
    return (
        f"Of a right and a wrong completion, the right one has the higher mean log-probability in {logprobs.order:.1%} "
        f"of all pairs (50 % is chance); {within}."
    )
