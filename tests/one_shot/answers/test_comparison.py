import pytest

from em_kernels.one_shot.answers.comparison import Tolerance, compare

_SAME = [
    ("\\frac{14}{3}", "14/3"),
    ("x=5", "5"),
    ("2 + 3 = 5", "5"),
    ("1,-2", "-2, 1"),
    ("3, 5, 7", "{3,5,7}"),
    ("-2,-2", "-2"),
    ("15\\frac{39}{40}, \\frac{639}{40}", "15.975"),
    ("\\angle A=90, \\angle B=90", "90^\\circ"),
    ("\\textbf{(055)}", "55"),
    ("400 000", "400,000"),
    ("7.6 Z \\mathrm{eV}", "7.6 Z"),
    ("90 minutes / 450 minutes * 100% = 20%", "20%"),
    ("a=1, b=2", "b=2, a=1"),
    ("(3,4]", "3 < x \\le 4"),
    ("(5,\\infty)", "x>5"),
    ("x \\in [-2,7]", "[-2,7]"),
    ("(0,9) \\cup (9,36)", "(9,36) and (0,9)"),
    ("(-\\infty, 0) \\cup\\{1\\}.", "x<0 or x=1"),
    ("(2,4)", "2,4"),
    ("5 km", "5000 m"),
    ("5 km", "5"),
    ("5 \\text{ cm}", "5"),
    ("15\\mbox{ cm}^2", "15 square centimeters"),
    ("0.10 \\mathrm{~m} / \\mathrm{s}", "10 cm/s"),
    ("72 km/h", "20 m/s"),
    ("60 miles per hour", "60 \\text{ mph}"),
    ("2 m", "2m"),
    ("\\$18.90", "18.90 dollars"),
    ("90^\\circ", "90 degrees"),
    ("90^\\circ", "\\frac{\\pi}{2}"),
    ("12.5\\%", "0.125"),
    ("12.5%", "12.5"),
    ("50 percent", "\\frac12"),
    ("10,\\!080", "10080"),
    ("100,200", "100 , 200"),
    ("11,\\! 111,\\! 100", "11111100"),
    ("4.5e33", "4.5 \\times 10^{33}"),
    ("1\\frac{4}{5}", "1.8"),
    ("2/3", "0.6667"),
    ("0.6666666667", "0.6667"),
    ("8 \\sqrt[3]{4} \\approx 12.7", "12.6992"),
    ("1\\pm\\sqrt{19}", "1-\\sqrt{19}, 1+\\sqrt{19}"),
    ("6+9i", "9i+6"),
    ("52_8", "52_{8}"),
    ("52_8", "52"),
    ("\\text{Evelyn}", "Evelyn"),
    ("\\text{(C)}", "C"),
    ("\\text{ellipse}", "an ellipse"),
    ("\\frac{1}{RCs + 1}", "\\frac{1}{1 + R C s}"),
    ("two and a half", "2.5"),
    ("f(x)=\\frac{1}{x}", "1/x"),
    ("5x - 7y + 11z + 4 = 0", "11z+5x-7y=-4"),
    ("\\cot x", "\\frac{\\cos x}{\\sin x}"),
    ("E_{1}, E_{2}", "E_2, E_1"),
    ("\\begin{pmatrix} -1/3 \\\\ 2/3 \\end{pmatrix}", "(-1/3, 2/3)"),
]
_DIFFERENT = [
    ("5", "6"),
    ("10945", "10946"),
    ("5 km", "5 m"),
    ("5 km", "5 hours"),
    ("1 \\text{ m}", "1 \\text{ s}"),
    ("1e-8", "2e-8"),
    ("12.8", "12.7"),
    ("158.35", "158.3"),
    ("0.33", "1/3"),
    ("50%", "0.05"),
    ("50%", "5%"),
    ("90^\\circ", "80^\\circ"),
    ("(1,2)", "(2,1)"),
    ("(1,2)", "[1,2]"),
    ("1,2", "1,3"),
    ("1,2", "1"),
    ("1,2", "1,2,3"),
    ("a=1, b=2", "a=2, b=1"),
    ("(2,\\infty)", "(3,\\infty)"),
    ("5x=0", "0"),
    ("2x+z=1", "1"),
    ("x^2", "x^3"),
    ("52_8", "53_8"),
    ("52_8", "52_7"),
    ("Evelyn", "Navin"),
    ("5", "\\text{none}"),
    ("\\frac{1}{2}", "\\frac{1}{3}"),
]


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize(("first", "second"), _SAME)
def test_the_same_answer(first: str, second: str, turned: bool) -> None:
    assert compare(*((second, first) if turned else (first, second))) is True


@pytest.mark.parametrize("turned", [False, True], ids=["", "turned"])
@pytest.mark.parametrize(("first", "second"), _DIFFERENT)
def test_different_answers(first: str, second: str, turned: bool) -> None:
    assert compare(*((second, first) if turned else (first, second))) is False


@pytest.mark.parametrize(
    "broken", ["\\frac{1}{", "any one of these four numbers", "\\frac{1}{}", "3 \\sqrt[", "\\foo{3"]
)
def test_what_cannot_be_read_is_neither_the_same_nor_different(broken: str) -> None:
    assert compare("5", broken) is None
    assert compare(broken, "5") is None


def test_what_cannot_be_read_equals_itself() -> None:
    assert compare("\\frac{dM}{dt}=\\frac{a}{M_{\\odot}^{6}} M^{6}", "\\frac{dM}{dt}=\\frac{a}{M_{\\odot}^{6}} M^{6}")


def test_unit_of_numbers_that_name_none() -> None:
    assert compare("4.2", "0.042", "%") is True
    assert compare("4.2", "4.2 %", "%") is True
    assert compare("3", "3000 m", "km") is True
    assert compare("3", "3 m", "km") is False
    assert compare("90", "90^\\circ", "^{\\circ}") is True
    assert compare("15", "0.0015 m^2", "$cm^2$") is True


def test_tolerance() -> None:
    assert compare("4.2", "4.29", None, Tolerance(absolute=0.1)) is True
    assert compare("4.2", "4.31", None, Tolerance(absolute=0.1)) is False
    assert compare("4.2", "4.29%", "%", Tolerance(absolute=0.1)) is True
    assert compare("4e33", "4.03 \\times 10^{33}", None, Tolerance(relative=0.01)) is True
    assert compare("4e33", "4.05 \\times 10^{33}", None, Tolerance(relative=0.01)) is False
    assert compare("100", "101", None, Tolerance(relative=0.01)) is True
    assert compare("100", "101") is False
