"""Operands to measure on, and how far a result and its gradients are from float64 on these very operands."""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.ops import reference

# Of everything that is drawn; each row says it.
SEED = 0
# p_k is proportional to u_(k)^-4, u sorted and uniform: a Zipf-like tail under one or two likely tokens, the mean
# entropy 0.5 nat at any vocabulary above some thousands, a sixth of the tokens below 0.01 nat.
_PEAKED_SCALE = 4.0
# Entropy log V - 0.005.
_FLAT_SCALE = 0.1
# Of operands for the loss on hidden states: how many logits of a token count, the largest, its mean lead over the next,
# and the mean distance between those that follow.
_RIVALS = 12
_HIGHEST_LOGIT = 16.0
_MEAN_LEAD, _MEAN_GAP = 3.5, 0.45
_CHUNK_ELEMENTS = 1 << 24
_SAMPLED_ROWS = 32
# An entropy may be off by 2e-6 of itself plus 3e-7: divided by H + 0.15 both become 2e-6.
_OFFSET = 0.15
# Entries of the logits' gradient that the benchmarks' grad_tolerance leaves out, and the tokens that share them.
TOLERANCE = 1e-6
_SHARING_ROWS = 512
# Of the policy-gradient loss; trainers take 0.001 to 0.01.
ENTROPY_BONUS = 0.01


class Operands(NamedTuple):
    """hidden (tokens, D) and weight (V, D), leaves that ask for a gradient."""

    hidden: Tensor
    weight: Tensor

    def clone(self) -> "Operands":
        return Operands(*(x.detach().clone().requires_grad_() for x in self))


