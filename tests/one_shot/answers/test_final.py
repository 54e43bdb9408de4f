import pytest

from em_kernels.one_shot.answers.final import final_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("First $\\boxed{1}$. So $x = \\boxed{\\frac{\\{3\\}}{4}}$, as 5 shows.", "\\frac{\\{3\\}}{4}"),
        ("$\\boxed{2}$ and $\\boxed{3}$", "2, 3"),
        ("$\\boxed{2}$. Again: the box is $\\boxed{3}$", "3"),
        ("\\boxed{7} \\boxed{7} \\boxed{7}", "7"),
        ("\\boxed{41.8}^{\\circ}", "41.8^{\\circ}"),
        ("\\boxed{12.5}\\%", "12.5\\%"),
        ("\\boxed{3} or \\boxed{unfinished", "3"),
        ("1 + 1 = 2\n#### 1,002\nDone 3.", "1,002"),
        ("The answer is 5 because 2 + 3 = 5.", "5"),
        ("The answer is that Ann has 12 apples left, of 15.", "12 apples"),
        ("The answer is 4. The correct answer is 5.", "5"),
        ("**Answer:** $3$ or $-3$.", "$3$ or $-3$"),
        ("The answer is:\n\\[ x = 5 \\]", "\\[ x = 5 \\]"),
        ("Final answer: Evelyn", "Evelyn"),
        ("So 24 - 5 = 19 melons are left.", "19 melons"),
        ("It costs $3.50 and not $4.", "$4"),
        ("We get $x^2 = 4$ and hence $x = 2$.", "$x = 2$"),
        ("She has 3 apples. In the end, she has no one else's and twenty-five of her own.", "25"),
        ("So he saves 34 a month", "34"),
        ("Her net proceeds are $118 000.", "$118 000"),
        ("So these are 3, 5, and 7.", "3, 5, and 7"),
        ("In all that makes 15 square meters.", "15 square meters"),
        ("A third of it is -2.5e3 m", "-2.5e3 m"),
        ("Nothing comes of this.", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text) == answer
