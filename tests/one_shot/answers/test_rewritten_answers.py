"""Accepted answers, rewritten in the ways in which models write them, and wrong ones in the same clothes."""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from em_kernels.one_shot.answers.grading import grade_answer


class _Gold(NamedTuple):
    """An accepted answer, ways to write it, and for each of these ways a wrong answer written so."""

    answer: str
    right: tuple[str, ...]
    wrong: tuple[str, ...]


_FORMULAS = (
    _Gold("12", ("12", "12.0", "x = 12", "24 / 2"), ("13", "12.5", "x = 21", "24 / 3")),
    _Gold("-7", ("-7", "-14/2"), ("7", "-14/3")),
    _Gold("2,125", ("2125", "2,125", "2{,}125"), ("2126", "2,152", "2{,}521")),
    _Gold("\\frac{3}{4}", ("0.75", "\\dfrac34", "\\frac{6}{8}", "3/4"), ("0.74", "\\dfrac43", "\\frac{6}{7}", "3/5")),
    _Gold("2\\frac{1}{2}", ("2.5", "\\frac{5}{2}", "5/2"), ("1.5", "\\frac{5}{3}", "2/5")),
    _Gold("0.6666666667", ("\\frac{2}{3}", "0.66667"), ("\\frac{3}{2}", "0.66766")),
    _Gold("3\\sqrt{13}", ("3 \\sqrt{13}", "\\sqrt{117}", "10.8167"), ("13 \\sqrt{3}", "\\sqrt{118}", "10.8617")),
    _Gold("12\\pi", ("12 \\pi", "\\pi \\cdot 12", "37.699"), ("6 \\pi", "\\pi \\cdot 13", "37.688")),
    _Gold("4.5e33", ("4.5 \\times 10^{33}", "45 \\cdot 10^{32}"), ("4.5 \\times 10^{32}", "45 \\cdot 10^{33}")),
    _Gold("12.5\\%", ("12.5\\%", "0.125", "\\frac{1}{8}"), ("1.25\\%", "0.0125", "\\frac{1}{9}")),
    _Gold("90^\\circ", ("90", "90^{\\circ}", "\\frac{\\pi}{2}"), ("60", "60^{\\circ}", "\\frac{\\pi}{3}")),
    _Gold(
        "15 \\text{ cm}^2",
        ("15", "15 \\text{ cm}^2", "0.0015 \\mathrm{~m}^{2}"),
        ("16", "15 \\text{ m}^2", "0.15 \\mathrm{~m}^{2}"),
    ),
    _Gold("\\$18.90", ("\\$18.90", "18.9", "18.90 \\text{ dollars}"), ("\\$19.80", "19.8", "18.80 \\text{ dollars}")),
    _Gold("5 \\text{ km}", ("5000 \\text{ m}", "5 \\text{ kilometers}"), ("5 \\text{ m}", "5 \\text{ millimeters}")),
    _Gold("1,-2", ("-2, 1", "\\{1, -2\\}", "x = 1, x = -2"), ("-2, 2", "\\{1\\}", "x = 1, x = -1")),
    _Gold(
        "1 \\pm \\sqrt{19}", ("1-\\sqrt{19}, 1+\\sqrt{19}", "1 \\pm \\sqrt{19}"), ("1-\\sqrt{19}", "1 \\pm \\sqrt{17}")
    ),
    _Gold("(3,4]", ("(3, 4]", "3 < x \\leq 4", "x \\in (3,4]"), ("[3, 4]", "3 < x < 4", "x \\in (4,3]")),
    _Gold("(-\\infty,2)\\cup(3,\\infty)", ("(3, \\infty) \\cup (-\\infty, 2)",), ("(3, \\infty) \\cup (-\\infty, 2]",)),
    _Gold("(5,\\infty)", ("x > 5", "5 < x"), ("x \\ge 5", "5 > x")),
    _Gold(
        "(6,31,-1)", ("(6, 31, -1)", "\\left( 6,\\, 31,\\, -1 \\right)"), ("(6, -1, 31)", "\\left( 6,\\, 31 \\right)")
    ),
    _Gold("f(n)=2n+1", ("2n+1", "f(n) = 1 + 2n"), ("2n-1", "f(n) = 2 + n")),
    _Gold("x^3+3x-6", ("x^3 - 6 + 3x",), ("x^3 - 3 + 6x",)),
    _Gold("52_8", ("52_8", "52_{8}", "52"), ("52_7", "25_{8}", "42")),
    _Gold("6 - 5i", ("6-5i", "-5i + 6"), ("6+5i", "-6i + 5")),
    _Gold(
        "\\begin{pmatrix} -2 \\\\ 7 \\end{pmatrix}",
        ("(-2, 7)", "\\begin{pmatrix} -2 \\\\ 7 \\end{pmatrix}"),
        ("(7, -2)", "\\begin{pmatrix} 2 \\\\ 7 \\end{pmatrix}"),
    ),
    _Gold("\\text{(C)}", ("\\text{C}", "(C)"), ("\\text{D}", "(D)")),
    _Gold("\\text{Evelyn}", ("\\text{Evelyn}",), ("\\text{Navin}",)),
)
_PROSE = (
    _Gold("12", ("12", "twelve", "12 apples", "twelve apples"), ("13", "twenty", "21 apples", "eleven apples")),
    _Gold("2,125", ("2,125", "$2,125", "2125 dollars"), ("2,152", "$2,152", "2126 dollars")),
    _Gold("42", ("forty-two", "42.0", "42 km"), ("forty-three", "42.5", "24 km")),
    _Gold("\\frac{1}{2}", ("1/2", "0.5", "one half", "50%"), ("1/3", "0.6", "one third", "5%")),
    _Gold("2.5", ("two and a half", "2 1/2", "2.50 hours"), ("three and a half", "2 1/3", "2.05 hours")),
    _Gold("120", ("one hundred and twenty", "120 miles per hour"), ("one hundred and two", "102 miles per hour")),
    _Gold("12.8", ("12.8", "12.80 miles per hour"), ("12.7", "12.08 miles per hour")),
    _Gold("-3", ("-3", "minus three", "-3 °C"), ("3", "minus four", "-4 °C")),
)
_FORMULA_CLOTHES: tuple[Callable[[str], str], ...] = (
    lambda x: f"First, 2 + 3 = 5. The result is $\\boxed{{{x}}}$.",
    lambda x: f"We get\n\\[\n\\boxed{{{x}}}\n\\]\nwhich we have checked for all 10 cases.",
    lambda x: f"Step 1: $a = 1$.\n\nThe answer is ${x}$.",
    lambda x: f"**Final Answer:** \\( {x} \\)",
    lambda x: f"The final answer is: $\\boxed{{{x}}}$. I hope it is correct.",
)
_PROSE_CLOTHES: tuple[Callable[[str], str], ...] = (
    lambda x: f"Ann has 3 bags and 4 more. The answer is {x}.",
    lambda x: f"Let us count.\n3 + 4 = 7\n#### {x}",
    lambda x: f"First there were 3. In the end, that makes {x}.",
    lambda x: f"Answer: {x}",
    lambda x: f"Therefore, the correct answer is **{x}**.",
)


def _cases() -> Iterator[tuple[str, str, bool]]:
    for golds, clothes in ((_FORMULAS, _FORMULA_CLOTHES), (_PROSE, _PROSE_CLOTHES)):
        for gold in golds:
            for right, wrong in zip(gold.right, gold.wrong, strict=True):
                for dress in clothes:
                    yield gold.answer, dress(right), True
                    yield gold.answer, dress(wrong), False


def test_there_are_enough() -> None:
    assert sum(right for _, _, right in _cases()) >= 200


@pytest.mark.parametrize("right", [True, False], ids=["right", "wrong"])
@pytest.mark.parametrize("gold", [*_FORMULAS, *_PROSE], ids=lambda gold: gold.answer)
def test_rewritten_answers_are_recognised(gold: _Gold, right: bool) -> None:
    failed = []
    for answer, text, expected in _cases():
        if answer == gold.answer and expected is right:
            verdict, found = grade_answer(text, [answer], None, 0.0, 0.0)
            if verdict is not expected:
                failed.append((text, found, verdict))
    assert not failed
