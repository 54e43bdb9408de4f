"""This module draws the operands of the benchmarks, and measures how far results are from float64 on these operands."""

import functools
import sys
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

# The float64 definition of the statistics belongs to the tests, whose oracle it is.
sys.path.append(str(Path(__file__).parents[1] / "tests"))
import reference

# All drawing starts from this seed, and each row of results holds it.
SEED = 0
# Sorted by size, probability k is proportional to u_(k)^-4 with u uniform: a Zipf-like tail under one or two likely
# tokens. The mean entropy is 0.5 nat at any vocabulary above some thousands, and a sixth of the tokens is below 0.01
# nat.
_PEAKED_SCALE = 4.0
# The entropy is then log V - 0.005.
_FLAT_SCALE = 0.1
# These numbers describe the logits that count in operands for the loss on hidden states: how many each token has, the
# largest of them, its mean lead over the next, and the mean distance between those that follow.
_RIVALS = 12
_HIGHEST_LOGIT = 16.0
_MEAN_LEAD, _MEAN_GAP = 3.5, 0.45
_CHUNK_ELEMENTS = 1 << 24
_SAMPLED_ROWS = 32
# The promised error of an entropy is 2e-6 of itself plus 3e-7. Divided by H + 0.15, both terms become 2e-6.
_OFFSET = 0.15
# The grad_tolerance of the benchmarks leaves out entries of the logits' gradient below TOLERANCE. How many rows and
# columns have larger ones is counted over the first _SHARING_ROWS tokens.
TOLERANCE = 1e-6
_SHARING_ROWS = 512
# This is the weight of the entropy in the policy-gradient loss. Trainers take 0.001 to 0.01.
ENTROPY_BONUS = 0.01


class Operands(NamedTuple):
    """Hidden states of shape (tokens, D) and an output projection of shape (V, D), leaves that ask for a gradient."""

    hidden: Tensor
    weight: Tensor

    def clone(self) -> "Operands":
        return Operands(*(x.detach().clone().requires_grad_() for x in self))