def draw_logits(kind: str, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, vocab): "peaked", like those of a trained model, of mean entropy 0.5 nat, or "flat", close to uniform."""
    generator = torch.Generator(device).manual_seed(SEED)
    logits = torch.empty(rows, vocab, dtype=dtype, device=device)
    # Chunks of rows: nothing but the logits themselves may raise a process's peak memory.
    for part in logits.split(max(1, _CHUNK_ELEMENTS // vocab)):
        z = torch.empty(part.shape, device=device)
        if kind == "peaked":
            part.copy_(z.exponential_(generator=generator).mul_(_PEAKED_SCALE))
        else:
            part.copy_(z.normal_(generator=generator).mul_(_FLAT_SCALE))
    return logits


def draw_operands(rows: int, dim: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Operands:
    """About as peaked, at temperature 0.5, as a real model's on its own completions.

    Each token has some rivals, of logits exponential below the likeliest one's, from a twelfth of the vocabulary; all
    other logits are far below. At D 576 and a vocabulary of 49152 the mean entropy is 0.39 nats, and entries of the
    gradient above 1e-6 lie in 92 % of the rows of 512 tokens and 7 % of the columns: those of SmolLM2-135M-Instruct's
    completions are 0.34 nats, 98 % and 8 %.
    """
    generator = torch.Generator(device).manual_seed(SEED)
    options = {"generator": generator, "device": device}
    weight = torch.randn(vocab, dim, **options) / dim**0.5
    rivals = min(_RIVALS, dim, vocab)
    # Each from a part of its own: two that are the same could not have different logits.
    part_size = max(1, vocab // 12 // rivals)
    chosen = torch.randint(part_size, (rows, rivals), **options) + part_size * torch.arange(rivals, device=device)
    gaps = torch.empty(rows, rivals, device=device).exponential_(generator=generator) * _MEAN_GAP
    gaps[:, :1], gaps[:, 1:2] = 0, gaps[:, 1:2] * _MEAN_LEAD / _MEAN_GAP
    wanted = _HIGHEST_LOGIT - gaps.cumsum(1)
    hidden = torch.empty(rows, dim, device=device)
    for part in torch.arange(rows, device=device).split(1024):
        near = weight[chosen[part]]
        # The shortest hidden states that have these logits.
        hidden[part] = (torch.linalg.solve(near @ near.mT, wanted[part]).unsqueeze(1) @ near).squeeze(1)
    return Operands(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())


def draw_targets(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """(rows,): a token of each row's own distribution, as those of a completion are; logits are (rows, V)."""
    generator = torch.Generator(logits.device).manual_seed(SEED + 2)
    parts = logits.detach().split(max(1, _CHUNK_ELEMENTS // logits.shape[1]))
    drawn = [torch.multinomial((z.float() / temperature).softmax(-1), 1, generator=generator) for z in parts]
    return torch.cat(drawn).squeeze(1)


def draw_linear_targets(operands: Operands, temperature: float = 1.0) -> Tensor:
    """(tokens,): as `draw_targets`, of hidden states and an output projection."""
    hidden, weight = (x.detach() for x in operands)
    rows = max(1, _CHUNK_ELEMENTS // len(weight))
    return torch.cat([draw_targets(part @ weight.T, temperature) for part in hidden.split(rows)])


def draw_advantages(rows: int, device: torch.device) -> Tensor:
    """(rows,): of either sign."""
    return torch.randn(rows, generator=torch.Generator(device).manual_seed(SEED + 3), device=device)


def policy_loss(logprob: Tensor, entropy: Tensor, advantage: Tensor) -> Tensor:
    """Of each token, what policy-gradient trainers make of its statistics: -A log p_target - 0.01 H."""
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
    """The largest |value - exact| / (|exact| + 0.15)."""
    return ((value.double() - exact).abs() / (exact.abs() + _OFFSET)).max().item()


def demand(name: str, errors: dict[str, float | None], bounds: dict[str, float]) -> dict[str, float | None]:
    """The errors; those of ours have to be within the bounds: a time is worth nothing where the result is wrong."""
    for key, bound in bounds.items():
        error = errors.get(key)
        if name.startswith("ours") and error is not None and not error <= bound:
            raise ArithmeticError(f"{key} is {error:.1e}, expected at most {bound:.1e}")
    return errors


class Reference:
    """What float64 makes of (rows, V) logits: every row's statistics, the gradient of some rows.

    Losses are "entropy", "cross entropy" of the target and, with an advantage, "policy".
    """

    def __init__(self, logits: Tensor, target: Tensor, advantage: Tensor | None = None) -> None:
        self.logits, self.target, self.advantage = logits, target, advantage
        count = min(_SAMPLED_ROWS, len(logits))
        self.sample = torch.linspace(0, len(logits) - 1, count, device=logits.device).long()
        self._gradients: dict[str, Tensor] = {}

    @functools.cached_property
    def values(self) -> dict[str, Tensor]:
        """Per row, float64: the entropy, and the cross entropy of the target."""
        rows = max(1, _CHUNK_ELEMENTS // self.logits.shape[1])
        parts = [
            reference.row_statistics(z, t)
            for z, t in zip(self.logits.split(rows), self.target.split(rows), strict=True)
        ]
        return {
            loss: torch.cat([_row_loss(loss, part, None) for part in parts]) for loss in ("entropy", "cross entropy")
        }

    def gradients(self, loss: str) -> Tensor:
        """(sample, V), float64: of each sampled row's own loss."""
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
        """The largest |value - exact| / (exact + 0.15); exact is the weighted sum of the rows' losses, or these."""
        exact = self.values[loss]
        return relative_error(value, exact if weights is None else (weights.double() * exact).sum())

    def gradient_error(self, loss: str, gradient: Tensor, weights: Tensor) -> float:
        """The largest error of an entry over the largest exact entry of its row, in the sampled rows.

        Where a row's exact gradient is 0 or below the dtype's normal numbers, over the smallest normal number. That of
        "policy" is over the upstream gradient of the row's log-probability: at the target the gradient is 1 - p times
        that, and float32 knows 1 - p to 6e-8, however small it is.
        """
        exact = self.gradients(loss) * weights[self.sample].double().unsqueeze(-1)
        error = (gradient[self.sample].double() - exact).abs().amax(dim=-1)
        largest = exact.abs().amax(dim=-1).clamp(min=torch.finfo(gradient.dtype).tiny)
        if loss == "policy" and self.advantage is not None:
            largest = largest.maximum((weights * self.advantage).abs()[self.sample])
        return (error / largest).max().item()


class Exact(NamedTuple):
    """In float64: each token's entropy and log-probability, and the gradients of a mean loss."""

    entropy: Tensor
    logprob: Tensor
    loss: float
    hidden: Tensor
    weight: Tensor


class LinearReference:
    """What float64 makes of hidden states and an output projection, some tokens at a time."""

    def __init__(
        self, operands: Operands, target: Tensor, temperature: float = 1.0, advantage: Tensor | None = None
    ) -> None:
        self.operands, self.target, self.temperature, self.advantage = operands, target, temperature, advantage
        self.sparsity: dict[str, float] = {}
        self._exact: dict[str, Exact] = {}

    def exact(self, loss: str) -> Exact:
        """Of the mean of a loss, which `_row_loss` names; the first "entropy" finds how sparse the gradient is too."""
        if loss not in self._exact:
            self._exact[loss] = self._compute(loss)
        return self._exact[loss]

    def loss(self, loss: str) -> Tensor:
        """Its mean, a scalar in float64."""
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
        """Of the gradient of hidden and, where there is one, of weight: the norm of the error over the norm."""
        exact, found = self.exact(loss), {}
        for name, gradient in zip(("hidden", "weight"), gradients, strict=False):
            wanted = getattr(exact, name)
            found[f"{name}_gradient_error"] = ((gradient.double() - wanted).norm() / wanted.norm()).item()
        return found
