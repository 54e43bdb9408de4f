"""The results of a sweep as tables: a row per run to compute with, and means over seeds to read."""

import json
import math
from collections.abc import Sequence

from em_kernels.one_shot.evaluation.statistics import Estimate
from em_kernels.one_shot.runs.files import write_text
from em_kernels.one_shot.sweeps.folder import SweepFolder
from em_kernels.one_shot.sweeps.grid import label
from em_kernels.one_shot.sweeps.results import DECODINGS, Group, Result


def write_table(folder: SweepFolder, results: Sequence[Result], groups: Sequence[Group]) -> str:
    """Writes table.jsonl and table.md, and returns the text of table.md."""
    write_text(folder.rows, "".join(f"{json.dumps(result.to_row(), ensure_ascii=False)}\n" for result in results))
    problems = max(result.problems for result in results)
    measured = [decoding for decoding in DECODINGS if any(group.accuracy(decoding) for group in groups)]
    text = "\n".join([*_aligned(_rows(groups, measured)), "", *_notes(problems), ""])
    write_text(folder.table, text)
    return text


def _rows(groups: Sequence[Group], decodings: Sequence[str]) -> list[list[str]]:
    head = [*groups[0].settings, "runs", "failed", "loss", "entropy"]
    head += [f"{decoding} {when}" for decoding in decodings for when in ("before", "after", "best (step)")]
    return [head, *(_row(group, decodings) for group in groups)]


def _row(group: Group, decodings: Sequence[str]) -> list[str]:
    cells = [label(value) for value in group.settings.values()]
    cells += [str(len(group.finished)), str(group.failed)]
    for metric in ("loss", "entropy"):
        curve = group.curve(metric)
        cells.append(_nats(curve[max(curve)]) if curve else "-")
    for decoding in decodings:
        accuracy = group.accuracy(decoding)
        if not accuracy:
            cells += ["-", "-", "-"]
            continue
        best = max(accuracy, key=lambda step: accuracy[step].mean)
        before = _share(accuracy[0]) if 0 in accuracy else "-"
        cells += [before, _share(accuracy[max(accuracy)]), f"{_share(accuracy[best])} ({best})"]
    return cells


def _notes(problems: int) -> list[str]:
    notes = [
        "Means over the finished runs of a row, which differ in their seed, ± the standard error over these seeds. "
        "Loss (at the training temperature) and entropy (at temperature 1) are of the last step, in nats.",
    ]
    if problems:
        notes.append(
            f"Accuracies are on {problems} problems, greedy and sampled at temperature 1, before and after training; "
            "the error that comes from these being few is not in the standard error over seeds. The best step is "
            "chosen on the very accuracy that is shown for it, and so is too good by chance."
        )
    return notes


def _nats(estimate: Estimate) -> str:
    return f"{estimate.mean:.4f}" + ("" if math.isnan(estimate.standard_error) else f" ± {estimate.standard_error:.4f}")


def _share(estimate: Estimate) -> str:
    return f"{estimate.mean:.1%}" if math.isnan(estimate.standard_error) else str(estimate)


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """The rows as a Markdown table whose columns line up as plain text too."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    rule = "|" + "|".join("-" * (width + 1) + ":" for width in widths) + "|"
    return [lines[0], rule, *lines[1:]]
