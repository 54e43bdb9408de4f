import pytest

from em_kernels.one_shot.analysis.published import ACCURACIES, AUTHOR_LOSSES, published_table


def test_the_average_that_is_shown_is_that_of_the_sets_that_are_shown() -> None:
    base, trained = ACCURACIES[:2]
    assert base.average == pytest.approx(31.3, abs=0.05)
    assert base.other_average == 27.7
    # The gain that the paper states for one-shot training is 24.7.
    assert trained.average - base.average == pytest.approx(24.7, abs=0.05)


def test_the_first_losses_are_about_three_hundredths_of_a_nat() -> None:
    assert len(AUTHOR_LOSSES) == 15
    assert sum(AUTHOR_LOSSES[:10]) / 10 == pytest.approx(0.03, abs=0.002)


def test_a_table_shows_the_sets_that_were_asked_for_and_both_averages() -> None:
    lines = published_table(["amc23", "svamp"])
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert rows[0] == ["published", "AMC23", "mean of the four", "source"]
    assert rows[2] == ["Qwen2.5-Math-7B", "44.1", "31.3", "arXiv 2505.20282, Table 1"]
    assert "27.7" in lines[-1]
    assert "31.3" in lines[-1]
    assert published_table(["svamp"]) == []


def test_a_set_is_known_by_any_spelling() -> None:
    expected = published_table(["math500", "amc23"])
    assert published_table(["HuggingFaceH4/MATH-500", "AMC23"]) == expected
    assert published_table(["MATH_500", "amc-23"]) == expected
    assert published_table(["Minerva"]) == published_table(["minerva_math"]) != []
