"""What the runs of a sweep measured, one run after another and as means over seeds."""

import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.statistics import Estimate, mean_of
from em_kernels.one_shot.sweeps.folder import Run


@dataclass(frozen=True)
class Result:
    """What one run left.

    Attributes:
        run: the run.
        state: "finished", "failed" or "unfinished".
        metrics: the lines of metrics.jsonl.
        accuracies: for each decoding the accuracy after each step it was measured after; step 0 is before training.
        problems: the number of problems the accuracies are on.
        made: the settings, versions and device that the run's config.json names; empty of a run that has not begun.
    """

    run: Run
    state: str
    metrics: Sequence[dict[str, Any]]
    accuracies: dict[str, dict[int, float]]
    problems: int
    made: dict[str, Any]

    def to_row(self) -> dict[str, Any]:
        """The line of table.jsonl."""
        row = {"run": self.run.name, **self.run.settings, "state": self.state, "steps": len(self.metrics)}
        if self.metrics:
            row |= {name: self.metrics[-1][name] for name in ("loss", "entropy")}
        for decoding, accuracies in self.accuracies.items():
            best = max(accuracies, key=accuracies.__getitem__)
            row |= {
                f"{decoding}_before": accuracies.get(0),
                f"{decoding}_after": accuracies[max(accuracies)],
                f"{decoding}_best": accuracies[best],
                f"{decoding}_best_step": best,
            }
        return row


@dataclass(frozen=True)
class Group:
    """The runs of a combination that differ in their seed alone.

    Attributes:
        settings: the combination, without the seed.
        finished: the results of the runs that are finished; all means are over these.
        failed: the number of runs that failed.
    """

    settings: dict[str, Any]
    finished: list[Result]
    failed: int

    def last(self, metric: str) -> Estimate | None:
        """The mean of a metric of each run's own last step, which differ where a rule ends runs; None without runs."""
        values = [result.metrics[-1][metric] for result in self.finished if result.metrics]
        return mean_of(values) if values else None

    def last_accuracy(self, decoding: str) -> Estimate | None:
        """The mean of each run's own last accuracy; None where none was measured."""
        measured = [result.accuracies[decoding] for result in self.finished if result.accuracies.get(decoding)]
        return mean_of([accuracies[max(accuracies)] for accuracies in measured]) if measured else None

    def curve(self, metric: str) -> dict[int, Estimate]:
        """The mean of a metric after each step that all runs took."""
        steps = zip(*(result.metrics for result in self.finished), strict=False)
        return {rows[0]["step"]: mean_of([row[metric] for row in rows]) for rows in steps}

    def accuracy(self, decoding: str) -> dict[int, Estimate]:
        """The mean accuracy after each step that all runs were measured after; empty where none was measured."""
        measured = [result.accuracies.get(decoding, {}) for result in self.finished]
        steps = sorted(set.intersection(*map(set, measured))) if measured else []
        return {step: mean_of([accuracies[step] for accuracies in measured]) for step in steps}


def read_result(run: Run, *, failed: bool) -> Result:
    """Reads what the run left in its folder, which need not exist.

    Raises:
        UsageError: a file of the folder is damaged.
    """
    try:
        metrics, evaluations = run.folder.read_metrics(), run.folder.read_evaluations()
        state = "finished" if run.finished else "failed" if failed else "unfinished"
        made = json.loads(run.folder.config.read_text(encoding="utf-8")) if run.folder.config.exists() else {}
        made = {"settings": made.pop("config"), **made} if made else {}
    except (KeyError, ValueError) as error:
        raise UsageError(f"run folder {run.folder.path} has a damaged file ({error})") from None
    accuracies: dict[str, dict[int, float]] = {}
    for line in evaluations:
        accuracies.setdefault(line["decoding"], {})[line["step"]] = line["accuracy"]
    problems = max((line["problems"] for line in evaluations), default=0)
    return Result(run, state, metrics, accuracies, problems, made)


def group_by_settings(results: Collection[Result]) -> list[Group]:
    """The results of all seeds of a combination together, in the order of the runs."""
    groups: dict[str, list[Result]] = {}
    for result in results:
        groups.setdefault(json.dumps(_without_seed(result)), []).append(result)
    return [
        Group(
            _without_seed(members[0]),
            [result for result in members if result.state == "finished"],
            sum(result.state == "failed" for result in members),
        )
        for members in groups.values()
    ]


def _without_seed(result: Result) -> dict[str, Any]:
    return {name: value for name, value in result.run.settings.items() if name != "seed"}
