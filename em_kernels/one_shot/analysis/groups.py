"""Groups of runs that differ in the seed alone: what to call them, and their metrics with the spread over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from em_kernels.one_shot.analysis.runs import Run, comparable, differing, group_runs
from em_kernels.one_shot.analysis.settings import setting_text

# More settings than these would not fit a legend.
_NAMED_SETTINGS = 2


@dataclass(frozen=True)
class Band:
    """A metric by step over the runs of a group.

    Attributes:
        steps: the steps at which one of the runs has the metric.
        mean: the mean over the runs that have it.
        deviation: the standard deviation over them, NaN where there is one run.
    """

    steps: list[int]
    mean: list[float]
    deviation: list[float]


@dataclass(frozen=True)
class Group:
    """Runs that differ in the seed alone.

    Attributes:
        name: a letter, or "all" where there is one group.
        what: the settings that tell the group from the others; empty where there is one group.
        runs: the runs.
    """

    name: str
    what: str
    runs: Sequence[Run]

    @property
    def title(self) -> str:
        return f"{self.name}: {self.what}" if self.what else self.name

    @property
    def config(self) -> dict[str, Any]:
        return comparable(self.runs[0])

    def band(self, metric: str) -> Band:
        return band_of([run.values(metric) for run in self.runs])


def named_groups(runs: Iterable[Run]) -> list[Group]:
    """The runs in groups, in the order of each group's first run."""
    groups = group_runs(runs)
    if len(groups) == 1:
        return [Group("all", "", groups[0])]
    names = differing(comparable(group[0]) for group in groups)
    texts = [{name: _setting_text(group[0], name) for name in names} for group in groups]
    named = _telling(names, texts)
    more = f" and {len(names) - len(named)} more" if len(names) > len(named) else ""
    return [
        Group(_letter(i), ", ".join(texts[i][name] for name in named) + more, group) for i, group in enumerate(groups)
    ]


def band_of(series: Iterable[dict[int, float]]) -> Band:
    """The mean and the standard deviation by step of several series by step."""
    by_step: dict[int, list[float]] = {}
    for values in series:
        for step, value in values.items():
            by_step.setdefault(step, []).append(value)
    steps = sorted(by_step)
    spread = [stdev(by_step[step]) if len(by_step[step]) > 1 else math.nan for step in steps]
    return Band(steps, [fmean(by_step[step]) for step in steps], spread)


def _setting_text(run: Run, name: str) -> str:
    text = setting_text(name, comparable(run).get(name))
    # A legend has no room for the folders of a model.
    text = Path(text).name if name == "model" else text
    return text if name in ("prompts", "model") else f"{name} {text}"


def _telling(names: Sequence[str], texts: Sequence[Mapping[str, str]]) -> list[str]:
    """As many of the settings as a legend has room for, each of which tells the most groups apart beside the others."""
    chosen: list[str] = []
    while len(chosen) < min(_NAMED_SETTINGS, len(names)):
        left = [name for name in names if name not in chosen]
        chosen.append(max(left, key=lambda name: len({(*(own[one] for one in chosen), own[name]) for own in texts})))
    return [name for name in names if name in chosen]


def _letter(number: int) -> str:
    """A to Z, then A2 to Z2, and so on."""
    round_, letter = divmod(number, 26)
    return chr(ord("A") + letter) + (str(round_ + 1) if round_ else "")
