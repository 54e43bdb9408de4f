import itertools
import math

import numpy as np
import pytest

from em_kernels.one_shot.evaluation.statistics import Estimate, mean_over_problems, paired_difference, pass_at_k


def test_the_error_of_a_mean_is_the_spread_of_means_of_new_problems() -> None:
    random = np.random.default_rng(0)

    def draw() -> dict[int, list[float]]:
        chances = random.beta(0.5, 0.5, size=50)
        return {i: list((random.random(8) < chance).astype(float)) for i, chance in enumerate(chances)}

    estimates = [mean_over_problems(draw()) for _ in range(2000)]
    spread = np.std([estimate.mean for estimate in estimates])
    assert np.mean([estimate.standard_error for estimate in estimates]) == pytest.approx(spread, rel=0.05)
    # Completions of one problem as observations of their own would give an error that is less than half of it.
    assert math.sqrt(0.25 / 400) < spread / 2


def test_one_completion_a_problem_has_the_usual_error() -> None:
    estimate = mean_over_problems({i: [float(i < 3)] for i in range(10)})
    assert estimate.mean == pytest.approx(0.3)
    assert estimate.standard_error == pytest.approx(math.sqrt(0.3 * 0.7 / 9))
    assert str(estimate) == "30.0% ± 15.3%"


def test_the_error_of_one_problem_is_unknown() -> None:
    estimate = mean_over_problems({"a": [1.0, 0.0]})
    assert math.isnan(estimate.standard_error)
    assert f"{estimate}, {estimate:+.2f}" == "50.0%, +0.50"


def test_an_error_has_the_format_of_its_mean_without_a_sign() -> None:
    estimate = Estimate(-0.25, 0.125)
    assert f"{estimate}, {estimate:+.2f}, {estimate:.3f}" == "-25.0% ± 12.5%, -0.25 ± 0.12, -0.250 ± 0.125"


def test_a_paired_difference_cancels_the_problems_difficulty() -> None:
    first = {i: [float(i % 2)] for i in range(100)}
    second = {i: [float(i % 2 or i < 10)] for i in range(100)}
    difference = paired_difference(first, second)
    assert difference.mean == pytest.approx(0.05)
    assert difference.standard_error == pytest.approx(math.sqrt(0.05 * 0.95 / 99))
    assert difference.seen
    assert not paired_difference(first, {**first, 0: [1.0]}).seen


@pytest.mark.parametrize(("completions", "right", "k"), [(5, 2, 1), (5, 2, 3), (5, 0, 2), (5, 5, 2), (6, 4, 3)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(completions: int, right: int, k: int) -> None:
    subsets = list(itertools.combinations([i < right for i in range(completions)], k))
    assert pass_at_k(completions, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="0 problems"):
        mean_over_problems({})
    with pytest.raises(ValueError, match="at least one score"):
        mean_over_problems({1: []})
    with pytest.raises(ValueError, match="different problems"):
        paired_difference({1: [1.0]}, {2: [1.0]})
    with pytest.raises(ValueError, match="k is 6, expected 1 to the number of completions, 5"):
        pass_at_k(5, 2, 6)
