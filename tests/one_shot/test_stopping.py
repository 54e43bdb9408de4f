from typing import Any

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.stopping import first_stop, stopped_by

_METRICS = [
    {"step": step, "loss": loss, "decided": decided}
    for step, loss, decided in ((1, 0.3, 0.1), (2, 0.02, 0.95), (3, 0.01, 0.9))
]


def _evaluations(*agreements: float) -> list[dict[str, Any]]:
    rows = []
    for i, agreement in enumerate(agreements):
        rows.append({"step": 5 * i, "decoding": "greedy", "problems": 100})
        rows.append({"step": 5 * i, "decoding": "sampled", "problems": 100, "agreement": agreement})
    return rows


@pytest.mark.parametrize(
    ("rule", "step"),
    [
        ("decided>0.9", 2),
        ("decided > 0.95", None),
        ("loss<0.02", 3),
        ("loss<2e-2", 3),
        ("loss<1", 1),
        ("loss<0.001", None),
    ],
)
def test_threshold(rule: str, step: int | None) -> None:
    assert first_stop(rule, _METRICS) == step


@pytest.mark.parametrize(
    ("agreements", "step"),
    [
        ((), None),
        ((0.5,), None),
        ((0.5, 0.8, 0.9), None),
        # 1.96 standard errors of the difference are 0.14 here.
        ((0.5, 0.46, 0.42), None),
        ((0.5, 0.6, 0.5, 0.4), 15),
        # Each fall is small, and their sum is not.
        ((0.5, 0.47, 0.44, 0.41, 0.38, 0.35, 0.32), 25),
        # One problem of 100 is noise, although all agreed before.
        ((1.0, 0.99), None),
    ],
)
def test_agreement_that_falls_by_more_than_its_error(agreements: tuple[float, ...], step: int | None) -> None:
    assert first_stop("agreement-falls", _METRICS, _evaluations(*agreements)) == step


def test_first_rule_that_holds() -> None:
    rules = ("loss<0.001", "decided>0.9", "loss<0.02")
    assert stopped_by(rules, _METRICS, []) == "decided>0.9"
    assert stopped_by(rules, _METRICS[:1], []) is None


@pytest.mark.parametrize("rule", ["", "decided", "decided<0.9", "loss>1", "loss<", "loss<x", "loss<1e", "entropy<1"])
def test_unknown_rule(rule: str) -> None:
    with pytest.raises(UsageError, match="expected decided>X, loss<X or agreement-falls"):
        first_stop(rule, _METRICS)
