"""Logits processors for `generate` that change a step's entropy: by gradient steps, or by the temperature.

Both work on a whole batch at once, a row at a time independent of the others, and never look at a value from the host.
The entropy is that of the scores they are given. `generate` applies processors that it is given before its own
temperature, top-k and top-p.
"""

import math
from typing import Any

import torch
from torch import Tensor

from em_kernels.arguments.checks import as_float, as_integer
from em_kernels.stats import token_entropy, token_stats

try:
    from transformers import LogitsProcessor
except ImportError as error:
    raise ImportError(
        "em_kernels.integrations.generation needs transformers: pip install 'em-kernels[one-shot]'"
    ) from error

# Those of torch.optim.Adam.
_BETAS, _EPSILON = (0.9, 0.999), 1e-8
# As many halvings narrow the default range of temperatures, a factor of 100,000, to a factor of 1 + 7e-7.
_HALVINGS = 24


class EntropyMinimizationProcessor(LogitsProcessor):
    """Steps of Adam on a step's logits that lower their entropy, until it is below a threshold: EM-INF.

    From the logits z_0 with p_0 = softmax(z_0), each row takes up to `steps` steps that decrease

        H(softmax(z)) + pull KL(p_0 || softmax(z)),      gradient      -p_j (log p_j + H) + pull (p_j - p_0j)

    and none after its entropy is at most `threshold`. "The Unreasonable Effectiveness of Entropy Minimization in LLM
    Reasoning", arXiv 2505.15134; the defaults are those of its authors' code. A logit of -inf stays -inf, and a row
    with a NaN stays as it is.

    Args:
        steps: the largest number of steps, at least 1.
        learning_rate: of Adam, above 0: about as much as a step changes a logit.
        threshold: entropy in nats, at least 0.
        pull: weight of the divergence from the original distribution, at least 0.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(
        self, *, steps: int = 5, learning_rate: float = 0.1, threshold: float = 0.3, pull: float = 0.001
    ) -> None:
        self.steps = as_integer("steps", steps, "an int")
        if self.steps < 1:
            raise ValueError(f"steps is {steps}, expected at least 1")
        self.learning_rate = _number("learning_rate", learning_rate, above=True)
        self.threshold = _number("threshold", threshold)
        self.pull = _number("pull", pull)

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """The logits after the steps, in a new tensor.

        Args:
            input_ids: not looked at.
            scores: (..., V), the logits.
        """
        # A tensor that is made in inference mode can have no gradient.
        with torch.inference_mode(False), torch.no_grad():
            z = scores.to(torch.promote_types(scores.dtype, torch.float32), copy=True)
            original = z.softmax(-1)
            first, second = torch.zeros_like(z), torch.zeros_like(z)
            for step in range(1, self.steps + 1):
                entropy, gradient, probabilities = _entropy_and_gradient(z)
                gradient = gradient + self.pull * (probabilities - original)
                first = first.lerp(gradient, 1 - _BETAS[0])
                second = second.lerp(gradient.square(), 1 - _BETAS[1])
                scale = (second / (1 - _BETAS[1] ** step)).sqrt() + _EPSILON
                moved = z - self.learning_rate / (1 - _BETAS[0] ** step) * first / scale
                z = torch.where(entropy.unsqueeze(-1) > self.threshold, moved, z)
            return z.to(scores.dtype)


class TargetEntropyProcessor(LogitsProcessor):
    """Divides each row of logits by the temperature at which it has a wanted entropy, found by bisection.

    A row is (z - max z) / tau afterwards: without the maximum, large logits of a 16-bit dtype would overflow.
    H(softmax(z / tau)) grows with tau, from the logarithm of the number of largest logits to that of the number of
    finite ones. Where the wanted entropy would take a temperature outside [lowest, highest], the row gets the nearer of
    the two. highest=1 thus only cools: rows whose entropy is below the wanted one keep it.

    Args:
        entropy: the wanted entropy in nats, above 0.
        lowest, highest: the range of temperatures, 0 < lowest < highest.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """

    def __init__(self, entropy: float, *, lowest: float = 0.001, highest: float = 100.0) -> None:
        self.entropy = _number("entropy", entropy, above=True)
        self.lowest = _number("lowest", lowest, above=True)
        self.highest = _number("highest", highest, above=True)
        if not self.lowest < self.highest:
            raise ValueError(f"lowest is {lowest} and highest {highest}, expected lowest below highest")

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        """The logits, less the largest of their row, over their temperatures, in a new tensor.

        Args:
            input_ids: not looked at.
            scores: (..., V), the logits.
        """
        # The maximum of a row without finite logits is -inf, and -inf - -inf would be NaN.
        largest = scores.amax(-1, keepdim=True)
        shifted = scores - torch.where(largest.isfinite(), largest, 0.0)
        # Halving the logarithm's range gives low and high temperatures the same relative accuracy.
        low = torch.full(scores.shape[:-1], math.log(self.lowest), dtype=torch.float32, device=scores.device)
        high = torch.full_like(low, math.log(self.highest))
        for _ in range(_HALVINGS):
            middle = (low + high) / 2
            above = token_entropy(shifted, temperature=middle.exp()) > self.entropy
            low, high = torch.where(above, low, middle), torch.where(above, middle, high)
        return (shifted / high.exp().unsqueeze(-1)).to(scores.dtype)


def _entropy_and_gradient(z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The entropy of each row, its gradient, and softmax(z)."""
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        stats = token_stats(leaf)
        (gradient,) = torch.autograd.grad(stats.entropy, leaf, torch.ones_like(stats.entropy))
    return stats.entropy.detach(), gradient, (z - stats.lse.detach().unsqueeze(-1)).exp()


def _number(name: str, value: Any, *, above: bool = False) -> float:
    """A finite number of at least 0 or, with `above`, above 0."""
    number = as_float(name, value)
    if not math.isfinite(number) or number < 0 or (above and number == 0):
        raise ValueError(f"{name} is {number}, expected a finite number {'above' if above else 'of at least'} 0")
    return number
