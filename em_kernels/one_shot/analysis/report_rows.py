"""Every number of the report's tables and pictures, for a script: a row is a line of JSON, "what" names its kind."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

from em_kernels.one_shot.analysis.accuracies import DECODINGS
from em_kernels.one_shot.analysis.group_accuracies import accuracy_band, group_differences, seed_means
from em_kernels.one_shot.analysis.groups import Band, Group
from em_kernels.one_shot.analysis.published import ACCURACIES, AUTHOR_LOSSES, AUTHOR_LOSSES_SOURCE
from em_kernels.one_shot.analysis.report import COUNTED, CURVES
from em_kernels.one_shot.analysis.run_rows import run_rows


def report_rows(groups: Sequence[Group]) -> Iterator[dict[str, Any]]:
    """The rows of each run, of each group, of what tells the groups apart, and of the published figures."""
    for group in groups:
        for run in group.runs:
            yield from ({"group": group.name, **row} for row in run_rows(run))
            for row in run.evaluations:
                counted = {name: row.get(name) for name, _ in COUNTED}
                own = {"run": run.name, "decoding": row["decoding"], "step": row["step"]}
                yield {"group": group.name, "what": "completions", **own, **counted}
        yield from _group_rows(group)
    for difference in group_differences(groups):
        change = {"change": difference.change.mean, "standard_error": difference.change.standard_error}
        own = {"decoding": difference.decoding, "group": difference.group, "less": difference.less}
        yield {"what": "difference of groups", **own, **change}
    for accuracy in ACCURACIES:
        yield {"what": "published accuracies", **asdict(accuracy), "average": accuracy.average}
    for step, loss in enumerate(AUTHOR_LOSSES, start=1):
        yield {"what": "published loss", "step": step, "loss": loss, "source": AUTHOR_LOSSES_SOURCE}


def _group_rows(group: Group) -> Iterator[dict[str, Any]]:
    yield {"what": "group", "group": group.name, "title": group.title, "runs": [run.name for run in group.runs]}
    for name, _, _ in CURVES:
        yield from _curve(group, name, group.band(name), over="seeds")
    for decoding in DECODINGS:
        band, over_seeds = accuracy_band(group, decoding)
        yield from _curve(group, f"accuracy, {decoding}", band, over="seeds" if over_seeds else "problems")
    for means in seed_means(group):
        yield {"what": "means over seeds", "group": group.name, **asdict(means)}


def _curve(group: Group, metric: str, band: Band, *, over: str) -> Iterator[dict[str, Any]]:
    for step, mean, deviation in zip(band.steps, band.mean, band.deviation, strict=True):
        own = {"what": "curve", "group": group.name, "metric": metric, "step": step}
        yield {**own, "mean": mean, "deviation": deviation, "deviation_over": over}
