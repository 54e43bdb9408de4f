"""Accuracies with their errors, where several completions of one problem are no independent observations."""

import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Estimate:
    """A mean and its standard error, both as shares; an error that is not known is NaN, and is not printed."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self:.1%}"

    def __format__(self, form: str) -> str:
        """Both in the same format, in which the error has no sign."""
        if not form:
            return str(self)
        return f"{self.mean:{form}}" + (f" ± {self.standard_error:{form.lstrip('+')}}" if self.known else "")

    @property
    def known(self) -> bool:
        """Whether the error is known."""
        return not math.isnan(self.standard_error)

    @property
    def seen(self) -> bool:
        """Whether the mean differs from 0 by more than the error explains in 19 cases of 20."""
        return abs(self.mean) > 1.96 * self.standard_error


def mean_of(values: Sequence[float]) -> Estimate:
    """The mean of independent values, at least one, with its standard error; that of a single value is NaN."""
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return Estimate(mean, math.nan)
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return Estimate(mean, math.sqrt(variance / len(values)))


def mean_over_problems(scores: Mapping[Hashable, Sequence[float]]) -> Estimate:
    """The mean score, with a standard error clustered by problem: that of the mean of the problems' own means.

    The problems are the sample, drawn from all problems of their kind, and every problem has the same weight. With one
    completion a problem, this is the usual standard error, with n - 1 degrees of freedom. A single problem tells
    nothing of its kind, so its error is NaN.

    Args:
        scores: for each problem the scores of its completions, at least one.

    Raises:
        ValueError: there is no problem, or a problem has no score.
    """
    if not scores or not all(scores.values()):
        raise ValueError(f"{len(scores)} problems, expected at least one, each with at least one score")
    means = [math.fsum(values) / len(values) for values in scores.values()]
    return mean_of(means)


def paired_difference(
    first: Mapping[Hashable, Sequence[float]], second: Mapping[Hashable, Sequence[float]]
) -> Estimate:
    """The mean of the second scores less that of the first, problem by problem on the same problems.

    What a problem's difficulty does to both cancels, so the error is smaller than that of two separate means.

    Raises:
        ValueError: the two are not of the same problems, or there is none.
    """
    if first.keys() != second.keys() or not first:
        raise ValueError("the two are scores of different problems, expected the same problems, at least one")
    return mean_of(
        [
            math.fsum(second[problem]) / len(second[problem]) - math.fsum(first[problem]) / len(first[problem])
            for problem in first
        ]
    )


def pass_at_k(completions: int, right: int, k: int) -> float:
    """The unbiased estimate of the chance that one of k completions is right: 1 - C(n - c, k) / C(n, k).

    Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1.

    Raises:
        ValueError: k is not among 1 .. completions.
    """
    if not 1 <= k <= completions:
        raise ValueError(f"k is {k}, expected 1 to the number of completions, {completions}")
    return 1 - math.comb(completions - right, k) / math.comb(completions, k)
