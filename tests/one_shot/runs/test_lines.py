import math
from typing import Any

import pytest

from em_kernels.one_shot.analysis.accuracies import difference_text
from em_kernels.one_shot.evaluation.records import Record
from em_kernels.one_shot.evaluation.statistics import Estimate
from em_kernels.one_shot.runs.lines import accuracy_line, collapse_line, difference_line, idle_line, step_line


def _metrics(**changes: Any) -> dict[str, Any]:
    row = {
        "step": 3,
        "loss": 0.0833,
        "entropy": 0.25,
        "decided": 0.125,
        "tokens": 512,
        "truncated": 0.0,
        "gradient_norm": 1.0,
        "seconds_generating": 7.25,
        "seconds_training": 10.5,
        "peak_memory_gb": 2.5,
    }
    return {**row, **changes}


def _row(temperature: float, **changes: Any) -> dict[str, Any]:
    row = {"temperature": temperature, "accuracy": 0.25, "standard_error": 0.0766, "problems": 32}
    return {**row, "unreadable": 0, "truncated": 0, **changes}


def _records(temperature: float, *right: bool) -> list[Record]:
    return [
        Record("built-in", i, 0, temperature, "?", ("1",), "1", "1", "right" if one else "wrong", 3, False)
        for i, one in enumerate(right)
    ]


def test_step_line() -> None:
    assert step_line(_metrics(), 10) == (
        "step  3/10  loss 0.0833  entropy 0.2500  tokens 512  H<0.01 12.5%  generating 7.2 s  training 10.5 s  "
        "peak memory 2.50 GB"
    )
    assert "tokens 512 (50% cut off)  H<0.01 12.5%  KL 0.0125  gen" in step_line(_metrics(truncated=0.5, kl=0.0125), 10)


def test_accuracy_line() -> None:
    rows = [_row(0.0), _row(1.0, accuracy=0.125, standard_error=0.0585, unreadable=2, truncated=3)]
    assert accuracy_line("after", rows) == (
        "accuracy after:  greedy 25.0% ± 7.7%, temperature 1 12.5% ± 5.9% (2 unreadable, 3 cut off) "
        "(32 problems, ± standard error)"
    )


def test_difference_has_the_paired_error() -> None:
    before = _records(0.0, *[False] * 20, *[True] * 20) + _records(1.0, *[False] * 40)
    after = _records(0.0, *[False] * 19, *[True] * 21) + _records(1.0, *[True] * 10, *[False] * 30)
    # One of 40 problems has changed: the error of its mean is 1/40. Unpaired, it would be 11.3 %.
    assert difference_line(before, after) == (
        "accuracy change: greedy +2.5% ± 2.5% (no difference seen), temperature 1 +25.0% ± 6.9% (paired by problem)"
    )


def test_one_problem_has_no_error() -> None:
    assert accuracy_line("after", [_row(0.0, standard_error=math.nan, problems=1)]) == (
        "accuracy after:  greedy 25.0% (1 problem)"
    )
    before, after = _records(0.0, False), _records(0.0, True)
    assert difference_line(before, after) == "accuracy change: greedy +100.0% (error unknown) (paired by problem)"
    assert difference_text(Estimate(1.0, math.nan)) == "+100.0 points, error unknown"
    assert difference_text(Estimate(0.1, 0.1)) == "+10.0 ± 10.0 points, no difference seen"


def test_collapse_is_said() -> None:
    assert collapse_line(_metrics(decided=0.5)) is None
    line = collapse_line(_metrics(decided=0.95))
    assert line is not None
    assert "collapsed: 95.0% of the last step's tokens" in line


@pytest.mark.parametrize(("loss", "norm", "said"), [(0.0, 0.0, True), (1e-9, 0.0, False), (0.0, 1e-9, False)])
def test_step_with_nothing_to_lower_is_said(loss: float, norm: float, said: bool) -> None:
    line = idle_line(_metrics(loss=loss, gradient_norm=norm), 0.001)
    assert (line is not None) is said
    if line is not None:
        assert "at temperature 0.001 every token is certain; a higher --temperature" in line
