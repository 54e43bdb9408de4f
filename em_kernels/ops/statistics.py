"""Statistics and gradients from the sums over a row: the formulas that every backend and every rank share, in torch.

With d_j = (z_j - m) / tau and the sums s, a, b of `Sums`, the part i of a row moves to the row's maximum by
D_i = (m_i - m) / tau, and the parts of a row add up:

    s = sum_i e^D_i s_i      a = sum_i e^D_i (a_i + D_i s_i)      b = sum_i e^D_i (b_i + 2 D_i a_i + D_i^2 s_i)

    H = log s - a/s      lse = m / tau + log s      log p_t = d_t - log s      V = b/s - (a/s)^2

A target's own column is a part of its own, the other columns are the other part. Where the target is the maximum,
log p_t = -log1p(rest) with rest the sum over the other columns, and 1 - p_t = rest / s: both keep their relative
accuracy however close p_t is to 1, where d_t - log s and 1 - e^(d_t) / s cancel.

The arithmetic is float64 on the few numbers of a row, and rounded once.
"""

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_kernels.ops.types import EXTRA, Saved, Statistics, Sums, Temperature, Upstream, statistics_dtype

# e^-800 is 0 in float64, and (-800) e^-800 is 0 where (-inf) * 0 is NaN.
LOWEST_EXPONENT = -800.0


class Coefficients(NamedTuple):
    """The gradient of a row as dL/dz_j = e^d_j (constant + linear u_j + quadratic u_j^2), where u_j = d_j - mean_d.

    At the target's column `target_constant` takes the place of `constant`, and `alpha` is added. `quadratic` is None
    where the loss does not use the varentropy, `target_constant` and `alpha` where it does not use the log-probability.
    """

    constant: Tensor
    linear: Tensor
    quadratic: Tensor | None
    target_constant: Tensor | None
    alpha: Tensor | None


def combine(parts: Sums, temperature: Temperature) -> Sums:
    """The sums of whole rows, in float64, from those of disjoint parts, which are stacked along the first dimension."""
    return _added(_moved_to_maximum(parts.each(_widen), temperature))


def finish(
    sums: Sums, target_logit: Tensor | None, kept: Tensor | None, temperature: Temperature, dtype: torch.dtype
) -> tuple[Statistics, Saved]:
    """The statistics of each row, and what its gradient needs.

    Args:
        sums: of all columns of a row but the target's.
        target_logit: z_t of each row, NaN where the target is out of range; None where there are no targets.
        kept: False marks a masked row, whose sums and target may hold anything.
        temperature: tau.
        dtype: of the results, float32 or float64.
    """
    sums = sums.each(_widen)
    rest, is_top = None, None
    if target_logit is not None:
        target_logit = _widen(target_logit)
        # Where the target and all other logits are -inf, there is no most likely token.
        is_top = (target_logit >= sums.m) & target_logit.isfinite()
        moved = _moved_to_maximum(_with_target(sums, target_logit), temperature)
        rest, sums = moved.s[0], _added(moved)

    # A row whose logits are all -inf has no distribution, and its lse would be -inf, which is not NaN.
    s = torch.where(sums.s == 0, torch.nan, sums.s)
    inv_tau = temperature.inverse(s.dtype)
    log_s = s.log() if rest is None or is_top is None else torch.where(is_top, rest.log1p(), s.log())
    mean_d = sums.a / s
    logprob = None
    if target_logit is not None and is_top is not None:
        logprob = torch.where(is_top, 0.0, (target_logit - sums.m) * inv_tau) - log_s
    varentropy = None if sums.b is None else (sums.b / s - mean_d.square()).clamp(min=0)
    extra = None
    if sums.columns is not None and sums.sum_d is not None and sums.sum_e2 is not None:
        top1 = torch.zeros_like(s) if is_top is None else is_top.to(s.dtype)
        by_name = {
            "max_prob": 1 / s,
            "top1": torch.where(s.isnan(), torch.nan, top1),
            "mean_logprob": sums.sum_d / sums.columns - log_s,
            "collision": sums.sum_e2 / s.square(),
        }
        extra = torch.stack([by_name[name] for name in EXTRA])

    zero = torch.zeros_like(s)
    scale = zero + inv_tau * math.log2(math.e)
    scale_hi = scale.to(dtype)
    miss = zero if rest is None else rest / s
    planes = (sums.m, s, mean_d, zero if varentropy is None else varentropy, miss, scale_hi, scale - scale_hi)

    def finished(values: Tensor | None) -> Any:
        """The values in the results' dtype, 0 where masked."""
        if values is None or kept is None:
            return None if values is None else values.to(dtype)
        return values.to(dtype).masked_fill(~kept, 0)

    fields = (log_s - mean_d, sums.m * inv_tau + log_s, logprob, varentropy, extra)
    saved = finished(torch.stack([x.to(dtype) for x in planes]))
    return Statistics(*map(finished, fields)), Saved(saved)


