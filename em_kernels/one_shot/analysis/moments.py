"""Mean, deviation, skewness and kurtosis of more values than fit the memory, and their histogram, in one pass.

Central moments of parts are merged (Pébay 2008, "Formulas for robust, one-pass parallel computation of covariances and
arbitrary-order statistical moments"), in float64, so that values with a large mean lose nothing.
"""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

_PART = 2**20


@dataclass
class Moments:
    """The moments of all values that were added.

    Attributes:
        count: the number of values.
        mean: their mean.
        second, third, fourth: the sums of the powers of their distances from the mean.
        not_finite: the number of infinite values and NaN, which are left out of all else.
        width: the width of a bar of the histogram.
        bars: the number of values by bar; bar i holds the values of [i * width, (i + 1) * width).
    """

    count: int = 0
    mean: float = 0.0
    second: float = 0.0
    third: float = 0.0
    fourth: float = 0.0
    not_finite: int = 0
    width: float = 0.25
    bars: dict[int, int] = field(default_factory=dict)

    @property
    def deviation(self) -> float:
        """The standard deviation of the values, as a population."""
        return math.sqrt(self.second / self.count) if self.count else math.nan

    @property
    def skewness(self) -> float:
        """The third standardised moment; 0 for values that lie symmetrically around their mean."""
        return math.sqrt(self.count) * self.third / self.second**1.5 if self.second > 0 else math.nan

    @property
    def excess_kurtosis(self) -> float:
        """The fourth standardised moment less that of a normal distribution, 3."""
        return self.count * self.fourth / self.second**2 - 3 if self.second > 0 else math.nan

    def add(self, values: Tensor) -> None:
        """Adds the values of a tensor of any shape."""
        # Apple's GPUs have no float64.
        flat = (values.cpu() if values.device.type == "mps" else values).reshape(-1)
        for part in flat.split(_PART):
            finite = part[part.isfinite()].double()
            self.not_finite += part.numel() - finite.numel()
            if finite.numel():
                self._add_finite(finite)

    def _add_finite(self, values: Tensor) -> None:
        mean = values.mean()
        distance = values - mean
        powers = [float(distance.pow(power).sum()) for power in (2, 3, 4)]
        self._merge(values.numel(), float(mean), *powers)
        bars = (values / self.width).floor().long()
        first = int(bars.min())
        counts = torch.bincount(bars - first)
        for bar in counts.nonzero()[:, 0].tolist():
            self.bars[first + bar] = self.bars.get(first + bar, 0) + int(counts[bar])

    def _merge(self, count: int, mean: float, second: float, third: float, fourth: float) -> None:
        a, b = self.count, count
        n, d = a + b, mean - self.mean
        self.fourth += (
            fourth
            + d**4 * a * b * (a * a - a * b + b * b) / n**3
            + 6 * d**2 * (a * a * second + b * b * self.second) / n**2
            + 4 * d * (a * third - b * self.third) / n
        )
        self.third += third + d**3 * a * b * (a - b) / n**2 + 3 * d * (a * second - b * self.second) / n
        self.second += second + d**2 * a * b / n
        self.mean += d * b / n
        self.count = n
