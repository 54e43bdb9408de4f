"""What graded completions say of a model on a task at a temperature."""

import math
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from em_kernels.one_shot.evaluation.grading import Verdict
from em_kernels.one_shot.evaluation.majority import Vote, majority
from em_kernels.one_shot.evaluation.records import Record
from em_kernels.one_shot.evaluation.statistics import Estimate, mean_over_problems, pass_at_k


@dataclass(frozen=True)
class Scores:
    """The scores of a model on a task at a temperature; all shares are of 1.

    Attributes:
        task: the name of the task.
        model: the name of the model.
        temperature: the temperature of sampling; 0 took the most likely token.
        by_problem: for each problem, 1 for each right completion and 0 for each other.
        accuracy: the share of right completions, with its standard error clustered by problem.
        pass_at: for each k, the chance that one of k completions is right, where there are as many.
        voted: the share of problems whose most frequent answer is right; None where a problem has one completion.
        length: the mean length of a completion, in tokens.
        truncated: the share of completions that were cut off at the longest length.
        unreadable: the number of completions without an answer that could be read.
        unfinished: the number of completions that were cut off before they concluded.
        varied: whether any two completions of a problem differ, which they do wherever they are drawn.
    """

    task: str
    model: str
    temperature: float
    by_problem: dict[Hashable, list[float]]
    accuracy: Estimate
    pass_at: dict[int, Estimate]
    voted: Estimate | None
    length: float
    truncated: float
    unreadable: int
    unfinished: int
    varied: bool


def score(
    records: Sequence[Record],
    *,
    tasks: Sequence[str],
    models: Sequence[str],
    ks: Sequence[int],
    same: Callable[[str, str], bool],
) -> list[Scores]:
    """The scores of each task, temperature and model, in this order.

    Args:
        records: graded completions, in any order.
        tasks: the names of the tasks, in the order in which they are to be shown.
        models: the names of the models, in the same way.
        ks: the k of pass@k.
        same: whether two answers that are not spelled alike are the same.
    """
    cells: dict[tuple[int, float, int], list[Record]] = {}
    for record in records:
        place = tasks.index(record.task), record.temperature, models.index(record.model)
        cells.setdefault(place, []).append(record)
    return [_score(cells[place], ks, same) for place in sorted(cells)]


def _score(records: Sequence[Record], ks: Sequence[int], same: Callable[[str, str], bool]) -> Scores:
    by_problem: dict[Hashable, list[Record]] = {}
    # Completions come in the order in which they end; votes that are as many are decided by the sample's number.
    for record in sorted(records, key=lambda record: (record.problem, record.sample)):
        by_problem.setdefault(record.problem, []).append(record)
    right = {
        problem: [float(record.verdict == Verdict.RIGHT.value) for record in own] for problem, own in by_problem.items()
    }
    fewest = min(map(len, right.values()))
    verdicts = [record.verdict for record in records]
    return Scores(
        task=records[0].task,
        model=records[0].model,
        temperature=records[0].temperature,
        by_problem=right,
        accuracy=mean_over_problems(right),
        pass_at={
            k: mean_over_problems({p: [pass_at_k(len(own), int(sum(own)), k)] for p, own in right.items()})
            for k in ks
            if k <= fewest
        },
        voted=mean_over_problems({p: [_voted(own, same)] for p, own in by_problem.items()}) if fewest > 1 else None,
        length=math.fsum(record.tokens for record in records) / len(records),
        truncated=sum(record.truncated for record in records) / len(records),
        unreadable=verdicts.count(Verdict.UNREADABLE.value),
        unfinished=verdicts.count(Verdict.UNFINISHED.value),
        varied=any(len({record.completion for record in own}) > 1 for own in by_problem.values()),
    )


def _voted(records: Sequence[Record], same: Callable[[str, str], bool]) -> float:
    most = majority([Vote(record.answer, record.verdict) for record in records], same)
    return float(bool(most) and records[most[0]].verdict == Verdict.RIGHT.value)
