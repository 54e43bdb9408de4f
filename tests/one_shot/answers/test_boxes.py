import pytest

from em_kernels.one_shot.answers.boxes import Box, closed_boxes


@pytest.mark.parametrize(
    ("text", "contents"),
    [
        (r"no box, {braces} alone", []),
        (r"$\boxed{1}$ and \fbox { 2 }", ["1", "2"]),
        (r"\boxed{\frac{\{3\}}{4}}", [r"\frac{\{3\}}{4}"]),
        (r"\boxed{a \boxed{b}} \boxed{}", [r"a \boxed{b}", ""]),
        # What is cut off is no box, but one in it may be.
        (r"\boxed{1} \boxed{2", ["1"]),
        (r"\boxed{ \boxed{3}", ["3"]),
        (r"} \boxed{4}}", ["4"]),
    ],
)
def test_contents_of_closed_boxes(text: str, contents: list[str]) -> None:
    assert [box.content for box in closed_boxes(text)] == contents


def test_a_box_begins_at_its_backslash_and_ends_behind_its_brace() -> None:
    assert closed_boxes(r"x = \boxed{ 5 }.") == [Box(4, 15, "5")]


def test_many_openings_take_no_more_than_one_reading() -> None:
    """A scan from each opening to the end of the text would take minutes."""
    assert closed_boxes(r"\boxed{" * 50_000) == []
