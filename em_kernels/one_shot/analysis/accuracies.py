"""The accuracies of a run by step: where they were highest, and differences on the same problems with their errors."""

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from em_kernels.one_shot.analysis.runs import Run
from em_kernels.one_shot.evaluation.records import Record, scores
from em_kernels.one_shot.evaluation.statistics import Estimate, paired_difference

# What evaluations.jsonl calls the two ways of decoding, and the temperature that its records have.
DECODINGS = {"greedy": 0.0, "sampled": 1.0}
CHOSEN_ON = (
    "The best step is chosen on the problems that it is shown on, so its accuracy is flattered; "
    "that of the last step is not."
)


@dataclass(frozen=True)
class Course:
    """The accuracy of a run under one decoding: before training, after the best step and after the last one measured.

    Attributes:
        decoding: "greedy" or "sampled".
        by_step: the accuracy and its standard error by step; 0 is before training, where it was measured.
        problems: the number of problems.
        best: the step with the highest accuracy, the earliest one of several.
        last: the last step at which accuracy was measured.
    """

    decoding: str
    by_step: dict[int, Estimate]
    problems: int
    best: int
    last: int


def courses(run: Run) -> list[Course]:
    """The courses of a run, one for each decoding that it was evaluated with."""
    found = []
    for decoding in DECODINGS:
        rows = run.accuracies(decoding)
        if rows:
            by_step = {step: Estimate(row["accuracy"], row["standard_error"]) for step, row in rows.items()}
            best = max(by_step, key=lambda step: (by_step[step].mean, -step))
            found.append(Course(decoding, by_step, rows[best]["problems"], best, max(by_step)))
    return found


def difference(run: Run, decoding: str, first: int, second: int) -> Estimate | None:
    """The accuracy after the second step less that after the first, problem by problem.

    None where the completions of one of the two steps were not kept, or were of other problems.
    """
    before, after = (scores(run.records(step), DECODINGS[decoding], _asked) for step in (first, second))
    return paired_difference(before, after) if before and before.keys() == after.keys() else None


def difference_text(estimate: Estimate | None) -> str:
    """A difference in percentage points with its error, and whether the error explains it."""
    if estimate is None:
        return "not known: completions were not kept"
    unseen = ", no difference seen" if estimate.known else ", error unknown"
    return points_text(estimate) + ("" if estimate.seen else unseen)


def points_text(estimate: Estimate) -> str:
    return f"{Estimate(100 * estimate.mean, 100 * estimate.standard_error):+.1f} points"


def when(step: int) -> str:
    return f"after step {step}" if step else "before training"


def last_scores(runs: Iterable[Run], decoding: str) -> dict[Hashable, list[float]]:
    """The scores after the last step that each run measured, by problem, those of all runs together."""
    together: dict[Hashable, list[float]] = {}
    for run in runs:
        steps = run.accuracies(decoding)
        for problem, values in (scores(run.records(max(steps)), DECODINGS[decoding], _asked) if steps else {}).items():
            together.setdefault(problem, []).extend(values)
    return together


def _asked(record: Record) -> Hashable:
    # Two runs may have drawn other problems under the same number.
    return record.task, record.question