def coefficients(saved: Saved, upstream: Upstream) -> Coefficients:
    """The gradient's coefficients of each row, 0 where masked.

    term, upstream g     constant     linear     quadratic     alpha          all times 1 / tau, the first three over s
    entropy                           -g
    lse                  g
    log prob             -g                                    g (1 - p_t)    and no constant at the target
    varentropy           -g V         2 g        g
    """
    inv_tau = saved.scale_hi * math.log(2)
    over_s = inv_tau / saved.s
    masked = ~saved.kept
    constant = linear = torch.zeros_like(over_s)
    if upstream.entropy is not None:
        linear = linear - upstream.entropy
    if upstream.lse is not None:
        constant = constant + upstream.lse
    if upstream.varentropy is not None:
        constant = constant - upstream.varentropy * saved.varentropy
        linear = linear + 2 * upstream.varentropy

    def of_kept(values: Tensor) -> Tensor:
        return values.masked_fill(masked, 0)

    target_constant = alpha = None
    if upstream.logprob is not None:
        target_constant = of_kept(constant * over_s)
        constant = constant - upstream.logprob
        alpha = of_kept(upstream.logprob * inv_tau * saved.miss)
    quadratic = None if upstream.varentropy is None else of_kept(upstream.varentropy * over_s)
    return Coefficients(of_kept(constant * over_s), of_kept(linear * over_s), quadratic, target_constant, alpha)


def capped(z: Tensor, softcap: float | None) -> Tensor:
    """softcap * tanh(z / softcap) in the statistics dtype, where z is finite; without a softcap, z itself."""
    if softcap is None:
        return z
    z = z.to(statistics_dtype(z.dtype))
    # tanh would make an ordinary logit of a banned token, and hide a +inf.
    return torch.where(z.isinf(), z, (z / softcap).tanh_().mul_(softcap))


def slope(z: Tensor, softcap: float) -> Tensor:
    """The derivative of the capped logits by z, 1 - tanh(z / softcap)^2, in the statistics dtype."""
    # 1 / cosh^2 keeps its relative accuracy where tanh^2 is next to 1.
    return (z.to(statistics_dtype(z.dtype)) / softcap).cosh_().pow_(-2)


def target_logits(logits: Tensor, target: Tensor, softcap: float | None = None) -> Tensor:
    """The target's capped logit of each row, NaN where the target is outside [0, V)."""
    outer, inner, vocab = logits.shape
    exists = (target >= 0) & (target < vocab)
    z = logits.gather(-1, torch.where(exists, target, 0).view(outer, inner, 1)).reshape(-1)
    return torch.where(exists, capped(z, softcap).to(statistics_dtype(logits.dtype)), torch.nan)


def _moved_to_maximum(parts: Sums, temperature: Temperature) -> Sums:
    """Each part's sums with d measured from the maximum of all parts; m itself stays."""
    m = parts.m.amax(0)
    # Equal maxima may both be -inf, whose difference is NaN.
    D = torch.where(parts.m == m, 0.0, (parts.m - m) * temperature.inverse(m.dtype))
    sum_d = None
    if parts.sum_d is not None and parts.columns is not None:
        sum_d = torch.where(parts.columns == 0, 0.0, parts.sum_d + parts.columns * D)
    D = D.clamp(min=LOWEST_EXPONENT)
    e = D.exp()
    return Sums(
        parts.m,
        e * parts.s,
        e * (parts.a + D * parts.s),
        None if parts.b is None else e * (parts.b + D * (2 * parts.a + D * parts.s)),
        parts.columns,
        sum_d,
        None if parts.sum_e2 is None else e.square() * parts.sum_e2,
    )


def _added(moved: Sums) -> Sums:
    """The sums of whole rows from parts that have been moved to the maximum."""
    return moved.each(lambda field: field.sum(0))._replace(m=moved.m.amax(0))


def _with_target(others: Sums, z: Tensor) -> Sums:
    """The sums over the other columns and those over the target's, whose logit is z, stacked as two parts of a row."""
    one, zero = torch.where(z == torch.inf, torch.nan, (z != -torch.inf).to(z.dtype)), torch.zeros_like(z)
    target = iter((z, one, zero, zero, torch.ones_like(z), zero, one))
    return Sums(*(_paired(field, next(target)) for field in others))


def _paired(field: Tensor | None, other: Tensor) -> Any:
    return None if field is None else torch.stack((field, other))


def _widen(values: Tensor) -> Tensor:
    return values if values.device.type == "mps" else values.double()
