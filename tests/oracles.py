"""Comparison with the float64 reference, at the accuracy that is promised."""

import torch
from torch import Tensor

from em_kernels.ops import reference

# Mantissa bits, which decide the unit in the last place.
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def reference_loss(logits: Tensor, mask: Tensor | None = None, upstream: Tensor | float = 1.0, **options):
    """The loss and the gradient of (loss * upstream).sum(), in float64, on the CPU."""
    z = logits.detach().cpu().double().requires_grad_()
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    loss = reference.entropy_loss(z, None if mask is None else mask.cpu(), **options)
    upstream = upstream.cpu().double() if isinstance(upstream, Tensor) else upstream
    (loss * upstream).sum().backward()
    return loss.detach(), z.grad


def reference_stats(logits: Tensor, target: Tensor | None, mask: Tensor | None, upstream, temperature=1.0):
    """The statistics, 0 where masked, and the gradient of the sum of field * upstream, in float64, on the CPU."""
    z = logits.detach().cpu().double()
    kept = torch.ones(z.shape[:-1], dtype=torch.bool) if mask is None else mask.cpu() != 0
    z = torch.where(kept.unsqueeze(-1), z, 0.0).requires_grad_()
    target = None if target is None else torch.where(kept, target.cpu(), 0)
    temperature = temperature.cpu() if isinstance(temperature, Tensor) else temperature
    stats = reference.row_statistics(z, target, temperature=temperature)
    fields = [None if field is None else torch.where(kept, field, 0.0) for field in stats]
    total = sum(
        (field * g.cpu().double()).sum()
        for field, g in zip(fields, upstream, strict=True)
        if field is not None and g is not None
    )
    gradient = torch.autograd.grad(total, z)[0] if isinstance(total, Tensor) else torch.zeros_like(z)
    return [None if field is None else field.detach() for field in fields], gradient


def assert_entropy(actual: Tensor, expected: Tensor) -> None:
    """A token's entropy in float32: within 2e-6 of itself plus 3e-7."""
    actual = actual.detach().cpu().double()
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places than expected"
    error = (actual - expected).abs().nan_to_num(0.0)
    allowed = 2e-6 * expected.abs().nan_to_num(0.0) + 3e-7
    assert (error <= allowed).all(), f"entropy off by {(error - allowed).max():.2e} more than allowed"
    assert not (actual < 0).any(), "an entropy is negative"


def assert_gradient(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    scale: Tensor | float = 0.0,
    share: float = 2e-6,
    ulps: int = 1,
) -> None:
    """Each row within `share` of its largest entry; 16-bit gradients within `ulps` units in the last place or that.

    `scale`, a number or one per row, is an additional magnitude the rounding is relative to: the upstream gradient of
    terms that cancel in the row, such as the 1 - p of a log-probability.
    """
    actual = actual.detach().cpu()
    assert actual.dtype == dtype
    assert actual.shape == expected.shape
    actual = actual.double()
    assert torch.equal(actual.isnan(), expected.isnan()), "NaN in other places than expected"
    actual, expected = actual.nan_to_num(0.0), expected.nan_to_num(0.0)
    largest = expected.abs().amax(-1, keepdim=True)
    if isinstance(scale, Tensor):
        scale = scale.cpu().double().unsqueeze(-1)
    allowed = (share * torch.maximum(largest, torch.as_tensor(scale, dtype=torch.float64))).expand_as(expected)
    if dtype in _MANTISSA:
        rounded = expected.to(dtype).double()
        exponent = torch.frexp(rounded.abs().clamp(min=torch.finfo(dtype).smallest_normal)).exponent - 1
        ulp = torch.ldexp(torch.ones_like(rounded), exponent - _MANTISSA[dtype])
        expected, allowed = rounded, torch.maximum(allowed, ulps * ulp)
    if dtype == torch.float64:
        allowed = 1e-12 * torch.maximum(largest, torch.ones(())).expand_as(expected)
    # The reference itself is no better than this, where the terms of a uniform or one-hot row cancel.
    allowed = allowed + 1e-15
    error = (actual - expected).abs()
    worst = (error / allowed).max() if error.numel() else 0.0
    assert worst <= 1, f"gradient error is {worst:.2f} times what is allowed"
