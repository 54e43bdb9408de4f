from em_kernels.one_shot.analysis.selection import describe_selection, draw_selection
from em_kernels.one_shot.data.selection import Candidate, ranked

_CONFIG = {"settings": {"seed": 3}, "versions": {"torch": "2.9"}}


def _candidate(problem: int, right: int, question: str = "?") -> Candidate:
    return Candidate("t", problem, question, (), [True] * right + [False] * (16 - right))


def test_the_first_are_shown_and_how_many_are_as_good() -> None:
    # Of 16 completions, 8 and 7 right vary alike by their errors, and 1 or none does not.
    candidates = [_candidate(0, 0), _candidate(1, 7, "a long question " * 10), _candidate(2, 1), _candidate(3, 8)]
    lines = describe_selection(ranked(candidates), "variance", _CONFIG)
    assert [line.split("|")[2].strip() for line in lines if line.startswith("| t ")] == ["3", "1", "2", "0"]
    assert [len(line) for line in lines[:6]] == [len(lines[0])] * 6
    assert "0.267 ± " in lines[2]
    (said,) = [line for line in lines if line.startswith("p is")]
    assert said.startswith("p is the share of right completions among 16;")
    assert said.endswith("above 0 for 3 of 4 problems. Others that may vary as much as the first, by these errors: 1.")


def test_the_picture_counts_problems_and_marks_the_first() -> None:
    [axes] = draw_selection(ranked([_candidate(i, right) for i, right in enumerate((8, 3, 3, 0))]), "variance").axes
    assert [(bar.get_x() + bar.get_width() / 2, bar.get_height()) for bar in axes.patches] == [(0, 1), (3, 2), (8, 1)]
    [[marked]] = [series.patches for series in axes.containers if series.get_label() == "the first of the ranking"]
    assert marked.get_x() + marked.get_width() / 2 == 8


def test_no_more_than_ten_are_shown() -> None:
    lines = describe_selection([_candidate(i, 4) for i in range(12)], "agreement", _CONFIG)
    assert len([line for line in lines if line.startswith("| t ")]) == 10
    (said,) = [line for line in lines if line.startswith("p is")]
    assert "agree with the majority among 16" in said
    assert said.endswith("by these errors: 11.")
    assert lines[-4:-1] == ["- by agreement", "- seed 3", "- torch 2.9"]
