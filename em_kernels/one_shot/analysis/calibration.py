"""What the confidence of graded completions is worth: votes and log-probabilities against accuracy."""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from statistics import fmean

from em_kernels.one_shot.evaluation.majority import Vote, majority
from em_kernels.one_shot.evaluation.records import Record
from em_kernels.one_shot.evaluation.statistics import Estimate, mean_over_problems

_VOTE_BINS, _LOGPROB_BINS = 10, 5


@dataclass(frozen=True)
class Bin:
    """Problems, or completions, of similar confidence.

    Attributes:
        count: how many there are.
        confidence: the mean of their confidences.
        accuracy: the share of right ones, with its standard error clustered by problem.
    """

    count: int
    confidence: float
    accuracy: Estimate


@dataclass(frozen=True)
class Votes:
    """The reliability of majority votes; the confidence in one is the share of a problem's completions that cast it.

    Attributes:
        bins: the problems by confidence in tenths, without empty ones.
        silent: the number of problems none of whose completions has an answer, which are in no bin.
        confidence: the mean confidence.
        accuracy: the share of problems whose vote is right.
        error: the expected calibration error: the mean over problems of |accuracy - confidence| of their bins
            (Guo et al. 2017, arXiv 1706.04599, equation 3).
    """

    bins: Sequence[Bin]
    silent: int
    confidence: float
    accuracy: Estimate
    error: float


@dataclass(frozen=True)
class Logprobs:
    """The reliability of the mean log-probability of a completion's tokens.

    Attributes:
        bins: the completions in fifths by log-probability, the lowest first.
        order: the chance that of a right and a wrong completion the right one has the higher log-probability, where
            ties count half; NaN where there is no such pair.
        order_within: the same for completions of one problem, over all such pairs.
    """

    bins: Sequence[Bin]
    order: float
    order_within: float


def measure_votes(records: Sequence[Record], same: Callable[[str, str], bool]) -> Votes | None:
    """The reliability of the votes of one model on one task at one temperature; None where nobody votes.

    Args:
        records: graded completions; problems with a single one are left out.
        same: whether two answers that are not spelled alike are the same.
    """
    cast: dict[Hashable, tuple[float, float]] = {}
    silent = 0
    for problem, own in _by_problem(records).items():
        if len(own) > 1:
            votes = majority([Vote(record.answer, record.verdict) for record in own], same)
            silent += not votes
            if votes:
                cast[problem] = len(votes) / len(own), float(own[votes[0]].verdict == "right")
    if not cast:
        return None
    bins: dict[int, list[Hashable]] = defaultdict(list)
    for problem, (confidence, _) in cast.items():
        # A share on the edge of two bins belongs to the lower one; rounding must not lift it over the edge.
        bins[math.ceil(round(confidence * _VOTE_BINS, 9))].append(problem)
    made = [
        Bin(len(own), fmean(cast[p][0] for p in own), mean_over_problems({p: [cast[p][1]] for p in own}))
        for _, own in sorted(bins.items())
    ]
    return Votes(
        made,
        silent,
        fmean(confidence for confidence, _ in cast.values()),
        mean_over_problems({problem: [right] for problem, (_, right) in cast.items()}),
        sum(one.count * abs(one.accuracy.mean - one.confidence) for one in made) / len(cast),
    )


def measure_logprobs(records: Sequence[Record]) -> Logprobs | None:
    """The reliability of log-probabilities; None where no record, or only one, has one."""
    known = sorted((r for r in records if r.logprob is not None), key=_logprob)
    if len(known) < 2:
        return None
    bins = []
    count = min(_LOGPROB_BINS, len(known))
    for i in range(count):
        own = known[i * len(known) // count : (i + 1) * len(known) // count]
        right = {problem: [float(r.verdict == "right") for r in of] for problem, of in _by_problem(own).items()}
        bins.append(Bin(len(own), fmean(map(_logprob, own)), mean_over_problems(right)))
    within = [_pairs(own) for own in _by_problem(known).values()]
    return Logprobs(bins, _order([_pairs(known)]), _order(within))


def _by_problem(records: Sequence[Record]) -> dict[Hashable, list[Record]]:
    """The completions of each problem, in the order of their samples."""
    by_problem: dict[Hashable, list[Record]] = defaultdict(list)
    for record in sorted(records, key=lambda record: (record.problem, record.sample)):
        by_problem[record.problem].append(record)
    return by_problem


def _logprob(record: Record) -> float:
    assert record.logprob is not None
    return record.logprob


def _pairs(records: Sequence[Record]) -> tuple[float, int]:
    """How many pairs of a right and a wrong completion are in order, and how many there are."""
    right = [_logprob(record) for record in records if record.verdict == "right"]
    wrong = sorted(_logprob(record) for record in records if record.verdict != "right")
    ordered = sum((bisect_left(wrong, value) + bisect_right(wrong, value)) / 2 for value in right)
    return ordered, len(right) * len(wrong)


def _order(pairs: Sequence[tuple[float, int]]) -> float:
    ordered, total = (sum(values) for values in zip(*pairs, strict=True))
    return ordered / total if total else math.nan
