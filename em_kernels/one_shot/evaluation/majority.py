"""The votes of several completions of one problem: which of their answers are the same, and which has the most."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal

# A number and what it is a number of; of an expression, nothing is known before it is read.
_NUMBER = re.compile(r"([-+]?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+))\s*([a-zA-Z%°\s]*)")


@dataclass(frozen=True)
class Vote:
    """One completion's vote.

    Attributes:
        answer: the answer that was found in the completion; None where there is none, which is no vote.
        verdict: the verdict on it. Answers with different verdicts are different.
    """

    answer: str | None
    verdict: str


def majority(votes: Sequence[Vote], same: Callable[[str, str], bool]) -> list[int]:
    """The indices of the votes for the answer that has the most, the earliest of several with as many.

    Args:
        votes: the votes.
        same: whether two answers that are not spelled alike are the same.
    """
    alike: dict[tuple[str, str], list[int]] = {}
    for i, vote in enumerate(votes):
        if vote.answer is not None:
            alike.setdefault((vote.verdict, _plain(vote.answer)), []).append(i)
    groups: list[tuple[str, str, list[int]]] = []
    for (verdict, plain), indices in alike.items():
        for other_verdict, other, others in groups:
            if verdict == other_verdict and not _clearly_different(plain, other):
                answers = votes[others[0]].answer, votes[indices[0]].answer
                if same(*answers):  # type: ignore[arg-type]
                    others += indices
                    break
        else:
            groups.append((verdict, plain, indices))
    # max takes the first of several, and the groups are in the order of their first vote.
    return max((indices for _, _, indices in groups), key=len, default=[])


def _plain(answer: str) -> str:
    """The answer without what changes its looks only."""
    text = re.sub(r"\\[!,;: ]|\\(?:left|right|displaystyle)(?![a-zA-Z])", "", answer.strip().strip("$").strip())
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text).rstrip(".")
    match = _NUMBER.fullmatch(text)
    if not match:
        return re.sub(r"\s+", "", text)
    number = Decimal(match[1].replace(",", "")).normalize()
    return f"{number:f} {' '.join(match[2].split()).casefold()}".strip()


def _clearly_different(answer: str, other: str) -> bool:
    """Whether two plain answers are different numbers of the same thing, so that nothing need be computed."""
    if "," in answer + other:  # Two numbers, which can look like one.
        return False
    first, second = _NUMBER.fullmatch(answer), _NUMBER.fullmatch(other)
    return first is not None and second is not None and first[2] == second[2]
