import pytest

from em_kernels.one_shot.answers.words import with_numerals


@pytest.mark.parametrize(
    ("text", "numerals"),
    [
        ("seven apples", "7 apples"),
        ("Forty-two", "42"),
        ("one hundred and twenty", "120"),
        ("two thousand five hundred", "2500"),
        ("three million, two hundred thousand and six", "3200006"),
        ("one thousand, two thousand", "1000, 2000"),
        ("one thousand, six hundred and twenty-five pounds", "1625 pounds"),
        ("a hundred", "a 100"),
        ("minus three", "-3"),
        ("two point five zero", "2.50"),
        ("one half", "1/2"),
        ("three quarters of it", "3/4 of it"),
        ("a quarter of the pizza", "1/4 of the pizza"),
        ("two and a half", "5/2"),
        ("two and three", "two and three"),
        ("one thousand, two", "1000, 2"),
        ("ten thousand, five and six", "10000, five and six"),
        ("five hundred two hundred", "five hundred two hundred"),
        ("twenty-five hundred", "2500"),
        ("The third of the seven", "The third of the 7"),
        ("someone often weighs tonnes", "someone often weighs tonnes"),
    ],
)
def test_numbers_in_words(text: str, numerals: str) -> None:
    assert with_numerals(text) == numerals
