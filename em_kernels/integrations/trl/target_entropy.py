"""A coefficient of an entropy term that is steered to a target entropy."""

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class TargetEntropy:
    """A coefficient that steers the mean entropy of an optimiser step to a target.

    After each step, coefficient += rate * (mean H - target), within [lowest, highest].

    Args:
        target: in nats, at least 0.
        rate: how much a nat of distance changes the coefficient in a step, above 0.
        initial: the first step's coefficient.
        lowest, highest: the range; below 0 the term is a bonus.

    Raises:
        ValueError: an argument does not fit.
    """

    target: float
    rate: float = 0.01
    initial: float = 0.0
    lowest: float = -1.0
    highest: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target) and self.target >= 0):
            raise ValueError(f"target is {self.target}, expected an entropy in nats of at least 0")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate is {self.rate}, expected a number above 0")
        if not -math.inf < self.lowest <= self.initial <= self.highest < math.inf:
            raise ValueError(
                f"initial is {self.initial}, lowest {self.lowest} and highest {self.highest}, expected finite numbers "
                "with initial between the others"
            )

    def after(self, coefficient: float, entropy: float) -> float:
        """The coefficient of the step that follows one with this coefficient and this mean entropy in nats."""
        return min(max(coefficient + self.rate * (entropy - self.target), self.lowest), self.highest)
