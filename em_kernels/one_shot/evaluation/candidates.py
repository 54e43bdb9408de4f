"""Graded completions as candidates for a training prompt."""

from collections.abc import Callable, Sequence

from em_kernels.one_shot.data.selection import Candidate
from em_kernels.one_shot.evaluation.grading import Verdict
from em_kernels.one_shot.evaluation.majority import Vote, majority
from em_kernels.one_shot.evaluation.records import Record


def candidates(records: Sequence[Record], *, same: Callable[[str, str], bool] | None) -> list[Candidate]:
    """The problems of the records, in the order of their tasks, with what counts as a success of each completion.

    Args:
        records: graded completions of one model.
        same: whether two answers that are not spelled alike are the same, where a completion succeeds that agrees with
            the majority; None where one succeeds that is right.
    """
    problems: dict[tuple[str, int], list[Record]] = {}
    # Completions come in the order in which they end.
    for record in sorted(records, key=lambda record: (record.problem, record.sample)):
        problems.setdefault((record.task, record.problem), []).append(record)
    return [
        Candidate(task, problem, own[0].question, own[0].answers, _successes(own, same))
        for (task, problem), own in problems.items()
    ]


def _successes(records: Sequence[Record], same: Callable[[str, str], bool] | None) -> list[bool]:
    if same is None:
        return [record.verdict == Verdict.RIGHT.value for record in records]
    most = set(majority([Vote(record.answer, record.verdict) for record in records], same))
    return [i in most for i in range(len(records))]
