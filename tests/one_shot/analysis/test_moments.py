import math

import numpy as np
import pytest
import torch

from em_kernels.one_shot.analysis import moments
from em_kernels.one_shot.analysis.moments import Moments


def _reference(values: np.ndarray) -> tuple[float, float, float, float]:
    """Mean, deviation, skewness and excess kurtosis of values that are all there."""
    distance = values - values.mean()
    deviation = values.std()
    return values.mean(), deviation, (distance**3).mean() / deviation**3, (distance**4).mean() / deviation**4 - 3


@pytest.mark.parametrize("offset", [0.0, 1e4])
def test_parts_give_the_moments_of_the_whole(offset: float) -> None:
    random = np.random.default_rng(0)
    parts = [random.gamma(2.0, size=size) for size in (1, 2, 1000, 3, 5000)]
    parts = [part * scale + offset for part, scale in zip(parts, (1, 5, 2, 0.1, 1), strict=True)]
    streamed = Moments()
    for part in parts:
        streamed.add(torch.from_numpy(part))
    found = streamed.mean, streamed.deviation, streamed.skewness, streamed.excess_kurtosis
    assert found == pytest.approx(_reference(np.concatenate(parts)), rel=1e-7)


def test_a_tensor_larger_than_a_part_is_split(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(moments, "_PART", 7)
    values = torch.randn(4, 9, 5)
    streamed = Moments()
    streamed.add(values)
    found = streamed.mean, streamed.deviation, streamed.skewness, streamed.excess_kurtosis
    assert found == pytest.approx(_reference(values.double().numpy().ravel()), rel=1e-10)
    assert streamed.count == 180


def test_bars_hold_every_value_once() -> None:
    streamed = Moments()
    streamed.add(torch.tensor([-0.3, -0.25, -0.01, 0.0, 0.24]))
    streamed.add(torch.tensor([0.1, 1e4]))
    assert streamed.bars == {-2: 1, -1: 2, 0: 3, 40000: 1}


def test_values_that_are_not_finite_are_counted_and_left_out() -> None:
    streamed = Moments()
    streamed.add(torch.tensor([1.0, -math.inf, 3.0, math.nan]))
    streamed.add(torch.tensor([-math.inf]))
    assert (streamed.count, streamed.not_finite, streamed.mean, streamed.deviation) == (2, 3, 2.0, 1.0)


def test_of_one_value_there_is_no_skewness() -> None:
    streamed = Moments()
    assert math.isnan(streamed.deviation)
    streamed.add(torch.tensor([2.0]))
    assert streamed.deviation == 0
    assert math.isnan(streamed.skewness)
    assert math.isnan(streamed.excess_kurtosis)
