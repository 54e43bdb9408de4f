from typing import Any

import pytest

from em_kernels.one_shot.evaluation.records import Record
from em_kernels.one_shot.evaluation.scores import score
from em_kernels.one_shot.evaluation.statistics import Estimate


def _record(problem: int, sample: int, answer: str | None, verdict: str, temperature: float = 1.0) -> Record:
    truncated = verdict == "unfinished"
    return Record("t", problem, sample, temperature, "?", ("4",), "", answer, verdict, 10 + sample, truncated, "m")


_ORDER: dict[str, Any] = {"tasks": ["t"], "models": ["m"]}
# Problem 0 has two right answers of three, in an order in which completions may end; problem 1 has one.
_RECORDS = [
    _record(0, 2, "4", "right"),
    _record(1, 0, "5", "wrong"),
    _record(0, 0, "4.0", "right"),
    _record(1, 2, None, "unfinished"),
    _record(0, 1, None, "unreadable"),
    _record(1, 1, "4", "right"),
]


def test_scores_of_a_cell() -> None:
    [found] = score(_RECORDS, **_ORDER, ks=[1, 2, 3, 4], same=lambda answer, other: False)
    assert (found.task, found.model, found.temperature) == ("t", "m", 1.0)
    assert found.by_problem == {0: [1.0, 0.0, 1.0], 1: [0.0, 1.0, 0.0]}
    assert found.accuracy.mean == pytest.approx(1 / 2)
    # The means of the two problems, 2/3 and 1/3, are the sample.
    assert found.accuracy.standard_error == pytest.approx(1 / 6)
    assert {k: estimate.mean for k, estimate in found.pass_at.items()} == pytest.approx({1: 1 / 2, 2: 5 / 6, 3: 1.0})
    # The votes of problem 1 are one each, and the first of them, which is wrong, counts.
    assert found.voted == Estimate(0.5, 0.5)
    assert (found.length, found.truncated, found.unreadable, found.unfinished) == (11.0, pytest.approx(1 / 6), 1, 1)
    # All texts are empty.
    assert not found.varied


def test_cells_are_kept_apart_and_one_completion_has_no_majority() -> None:
    found = score([*_RECORDS, _record(0, 0, "4", "right", 0.0)], **_ORDER, ks=[2], same=lambda answer, other: False)
    assert [one.temperature for one in found] == [0.0, 1.0]
    assert found[0].voted is None
    assert found[0].pass_at == {}
    assert found[0].accuracy.mean == 1.0


def test_tasks_and_models_stand_in_the_order_that_is_asked_for() -> None:
    records = [
        Record(task, 0, 0, temperature, "?", ("4",), "", "4", "right", 1, False, model)
        for model in ("b", "a")
        for temperature in (1.0, 0.0)
        for task in ("t", "s")
    ]
    found = score(records, tasks=["s", "t"], models=["a", "b"], ks=[], same=lambda answer, other: False)
    assert [(one.task, one.temperature, one.model) for one in found] == [
        (task, temperature, model) for task in ("s", "t") for temperature in (0.0, 1.0) for model in ("a", "b")
    ]
