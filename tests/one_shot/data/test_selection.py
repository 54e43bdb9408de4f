import itertools
import math
import statistics

import pytest

from em_kernels.one_shot.data.selection import Candidate, ranked


def _candidate(successes: list[bool], problem: int = 0) -> Candidate:
    return Candidate("t", problem, "?", ("4",), successes)


@pytest.mark.parametrize("right", range(6))
def test_variance_is_that_of_the_sample(right: int) -> None:
    successes = [True] * right + [False] * (5 - right)
    assert _candidate(successes).share == right / 5
    assert _candidate(successes).variance == pytest.approx(statistics.variance(map(float, successes)))


@pytest.mark.parametrize(("k", "p"), [(2, 0.5), (4, 0.25), (6, 0.5), (8, 0.125)])
def test_standard_error_is_that_of_the_variance_over_all_samples(k: int, p: float) -> None:
    """All 2^k samples, each with its probability, have the deviation that the formula gives at the true share."""
    samples = [list(draw) for draw in itertools.product((True, False), repeat=k)]
    weights = [p ** sum(sample) * (1 - p) ** (k - sum(sample)) for sample in samples]
    variances = [_candidate(sample).variance for sample in samples]
    mean = math.fsum(w * v for w, v in zip(weights, variances, strict=True))
    assert mean == pytest.approx(p * (1 - p))
    spread = math.fsum(w * (v - mean) ** 2 for w, v in zip(weights, variances, strict=True))
    at_the_true_share = _candidate([True] * round(p * k) + [False] * (k - round(p * k)))
    assert at_the_true_share.standard_error == pytest.approx(math.sqrt(spread))


def test_the_largest_variance_comes_first_and_equal_ones_keep_their_order() -> None:
    rights = [0, 3, 2, 1, 4, 2]
    candidates = [_candidate([True] * n + [False] * (4 - n), i) for i, n in enumerate(rights)]
    assert [candidate.problem for candidate in ranked(candidates)] == [2, 5, 1, 3, 0, 4]
