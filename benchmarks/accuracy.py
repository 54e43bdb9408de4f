"""Logits to measure on, and how far a loss and its gradient are from float64 on these very logits."""

import functools

import torch
from torch import Tensor

from em_kernels.ops import reference

# p_k is proportional to u_(k)^-4, u sorted and uniform: a Zipf-like tail under one or two likely tokens, the mean
# entropy 0.5 nat at any vocabulary above some thousands, a sixth of the tokens below 0.01 nat.
_PEAKED_SCALE = 4.0
# Entropy log V - 0.005.
_FLAT_SCALE = 0.1
_CHUNK_ELEMENTS = 1 << 24
_SAMPLED_ROWS = 32
# An entropy may be off by 2e-6 of itself plus 3e-7: divided by H + 0.15 both become 2e-6.
_ENTROPY_OFFSET = 0.15


def draw_logits(kind: str, rows: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """(rows, vocab): "peaked", like those of a trained model, of mean entropy 0.5 nat, or "flat", close to uniform."""
    generator = torch.Generator(device).manual_seed(0)
    logits = torch.empty(rows, vocab, dtype=dtype, device=device)
    # Chunks of rows: nothing but the logits themselves may raise a process's peak memory.
    for part in logits.split(max(1, _CHUNK_ELEMENTS // vocab)):
        z = torch.empty(part.shape, device=device)
        if kind == "peaked":
            part.copy_(z.exponential_(generator=generator).mul_(_PEAKED_SCALE))
        else:
            part.copy_(z.normal_(generator=generator).mul_(_FLAT_SCALE))
    return logits


class Reference:
    """What float64 makes of (rows, V) logits and (rows,) targets: every row's losses, the gradient of some rows."""

    def __init__(self, logits: Tensor, target: Tensor) -> None:
        self.logits, self.target = logits, target
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
            "entropy": torch.cat([x.entropy for x in parts]),
            "cross_entropy": -torch.cat([x.logprob for x in parts if x.logprob is not None]),
        }

    def gradients(self, loss: str) -> Tensor:
        """(sample, V), float64: of each sampled row's own loss."""
        if loss in self._gradients:
            return self._gradients[loss]
        parts = []
        for index in self.sample.split(max(1, _CHUNK_ELEMENTS // self.logits.shape[1])):
            z = self.logits[index].double().requires_grad_()
            row = reference.row_statistics(z, self.target[index])
            value = row.entropy if loss == "entropy" else row.logprob
            assert value is not None
            value.sum().backward()
            assert z.grad is not None
            parts.append(z.grad if loss == "entropy" else -z.grad)
        self._gradients[loss] = torch.cat(parts)
        return self._gradients[loss]

    def loss_error(self, loss: str, value: Tensor, weights: Tensor | None) -> float:
        """The largest |value - exact| / (exact + 0.15); exact is the weighted sum of the rows' losses, or these."""
        exact = self.values[loss]
        if weights is not None:
            exact = (weights.double() * exact).sum()
        return ((value.double() - exact).abs() / (exact + _ENTROPY_OFFSET)).max().item()

    def gradient_error(self, loss: str, gradient: Tensor, weights: Tensor) -> float:
        """The largest error of an entry over the largest exact entry of its row, in the sampled rows.

        Where a row's exact gradient is 0 or below the dtype's normal numbers, over the smallest normal number.
        """
        exact = self.gradients(loss) * weights[self.sample].double().unsqueeze(-1)
        error = (gradient[self.sample].double() - exact).abs().amax(dim=-1)
        largest = exact.abs().amax(dim=-1).clamp(min=torch.finfo(gradient.dtype).tiny)
        return (error / largest).max().item()
