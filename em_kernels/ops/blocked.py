"""The operators in PyTorch, on any device: blocks of rows small enough to stay in cache, worked on in place.

With d_j = (z_j - max z) / tau the sums s = sum e^d, a = sum d e^d, b = sum d^2 e^d give, per row,

    E = a / s      H = log s - E      lse = max z / tau + log s      V = b / s - E^2      log p_t = d_t - log s

and with u = d - E the gradient of any mix of them is (1/tau) [ e^d / s (A + B u + C u^2) + alpha [j = t] ]. Neither
log s nor lse appears in it, which is what keeps the gradient of an all but one-hot row accurate.

float32 rows on the CPU go through the compiled kernels of `native_cpu` where those were built: they read a row from
memory once where this reads it from cache four times. Elsewhere float32 is worked on in float64: the gradient of a row
all but one-hot is one exponential, whose relative error is the rounding of d. 16-bit logits, whose gradients round more
coarsely than that, are worked on in float32. Exponents are clamped rather than selected (see `_exponentials`), and
masked rows are left out of the blocks.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from em_kernels.ops import native_cpu, operators
from em_kernels.ops.operators import new_statistics

# A block and its scratch stay within a core's second-level cache (1 to 2 MB on current server CPUs); on a GPU there is
# no such reason, only launch overhead to spread and memory to bound.
_BLOCK_BYTES = {"cpu": 1 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 26
# e^-800 is 0 in float64 and float32, and (-800) e^-800 is 0 where (-inf) * 0 is NaN.
_LOWEST_EXPONENT = -800.0

RowIndex = slice | Tensor


def row_statistics(
    logits: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None,
    varentropy: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    m, s, a, b = new_statistics(logits, 4, _rows(logits)).zero_()
    scale = _exponent_scale(logits, row_temperature, temperature)
    if _runs_compiled(logits):
        tau = temperature if row_temperature is None else row_temperature
        m, s, a, b = native_cpu.row_sums(logits, mask, tau, second_moment=varentropy)
    else:
        for index, z in _blocks(logits, mask):
            largest, d, e = _exponentials(z, scale[index])
            m[index] = largest.to(m.dtype)
            s[index] = e.sum(dim=-1).to(s.dtype)
            a[index] = e.mul_(d).sum(dim=-1).to(a.dtype)
            if varentropy:
                b[index] = e.mul_(d).sum(dim=-1).to(b.dtype)

    mean, log_s = a / s, s.log()
    inv_tau = (scale * math.log(2)).to(m.dtype)
    entropy, lse = log_s - mean, m * inv_tau + log_s
    variance = (b / s - mean.square()).clamp_(min=0) if varentropy else new_statistics(logits, 0)
    logprob = new_statistics(logits, 0)
    if target is not None:
        logprob = (_target_logits(logits, target) - m) * inv_tau - log_s
    scale_hi = scale.to(m.dtype)
    saved = torch.stack((m, mean, s, scale_hi, (scale - scale_hi).to(m.dtype)))
    if mask is not None:
        for statistic in (entropy, lse, variance, logprob, saved):
            if statistic.numel() > 0:
                statistic.masked_fill_(~mask, 0)
    return entropy, lse, logprob, variance, saved


def row_gradient(
    logits: Tensor,
    saved: Tensor,
    varentropy: Tensor,
    target: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_logprob: Tensor | None,
    grad_varentropy: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Writes the gradient into `out`, which may be the logits themselves, and returns it."""
    m, mean, s, scale_hi, scale_lo = saved
    masked, inv_tau = scale_hi == 0, scale_hi * math.log(2)
    constant = linear = quadratic = torch.zeros_like(m)
    if grad_entropy is not None:
        linear = linear - grad_entropy
    if grad_lse is not None:
        constant = constant + grad_lse
    if grad_logprob is not None:
        constant = constant - grad_logprob
    if grad_varentropy is not None:
        constant = constant - grad_varentropy * varentropy
        linear = linear + 2 * grad_varentropy
        quadratic = grad_varentropy
    per_exponential = inv_tau / s
    constant, linear, quadratic = ((x * per_exponential).masked_fill_(masked, 0) for x in (constant, linear, quadratic))
    target = None if grad_logprob is None else target
    alpha = None if grad_logprob is None else (grad_logprob * inv_tau).masked_fill_(masked, 0)

    if _runs_compiled(logits):
        # The compiled kernel's polynomial is in d = u + E.
        constant, linear = constant + mean * (mean * quadratic - linear), linear - 2 * mean * quadratic
        native_cpu.row_gradient(
            logits,
            m,
            scale_hi,
            scale_lo,
            constant,
            linear,
            None if grad_varentropy is None else quadratic,
            out,
            target=target,
            alpha=alpha,
        )
        return out
    if target is not None and alpha is not None:
        target, valid = _valid_target(target, logits.shape[2])
        alpha = torch.where(valid | masked, alpha, torch.nan)
    working = _working_dtype(logits)
    scale = scale_hi.to(working) + scale_lo
    for index, z in _blocks(logits, ~masked, out):
        _, u, e = _exponentials(z, scale[index], m[index])
        u -= mean[index].unsqueeze(-1)
        polynomial = u * quadratic[index].unsqueeze(-1)
        polynomial += linear[index].unsqueeze(-1)
        polynomial *= u
        polynomial += constant[index].unsqueeze(-1)
        e *= polynomial
        if target is not None and alpha is not None:
            e.scatter_add_(-1, target[index].unsqueeze(-1), alpha[index].unsqueeze(-1).to(working))
        _write_block(out, index, e)
    return out


