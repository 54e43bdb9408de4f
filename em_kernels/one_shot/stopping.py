"""Rules that end a run before its last step, as functions of what a run folder keeps.

decided>X          more than the share X of a step's tokens had next to no entropy left (see `metrics.DECIDED`)
loss<X             a step's loss was below X nats
agreement-falls    the share of evaluation problems on which a sampled answer agrees with the greedy one fell below the
                   highest share so far by more than 1.96 standard errors of the difference

The error of a share of x problems among n is that of the share (x + 1) / (n + 2), which is not 0 where all agree. The
error of the difference takes the problems of two evaluations for independent. The highest of many shares is partly high
by chance, so noise ends a run more often the more evaluations it has.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from em_kernels.one_shot.errors import UsageError

AGREEMENT = "agreement-falls"
_THRESHOLD = re.compile(r"(decided)>([0-9.eE+-]+)|(loss)<([0-9.eE+-]+)")


def first_stop(rule: str, metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]] = ()) -> int | None:
    """The step after which the rule would have ended the run, or None if it would not have.

    Args:
        rule: a rule, as above.
        metrics: the lines of metrics.jsonl, in order of their steps.
        evaluations: the lines of evaluations.jsonl.

    Raises:
        UsageError: there is no such rule.
    """
    if rule == AGREEMENT:
        return _first_fall([row for row in evaluations if row["decoding"] == "sampled" and "agreement" in row])
    name, threshold = check_rule(rule)
    return next(
        (
            row["step"]
            for row in metrics
            if (row["decided"] > threshold if name == "decided" else row["loss"] < threshold)
        ),
        None,
    )


def stopped_by(
    rules: Sequence[str], metrics: Sequence[dict[str, Any]], evaluations: Sequence[dict[str, Any]]
) -> str | None:
    """The first of the rules that ends the run by now, or None."""
    return next((rule for rule in rules if first_stop(rule, metrics, evaluations) is not None), None)


def check_rule(rule: str) -> tuple[str, float]:
    """The name and the threshold of a rule, the latter NaN for a rule without one.

    Raises:
        UsageError: there is no such rule.
    """
    if rule == AGREEMENT:
        return rule, math.nan
    found = _THRESHOLD.fullmatch(rule.replace(" ", ""))
    try:
        if found is not None:
            return found[1] or found[3], float(found[2] or found[4])
    except ValueError:
        pass
    raise UsageError(f"stop_when is {rule!r}, expected decided>X, loss<X or {AGREEMENT}, X a number")


def _first_fall(rows: Sequence[dict[str, Any]]) -> int | None:
    ordered = sorted(rows, key=lambda row: row["step"])
    for index, row in enumerate(ordered):
        highest = max(ordered[: index + 1], key=lambda earlier: earlier["agreement"])
        error = math.sqrt(_squared_error(highest) + _squared_error(row))
        if highest["agreement"] - row["agreement"] > 1.96 * error:
            return row["step"]
    return None


def _squared_error(row: dict[str, Any]) -> float:
    problems = row["problems"]
    share = (row["agreement"] * problems + 1) / (problems + 2)
    return share * (1 - share) / problems