def draw_logits(kind: str, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Draw (rows, vocab) logits of a kind.

    The kind "peaked" is like the logits of a trained model, with a mean entropy of 0.5 nat; "flat" is close to uniform.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    logits = torch.empty(rows, vocab, dtype=dtype, device=device)
    # The rows are drawn in chunks, because only the logits themselves may raise a process's peak memory.
    for part in logits.split(max(1, _CHUNK_ELEMENTS // vocab)):
        z = torch.empty(part.shape, device=device)
        if kind == "peaked":
            part.copy_(z.exponential_(generator=generator).mul_(_PEAKED_SCALE))
        else:
            part.copy_(z.normal_(generator=generator).mul_(_FLAT_SCALE))
    return logits


def draw_operands(rows: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Operands:
    """Draw hidden states and an output projection that are, at temperature 0.5, about as peaked as a real model's.

    Each token has some rivals in a twelfth of the vocabulary, whose logits are exponentially distributed below the
    likeliest one's. All other logits are far below. At D 576 and a vocabulary of 49152 the mean entropy is 0.39 nats,
    and entries of the gradient above 1e-6 lie in 92 % of the rows of 512 tokens and in 7 % of the columns. On the
    model's own completions, SmolLM2-135M-Instruct has 0.34 nats, 98 % and 8 %.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    options = {"generator": generator, "device": device}
    weight = torch.randn(vocab, dim, **options) / dim**0.5
    rivals = min(_RIVALS, dim, vocab)
    # Each rival comes from a part of the vocabulary of its own: the same token twice could not have two logits.
    part_size = max(1, vocab // 12 // rivals)
    chosen = torch.randint(part_size, (rows, rivals), **options) + part_size * torch.arange(rivals, device=device)
    gaps = torch.empty(rows, rivals, device=device).exponential_(generator=generator) * _MEAN_GAP
    gaps[:, :1], gaps[:, 1:2] = 0, gaps[:, 1:2] * _MEAN_LEAD / _MEAN_GAP
    wanted = _HIGHEST_LOGIT - gaps.cumsum(1)
    hidden = torch.empty(rows, dim, device=device)
    for part in torch.arange(rows, device=device).split(1024):
        near = weight[chosen[part]]
        # These are the shortest hidden states that have the wanted logits.
        hidden[part] = (torch.linalg.solve(near @ near.mT, wanted[part]).unsqueeze(1) @ near).squeeze(1)
    return Operands(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())


def draw_targets(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Draw (rows,) targets, each from its row's own distribution, as a completion is drawn; logits are (rows, V)."""
    generator = torch.Generator(logits.device).manual_seed(SEED + 2)
    parts = logits.detach().split(max(1, _CHUNK_ELEMENTS // logits.shape[1]))
    drawn = [torch.multinomial((z.float() / temperature).softmax(-1), 1, generator=generator) for z in parts]
    return torch.cat(drawn).squeeze(1)


def draw_linear_targets(operands: Operands, temperature: float = 1.0) -> Tensor:
    """Draw targets of shape (tokens,) as `draw_targets` does, given hidden states and an output projection."""
    hidden, weight = (x.detach() for x in operands)
    rows = max(1, _CHUNK_ELEMENTS // len(weight))
    return torch.cat([draw_targets(part @ weight.T, temperature) for part in hidden.split(rows)])


def draw_advantages(rows: int, device: torch.device) -> Tensor:
    """Draw advantages of shape (rows,) of either sign."""
    return torch.randn(rows, generator=torch.Generator(device).manual_seed(SEED + 3), device=device)


def policy_loss(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """Return each token's -A log p_target - 0.01 H, the loss that policy-gradient trainers make of these statistics."""
    return -advantage * logprob - ENTROPY_BONUS * entropy


def _row_loss(loss: str, row: reference.RowStatistics, advantage: Tensor | None) -> Tensor:
    if loss == "entropy":
        return row.entropy
    assert row.logprob is not None
    if loss == "cross entropy":
        return -row.logprob
    assert advantage is not None
    return policy_loss(row.logprob, row.entropy, advantage.double())


def relative_error(value: Tensor, exact: Tensor) -> float:
    """Return the largest |value - exact| / (|exact| + 0.15)."""
    return ((value.double() - exact).abs() / (exact.abs() + _OFFSET)).max().item()


def demand(name: str, errors: dict[str, float | None], bounds: dict[str, float]) -> dict[str, float | None]:
    """Return the errors.

    Those of ours must be within the bounds, otherwise ArithmeticError is raised: a wrong result makes its time
    worthless.
    """
    for key, bound in bounds.items():
        error = errors.get(key)
        if name.startswith("ours") and error is not None and not error <= bound:
            raise ArithmeticError(f"{key} is {error:.1e}, expected at most {bound:.1e}")
    return errors


class Reference:
    """The statistics of each row of (rows, V) logits, and the gradients of some rows, computed in float64.

    The losses are called "entropy", "cross entropy" (of the target) and, where there is an advantage, "policy".
    """

    def __init__(self, logits: Tensor, target: Tensor, advantage: Tensor | None = None) -> None:
        self.logits, self.target, self.advantage = logits, target, advantage
        count = min(_SAMPLED_ROWS, len(logits))
        self.sample = torch.linspace(0, len(logits) - 1, count, device=logits.device).long()
        self._gradients: dict[str, Tensor] = {}

    @functools.cached_property
    def values(self) -> dict[str, Tensor]:
        """The entropy of each row, and the cross entropy of its target, in float64."""
        rows = max(1, _CHUNK_ELEMENTS // self.logits.shape[1])
        parts = [
            reference.row_statistics(z, t)
            for z, t in zip(self.logits.split(rows), self.target.split(rows), strict=True)
        ]
        return {
            loss: torch.cat([_row_loss(loss, part, None) for part in parts]) for loss in ("entropy", "cross entropy")
        }

    def gradients(self, loss: str) -> Tensor:
        """Return the gradient of each sampled row's own loss, of shape (sample, V), in float64."""
        if loss in self._gradients:
            return self._gradients[loss]
        parts = []
        for index in self.sample.split(max(1, _CHUNK_ELEMENTS // self.logits.shape[1])):
            z = self.logits[index].double().requires_grad_()
            row = reference.row_statistics(z, self.target[index])
            value = _row_loss(loss, row, None if self.advantage is None else self.advantage[index])
            parts.append(torch.autograd.grad(value.sum(), z)[0])
        self._gradients[loss] = torch.cat(parts)
        return self._gradients[loss]

    def loss_error(self, loss: str, value: Tensor, weights: Tensor | None) -> float:
        """Return the largest |value - exact| / (exact + 0.15).

        With weights, exact is the weighted sum of the rows' losses, otherwise each row's loss.
        """
        exact = self.values[loss]
        return relative_error(value, exact if weights is None else (weights.double() * exact).sum())

    def gradient_error(self, loss: str, gradient: Tensor, weights: Tensor) -> float:
        """Return the largest error of an entry over the largest exact entry of its row, in the sampled rows.

        A row whose exact gradient is 0 or below the dtype's normal numbers is divided by the smallest normal number.
        The gradient of "policy" is divided by the upstream gradient of the row's log-probability where that is larger:
        at the target the gradient is 1 - p times the upstream gradient, and float32 resolves 1 - p to 6e-8, however
        small 1 - p is.
        """
        exact = self.gradients(loss) * weights[self.sample].double().unsqueeze(-1)
        error = (gradient[self.sample].double() - exact).abs().amax(dim=-1)
        largest = exact.abs().amax(dim=-1).clamp(min=torch.finfo(gradient.dtype).tiny)
        if loss == "policy" and self.advantage is not None:
            largest = largest.maximum((weights * self.advantage).abs()[self.sample])
        return (error / largest).max().item()


class Exact(NamedTuple):
    """Each token's entropy and log-probability, and the gradients of a mean loss, in float64."""

    entropy: Tensor
    logprob: Tensor
    loss: float
    hidden: Tensor
    weight: Tensor


class LinearReference:
    """The loss on hidden states and an output projection, and its gradients, in float64, some tokens at a time."""

    def __init__(
        self, operands: Operands, target: Tensor, temperature: float = 1.0, advantage: Tensor | None = None
    ) -> None:
        self.operands, self.target, self.temperature, self.advantage = operands, target, temperature, advantage
        self.sparsity: dict[str, float] = {}
        self._exact: dict[str, Exact] = {}

    def exact(self, loss: str) -> Exact:
        """Return the statistics and gradients of the mean of a loss that `_row_loss` names.

        The first call for "entropy" also finds how sparse the gradient of the logits is.
        """
        if loss not in self._exact:
            self._exact[loss] = self._compute(loss)
        return self._exact[loss]

    def loss(self, loss: str) -> Tensor:
        """Return the mean of a loss, a scalar in float64."""
        return torch.tensor(self.exact(loss).loss, dtype=torch.float64)

    def _compute(self, loss: str) -> Exact:
        hidden, weight = (x.detach().double() for x in self.operands)
        rows = max(1, _CHUNK_ELEMENTS // len(weight))
        statistics, total = [], 0.0
        hidden_gradient, weight_gradient = torch.empty_like(hidden), torch.zeros_like(weight)
        kept = torch.zeros(len(weight), dtype=torch.bool, device=weight.device)
        rows_kept, counted = 0, 0
        for start in range(0, len(hidden), rows):
            index = slice(start, start + rows)
            logits = (hidden[index] @ weight.T).requires_grad_()
            row = reference.row_statistics(logits, self.target[index], temperature=self.temperature)
            value = _row_loss(loss, row, None if self.advantage is None else self.advantage[index]).sum()
            (gradient,) = torch.autograd.grad(value, logits)
            assert row.logprob is not None
            statistics.append((row.entropy.detach(), row.logprob.detach()))
            total += value.item() / len(hidden)
            hidden_gradient[index] = gradient @ weight / len(hidden)
            weight_gradient += gradient.T @ hidden[index] / len(hidden)
            above = gradient[: _SHARING_ROWS - start].abs() > TOLERANCE if start < _SHARING_ROWS else None
            if loss == "entropy" and above is not None:
                rows_kept, counted = rows_kept + int(above.any(1).sum()), counted + len(above)
                kept |= above.any(0)
        if loss == "entropy":
            self.sparsity = {"rows_kept": rows_kept / counted, "columns_kept": kept.double().mean().item()}
        entropy, logprob = (torch.cat(parts) for parts in zip(*statistics, strict=True))
        return Exact(entropy, logprob, total, hidden_gradient, weight_gradient)

    def gradient_errors(self, loss: str, gradients: tuple[Tensor, ...]) -> dict[str, float]:
        """Return the norm of the error over the norm, for hidden's gradient and, where there is one, for weight's."""
        exact, found = self.exact(loss), {}
        for name, gradient in zip(("hidden", "weight"), gradients, strict=False):
            wanted = getattr(exact, name)
            found[f"{name}_gradient_error"] = ((gradient.double() - wanted).norm() / wanted.norm()).item()
        return found
