"""The backend in PyTorch, on any device: blocks of rows small enough to stay in cache, worked on in place.

Four passes over a block give its maxima m and, with d = (z - m) / tau, the sums of `Sums`; the gradient is

    dL/dz_j = e^d_j (constant + linear u_j + quadratic u_j^2) with u = d - a/s (see `statistics.coefficients`),

in which neither log s nor lse appears: that keeps it accurate in a row that is all but one-hot.

float32 logits are worked on in float64, because the gradient of such a row is one exponential, whose relative error is
the rounding of d. 16-bit logits, whose gradients round more coarsely than that, are worked on in float32. Exponents are
clamped instead of selected: (-800) e^-800 is 0 where (-inf) * 0 is NaN. Masked rows are left out of the blocks.
"""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from em_kernels.ops import statistics, types
from em_kernels.ops.statistics import LOWEST_EXPONENT, Coefficients
from em_kernels.ops.types import (
    Divisor,
    RowIndex,
    Saved,
    Statistics,
    Sums,
    Temperature,
    Upstream,
    Wanted,
    row_count,
    statistics_dtype,
)

# A block and its scratch stay within a core's second-level cache (1 to 2 MB on current server CPUs). A GPU has no such
# reason for small blocks: there the size spreads the launches and bounds the memory.
_BLOCK_BYTES = {"cpu": 1 << 20}
_BLOCK_BYTES_ELSEWHERE = 1 << 26


def row_sums(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None = None,
) -> Sums:
    vocab = logits.shape[2]
    sums = Sums.allocate(logits, wanted).each(Tensor.zero_)
    inv_tau = _inverse(logits, temperature)
    for index, z in _blocks(logits, kept):
        z = statistics.capped(z, softcap)
        at = None if target is None else _Column(target[index], vocab)
        if at is not None:
            z = at.fill(z, -torch.inf)
        m, d, e = _exponentials(z, inv_tau[index])
        _put(sums.m, index, m)
        _put(sums.s, index, e.sum(dim=-1))
        if wanted.extra:
            block_d = _distances(z, m, inv_tau[index])
            block_d = (block_d if at is None else at.fill(block_d, 0.0)).sum(dim=-1)
            _put(sums.columns, index, torch.full_like(block_d, vocab) if at is None else vocab - at.exists.long())
            _put(sums.sum_d, index, torch.where(m == -torch.inf, 0, block_d))
            _put(sums.sum_e2, index, e.square().sum(dim=-1))
        _put(sums.a, index, e.mul_(d).sum(dim=-1))
        if wanted.second_moment:
            _put(sums.b, index, e.mul_(d).sum(dim=-1))
    return sums


def row_statistics(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None = None,
) -> tuple[Statistics, Saved]:
    sums = row_sums(logits, kept, temperature, target, wanted, softcap)
    target_logit = None if target is None else statistics.target_logits(logits, target, softcap)
    return statistics.finish(sums, target_logit, kept, temperature, statistics_dtype(logits.dtype))


