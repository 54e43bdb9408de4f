"""Accepted answers of published problems, rewritten in the ways in which models write them, and wrong ones near them.

A line of rewritten_answers.tsv has the problem set, an accepted answer as the set has it (with its unit after an @,
where that is in a field of its own), the kind of text that the rewriting is for, the rewriting, and a wrong answer.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.evaluation.grading import Grader, Verdict

_CLOTHES: dict[str, tuple[Callable[[str], str], ...]] = {
    "formula": (
        lambda x: f"First, 2 + 3 = 5. The result is $\\boxed{{{x}}}$.",
        lambda x: f"We get\n\\[\n\\boxed{{{x}}}\n\\]\nwhich we have checked for all 10 cases.",
        lambda x: f"Step 1: $a = 1$.\n\nThe answer is ${x}$.",
        lambda x: f"**Final Answer:** \\( {x} \\)",
        lambda x: f"The final answer is: $\\boxed{{{x}}}$. I hope it is correct.",
    ),
    "words": (
        lambda x: f"It goes on and on. The answer is {x}.",
        lambda x: f"So we see.\n#### {x}",
        lambda x: f"The answer is $\\boxed{{\\text{{{x}}}}}$.",
    ),
    "prose": (
        lambda x: f"Ann has 3 bags and 4 more. The answer is {x}.",
        lambda x: f"Let us count.\n3 + 4 = 7\n#### {x}",
        lambda x: f"First there were 3. In the end, that makes {x}.",
        lambda x: f"Answer: {x}",
        lambda x: f"Therefore, the correct answer is **{x}**.",
    ),
}


class _Case(NamedTuple):
    source: str
    answer: str
    kind: str
    right: str
    wrong: str


_LINES = (Path(__file__).parent / "rewritten_answers.tsv").read_text(encoding="utf-8").splitlines()
_CASES = [_Case(*line.split("\t")) for line in _LINES]


@pytest.fixture(scope="module")
def grader() -> Iterator[Grader]:
    with Grader() as grader:
        yield grader


def test_there_are_enough() -> None:
    assert len({case.answer for case in _CASES if case.right != case.answer.partition(" @ ")[0]}) >= 200


@pytest.mark.parametrize("source", sorted({case.source for case in _CASES}))
def test_rewritten_answers_are_right_and_wrong_ones_near_them_are_not(grader: Grader, source: str) -> None:
    failed = []
    for case in (case for case in _CASES if case.source == source):
        answer, _, unit = case.answer.partition(" @ ")
        problem = Problem("?", (answer,), unit or None)
        for dress in _CLOTHES[case.kind]:
            for rewriting, expected in ((case.right, Verdict.RIGHT), (case.wrong, Verdict.WRONG)):
                grade = grader.grade(dress(rewriting), problem)
                if grade.verdict is not expected:
                    failed.append((case.answer, dress(rewriting), grade))
    assert not failed
