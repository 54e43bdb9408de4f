"""The results of a sweep as tables: a row per run to compute with, and means over seeds to read."""

from collections.abc import Sequence

from em_kernels.one_shot.analysis.accuracies import CHOSEN_ON, DECODINGS
from em_kernels.one_shot.analysis.built_in import built_in_lines
from em_kernels.one_shot.analysis.settings import settings_lines
from em_kernels.one_shot.analysis.tables import markdown_table
from em_kernels.one_shot.files import write_text
from em_kernels.one_shot.json_lines import json_line
from em_kernels.one_shot.sweeps.folder import SweepFolder
from em_kernels.one_shot.sweeps.grid import label
from em_kernels.one_shot.sweeps.results import Group, Result


def write_table(folder: SweepFolder, results: Sequence[Result], groups: Sequence[Group]) -> str:
    """Writes table.jsonl and table.md, and returns the text of table.md."""
    write_text(folder.rows, "".join(json_line(result.to_row()) for result in results))
    decodings = [decoding for decoding in DECODINGS if any(group.accuracy(decoding) for group in groups)]
    head = [*groups[0].settings, "runs", "failed", "loss", "entropy"]
    head += [f"{decoding} {when}" for decoding in decodings for when in ("before", "after", "best (step)")]
    table = markdown_table(head, [_row(group, decodings) for group in groups], texts=len(groups[0].settings))
    settings = settings_lines({result.run.name: result.made for result in results if result.made})
    text = "\n\n".join(["\n".join(table), *_notes(results), "## Settings", "\n".join(settings)]) + "\n"
    write_text(folder.table, text)
    return text


def _row(group: Group, decodings: Sequence[str]) -> list[str]:
    cells = [label(value) for value in group.settings.values()]
    cells += [str(len(group.finished)), str(group.failed)]
    for metric in ("loss", "entropy"):
        last = group.last(metric)
        cells.append("-" if last is None else f"{last:.4f}")
    for decoding in decodings:
        accuracy, last = group.accuracy(decoding), group.last_accuracy(decoding)
        if not accuracy or last is None:
            cells += ["-", "-", "-"]
            continue
        best = max(accuracy, key=lambda step: accuracy[step].mean)
        before = str(accuracy[0]) if 0 in accuracy else "-"
        cells += [before, str(last), f"{accuracy[best]} ({best})"]
    return cells


def _notes(results: Sequence[Result]) -> list[str]:
    notes = [
        "Means over the finished runs of a row, which differ in their seed, ± the standard error over these seeds. "
        "Loss (at the training temperature) and entropy (at temperature 1) are of each run's last step, in nats; the "
        "best step is among those after which all of them were measured.",
    ]
    problems = max(result.problems for result in results)
    if problems:
        notes.append(
            f"Accuracies are on {problems} problems, greedy and sampled at temperature 1. The error that comes from "
            f"these being few is not in the standard error over seeds. {CHOSEN_ON}"
        )
    return [*notes, *built_in_lines({"settings": {"model": result.run.config.model}} for result in results)]