def row_gradient(
    logits: Tensor,
    saved: Saved,
    target: Tensor | None,
    upstream: Upstream,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    working = _working_dtype(logits)
    of_row = statistics.coefficients(saved, upstream)
    inv_tau = (saved.scale_hi.to(working) + saved.scale_lo) * math.log(2)
    for index, z in _blocks(logits, saved.kept, out):
        _, u, e = _exponentials(statistics.capped(z, softcap), inv_tau[index], saved.m[index])
        u -= saved.mean_d[index].unsqueeze(-1)
        gradient = _polynomial(u, of_row.constant[index], of_row, index).mul_(e)
        if target is not None and of_row.target_constant is not None and of_row.alpha is not None:
            at = _Column(target[index], logits.shape[2])
            at_target = _polynomial(at.read(u), of_row.target_constant[index], of_row, index) * at.read(e)
            gradient = at.write_(gradient, at_target + of_row.alpha[index].unsqueeze(-1))
        _write_block(out, index, _times_slope(gradient, z, softcap))


def entropy_with_gradient(
    logits: Tensor,
    token_weight: Tensor | None,
    divisor: Divisor,
    temperature: Temperature,
    out: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    row_factor = divisor.row_factor(logits, row_count(logits), token_weight)
    kept = None if token_weight is None else row_factor != 0
    entropy = torch.zeros_like(row_factor)
    inv_tau = _inverse(logits, temperature)
    for index, z in _blocks(logits, kept, out):
        _, d, e = _exponentials(statistics.capped(z, softcap), inv_tau[index])
        s = e.sum(dim=-1)
        mean_d = (d * e).sum(dim=-1) / s
        entropy[index] = (s.log() - mean_d).to(entropy.dtype)
        if out is None:
            continue
        e *= d.sub_(mean_d.unsqueeze(-1))
        e *= (-row_factor[index] * inv_tau[index] / s).unsqueeze(-1)
        _write_block(out, index, _times_slope(e, z, softcap))
    return (entropy * row_factor).sum()


def scale_(gradient: Tensor, factor: Tensor) -> None:
    gradient.mul_(factor)


def _times_slope(gradient: Tensor, z: Tensor, softcap: float | None) -> Tensor:
    """The gradient of the logits z from that of the capped logits, in place."""
    return gradient if softcap is None else gradient.mul_(statistics.slope(z, softcap))


def _polynomial(u: Tensor, constant: Tensor, of_row: Coefficients, index: RowIndex) -> Tensor:
    """constant + linear u + quadratic u^2 in the rows `index`."""
    value = u * of_row.linear[index].unsqueeze(-1)
    if of_row.quadratic is not None:
        value.addcmul_(u.square(), of_row.quadratic[index].unsqueeze(-1).to(u.dtype))
    return value.add_(constant.unsqueeze(-1))


def _put(total: Tensor | None, index: RowIndex, part: Tensor) -> None:
    if total is not None:
        total[index] = part.to(total.dtype)


class _Column:
    """The target's column in each row of a block, where there is one."""

    def __init__(self, target: Tensor, vocab: int) -> None:
        self.exists = (target >= 0) & (target < vocab)
        self.index = torch.where(self.exists, target, 0).unsqueeze(-1)

    def read(self, block: Tensor) -> Tensor:
        return block.gather(-1, self.index)

    def write_(self, block: Tensor, values: Tensor) -> Tensor:
        return block.scatter_(
            -1, self.index, torch.where(self.exists.unsqueeze(-1), values, self.read(block)).to(block.dtype)
        )

    def fill(self, block: Tensor, value: float) -> Tensor:
        """A copy of the block with `value` in the target's column."""
        return self.write_(block.clone(), torch.full_like(self.index, value, dtype=block.dtype))


def _working_dtype(logits: Tensor) -> torch.dtype:
    has_float64 = logits.device.type != "mps"
    return torch.float64 if logits.element_size() >= 4 and has_float64 else torch.float32


def _inverse(logits: Tensor, temperature: Temperature) -> Tensor:
    """1 / tau of each row, in the dtype that is worked in."""
    dtype = _working_dtype(logits)
    return logits.new_ones(row_count(logits), dtype=dtype) * temperature.inverse(dtype)


def _distances(z: Tensor, m: Tensor, inv_tau: Tensor) -> Tensor:
    """d = (z - m) / tau; -inf in a row whose maximum is -inf."""
    m = torch.where(m == -torch.inf, 0, m).unsqueeze(-1)
    return (z.to(inv_tau.dtype) - m).mul_(inv_tau.unsqueeze(-1))


def _exponentials(z: Tensor, inv_tau: Tensor, m: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """The row maxima, d and e^d, d and e^d in memory of their own."""
    m = z.amax(dim=-1) if m is None else m
    d = _distances(z, m, inv_tau).clamp_(min=LOWEST_EXPONENT)
    return m, d, d.exp()


def _blocks(logits: Tensor, kept: Tensor | None, out: Tensor | None = None) -> Iterator[tuple[RowIndex, Tensor]]:
    """Blocks of the rows that are kept, with their numbers; the masked rows are zeroed in `out`."""
    outer, inner, vocab = logits.shape
    block_bytes = _BLOCK_BYTES.get(logits.device.type, _BLOCK_BYTES_ELSEWHERE)
    rows = max(1, block_bytes // (vocab * _working_dtype(logits).itemsize))
    if kept is not None and types.host_sees(logits):
        if out is not None:
            out[(~kept).view(outer, inner)] = 0
        for index in kept.nonzero().squeeze(-1).split(rows):
            yield index, logits[index // inner, index % inner]
        return
    for i in range(outer):
        for start in range(0, inner, rows):
            stop = min(start + rows, inner)
            index, z = slice(i * inner + start, i * inner + stop), logits[i, start:stop]
            # The host does not know which rows are masked: they are read as zeros, and their coefficients are 0.
            yield index, z if kept is None else z.masked_fill(~kept[index].unsqueeze(-1), 0)


def _write_block(out: Tensor, index: RowIndex, block: Tensor) -> None:
    inner = out.shape[1]
    if isinstance(index, slice):
        i, start = divmod(index.start, inner)
        out[i, start : start + block.shape[0]] = block
    else:
        out[index // inner, index % inner] = block.to(out.dtype)
