"""Comparison with the float64 reference, at the accuracy that is promised."""

import reference
import torch
from torch import Tensor

# Mantissa bits, which decide the unit in the last place.
_MANTISSA = {torch.bfloat16: 7, torch.float16: 10}


def reference_loss(logits: Tensor, mask: Tensor | None = None, upstream: Tensor | float = 1.0, **options):
    """The loss and the gradient of (loss * upstream).sum(), in float64, on the CPU."""
    z = logits.detach().cpu().double()
    options = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in options.items()}
    mask = None if mask is None else mask.cpu()
    loss = reference.entropy_loss(z, mask, **options)
    # The loss is linear in the entropies; each one's coefficient is its weight over the divisor.
    weight = torch.ones(z.shape[:-1], dtype=torch.float64)
    if mask is not None:
        weight = mask.double() if mask.is_floating_point() else (mask != 0).double()
    reduction, items = options.get("reduction", "mean"), options.get("num_items_in_batch")
    divisor = 1.0 if reduction != "mean" else float(weight.sum() if items is None else items)
    upstream = upstream.cpu().double() if isinstance(upstream, Tensor) else upstream
    coefficient = (weight * upstream / (divisor or 1.0)).unsqueeze(-1)
    gradient = coefficient * entropy_gradient(z, options.get("temperature", 1.0))
    return loss, torch.where(weight.unsqueeze(-1) != 0, gradient, 0.0)


def entropy_gradient(z: Tensor, temperature: Tensor | float = 1.0) -> Tensor:
    """dH/dz of each row in float64, where autograd of `reference` cancels.

    In a row that is one-hot but for 1e-9, log p + H of its largest entry is a difference of numbers of the size of the
    sum's rounding: autograd's gradient is off by all of itself there. With d = y - max y it is d - sum p d, exactly.
    """
    temperature = temperature.double().unsqueeze(-1) if isinstance(temperature, Tensor) else temperature
    d = (z - z.amax(-1, keepdim=True)) / temperature
    p = d.softmax(-1)
    d = torch.where(d == -torch.inf, 0.0, d)
    return -p * (d - (p * d).sum(-1, keepdim=True)) / temperature


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
    ulps: int = 1,
) -> None:
    """Each row within 2e-6 of its largest entry; 16-bit gradients within `ulps` units in the last place or that.

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
    allowed = (2e-6 * torch.maximum(largest, torch.as_tensor(scale, dtype=torch.float64))).expand_as(expected)
    if dtype in _MANTISSA:
        rounded = expected.to(dtype).double()
        exponent = torch.frexp(rounded.abs().clamp(min=torch.finfo(dtype).smallest_normal)).exponent - 1
        ulp = torch.ldexp(torch.ones_like(rounded), exponent - _MANTISSA[dtype])
        expected, allowed = rounded, torch.maximum(allowed, ulps * ulp)
    if dtype == torch.float64:
        allowed = 1e-12 * torch.maximum(largest, torch.ones(())).expand_as(expected)
    # Exponentials below the smallest normal float32, 1e-38, are flushed to 0; they enter times d / tau and upstream.
    allowed = allowed + 1e-30
    error = (actual - expected).abs()
    worst = (error / allowed).max() if error.numel() else 0.0
    assert worst <= 1, f"gradient error is {worst:.2f} times what is allowed"
