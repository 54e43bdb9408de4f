import pytest

from em_kernels.one_shot.evaluation.grading import Grader
from em_kernels.one_shot.evaluation.majority import Vote, majority


def _never(answer: str, other: str) -> bool:
    raise AssertionError(f"{answer} and {other} need no comparison")


def _votes(*answers: str | None) -> list[Vote]:
    return [Vote(answer, "ungraded") for answer in answers]


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["3", "4", "4"], [1, 2]),
        (["4", None, "3", None], [0]),
        ([None, None], []),
        ([], []),
        (["1,000", "1000.0", "$1000$", "1000."], [0, 1, 2, 3]),
        (["5 km", "5  KM", "6 km"], [0, 1]),
        (["-0.5", "-.50", "0.5"], [0, 1]),
        (["\\frac{1}{2}", "\\dfrac{1}{2}", "\\frac 12"], [0, 1]),
    ],
)
def test_answers_that_look_alike_are_the_same_without_a_comparison(
    answers: list[str | None], expected: list[int]
) -> None:
    same = _never if "\\frac 12" not in answers else (lambda answer, other: False)
    assert majority(_votes(*answers), same) == expected


def test_other_answers_are_compared_as_the_grader_compares() -> None:
    with Grader() as grader:
        found = majority(_votes("\\frac{1}{2}", "2", "0.5", "x + 1", "1 + x", "50\\%"), grader.same)
        assert found == [0, 2, 5]
        assert majority(_votes("100200", "100,200", "100, 200"), grader.same) == [0, 1]
        assert majority(_votes("7", "100,200", "100, 200"), grader.same) == [1, 2]
        assert grader.same("3400 m", "3.4 km")
        assert not grader.same("\\frac{1}{", "\\frac{1}{2}")


def test_right_and_wrong_answers_are_different() -> None:
    votes = [Vote("12.7", "wrong"), Vote("8\\sqrt[3]{4}", "right"), Vote("127/10", "wrong"), Vote("12.7", "right")]
    assert majority(votes, lambda answer, other: True) == [0, 2]