def entropy_with_gradient(
    logits: Tensor,
    weight: Tensor | None,
    divisor: Tensor | None,
    count: int,
    row_temperature: Tensor | None,
    temperature: float,
    out: Tensor,
) -> Tensor:
    """Writes the gradient into `out`, which may be the logits themselves, and returns the loss."""
    entropy = new_statistics(logits, _rows(logits)).zero_()
    row_scale = torch.full_like(entropy, 1.0 / count)
    if weight is not None:
        row_scale *= weight
    if divisor is not None:
        row_scale /= torch.where(divisor == 0, 1, divisor)
    if _runs_compiled(logits):
        tau = temperature if row_temperature is None else row_temperature
        entropy = native_cpu.entropy_with_gradient(logits, row_scale, tau, out)
        return (entropy * row_scale).sum()

    scale = _exponent_scale(logits, row_temperature, temperature)
    for index, z in _blocks(logits, row_scale != 0 if weight is not None else None, out):
        _, d, e = _exponentials(z, scale[index])
        s = e.sum(dim=-1)
        mean = (d * e).sum(dim=-1) / s
        entropy[index] = (s.log() - mean).to(entropy.dtype)
        e *= d.sub_(mean.unsqueeze(-1))
        e *= (-math.log(2) * row_scale[index] * scale[index] / s).unsqueeze(-1)
        _write_block(out, index, e)
    return (entropy * row_scale).sum()


def scale_(gradient: Tensor, factor: Tensor) -> Tensor:
    if not operators.host_sees(factor) or factor.item() != 1:
        gradient.mul_(factor)
    return gradient


def _rows(logits: Tensor) -> int:
    return logits.shape[0] * logits.shape[1]


def _runs_compiled(logits: Tensor) -> bool:
    return logits.device.type == "cpu" and logits.dtype == torch.float32 and native_cpu.unavailable_reason() is None


def _working_dtype(logits: Tensor) -> torch.dtype:
    has_float64 = logits.device.type != "mps"
    return torch.float64 if logits.element_size() >= 4 and has_float64 else torch.float32


def _exponent_scale(logits: Tensor, row_temperature: Tensor | None, temperature: float) -> Tensor:
    """log2(e) / tau of each row, in the dtype that is worked in."""
    working = _working_dtype(logits)
    if row_temperature is not None:
        return math.log2(math.e) / row_temperature.to(working)
    return torch.full((_rows(logits),), math.log2(math.e) / temperature, dtype=working, device=logits.device)


def _exponentials(z: Tensor, scale: Tensor, m: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The row maxima, d and e^d, d and e^d in memory of their own."""
    m = z.amax(dim=-1) if m is None else m
    d = z.to(scale.dtype) - m.unsqueeze(-1)
    d.mul_((scale * math.log(2)).unsqueeze(-1)).clamp_(min=_LOWEST_EXPONENT)
    return m, d, d.exp()


def _blocks(logits: Tensor, mask: Tensor | None, out: Tensor | None = None) -> Iterator[tuple[RowIndex, Tensor]]:
    """Blocks of rows with their numbers; the rows left out as masked are zeroed in `out`."""
    outer, inner, vocab = logits.shape
    host_sees = operators.host_sees(logits)
    block_bytes = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    rows = max(1, block_bytes // (vocab * _working_dtype(logits).itemsize))
    if mask is not None and host_sees:
        if out is not None:
            out[(~mask).view(outer, inner)] = 0
        for index in mask.nonzero().squeeze(-1).split(rows):
            yield index, logits[index // inner, index % inner]
        return
    for i in range(outer):
        for start in range(0, inner, rows):
            stop = min(start + rows, inner)
            index, z = slice(i * inner + start, i * inner + stop), logits[i, start:stop]
            # Which rows to leave out is not known on the host: read them as zeros instead.
            yield index, z if mask is None else z.masked_fill(~mask[index].unsqueeze(-1), 0)


def _write_block(out: Tensor, index: RowIndex, block: Tensor) -> None:
    inner = out.shape[1]
    if isinstance(index, slice):
        i, start = divmod(index.start, inner)
        out[i, start : start + block.shape[0]] = block
    else:
        out[index // inner, index % inner] = block.to(out.dtype)


def _valid_target(target: Tensor, vocab: int) -> tuple[Tensor, Tensor]:
    """The target, 0 where it is out of range, as it may be of a masked row; and where it is not."""
    valid = (target >= 0) & (target < vocab)
    return torch.where(valid, target, 0), valid


def _target_logits(logits: Tensor, target: Tensor) -> Tensor:
    """The target's logit of each row, NaN where the target is out of range."""
    outer, inner, vocab = logits.shape
    index, valid = _valid_target(target, vocab)
    z = logits.gather(-1, index.view(outer, inner, 1)).reshape(-1)
    return torch.where(valid, z.to(new_statistics(logits).dtype), torch.nan)
