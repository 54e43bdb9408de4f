"""The choice of a training prompt: the problem on which success varies most (arXiv 2505.20282, section 2.2)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Candidate:
    """A problem, and how its completions came out.

    Attributes:
        task: the name of the problem set.
        problem: the number of the problem in the set, from 0.
        question: the text that the model was asked.
        answers: the accepted answers, where there are any.
        successes: for each completion, whether it is right, or agrees with the majority.
    """

    task: str
    problem: int
    question: str
    answers: tuple[str, ...]
    successes: Sequence[bool]

    @property
    def share(self) -> float:
        """p, the share of successes."""
        return sum(self.successes) / len(self.successes)

    @property
    def variance(self) -> float:
        """The unbiased sample variance of success, k / (k - 1) p (1 - p), of k completions."""
        k = len(self.successes)
        return k / (k - 1) * self.share * (1 - self.share)

    @property
    def standard_error(self) -> float:
        """The standard error of `variance`.

        The variance of the sample variance of k independent draws is (m - (k - 3) / (k - 1) s^4) / k, with the
        distribution's variance s^2 = p (1 - p) and its fourth central moment m = s^2 (1 - 3 s^2). The share of
        successes stands in for p, so where all completions came out alike the error is 0 and says too little.
        """
        k = len(self.successes)
        square = self.share * (1 - self.share)
        fourth = square * (1 - 3 * square)
        return math.sqrt(max(0.0, fourth - (k - 3) / (k - 1) * square**2) / k)


def ranked(candidates: Sequence[Candidate]) -> list[Candidate]:
    """The candidates, those with the largest variance first and otherwise in their order."""
    # Shares p and 1 - p have the same variance, up to rounding.
    return sorted(candidates, key=lambda candidate: -round(candidate.variance, 12))
