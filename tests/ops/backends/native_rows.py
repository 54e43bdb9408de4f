"""What the tests of the native backend share: its calls, rows of many shapes, and their sums in float64."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from em_kernels.ops.backends import native
from em_kernels.ops.types import Divisor, Saved, Statistics, Temperature, Upstream, Wanted

INF, NAN = float("inf"), float("nan")
EVERYTHING = Wanted(second_moment=True, extra=True)


def entropy_with_gradient(
    logits: Tensor,
    token_weight: Tensor | None = None,
    temperature: float = 1.0,
    *,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """sum w H, and its gradient."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    loss = native.entropy_with_gradient(logits, token_weight, Divisor(), Temperature(common=temperature), out, softcap)
    return loss, out


def row_statistics(
    logits: Tensor,
    temperature: float = 1.0,
    kept: Tensor | None = None,
    target: Tensor | None = None,
    softcap: float | None = None,
) -> tuple[Statistics, Saved]:
    return native.row_statistics(logits, kept, Temperature(common=temperature), target, EVERYTHING, softcap)


def row_gradient(
    logits: Tensor,
    saved: Saved,
    upstream: Upstream,
    target: Tensor | None = None,
    *,
    softcap: float | None = None,
    out: Tensor | None = None,
) -> Tensor:
    out = torch.empty_like(logits, memory_format=torch.contiguous_format) if out is None else out
    native.row_gradient(logits, saved, target, upstream, out, softcap)
    return out


def saved_of(
    m: Tensor, mean_d: Tensor | float = 0.0, varentropy: Tensor | float = 0.0, miss: Tensor | float = 0.0, tau=1.0
) -> Saved:
    """Of rows whose s is 1."""
    scale = torch.zeros_like(m, dtype=torch.float64) + math.log2(math.e) / tau
    planes = (m, 1.0, mean_d, varentropy, miss, scale.float(), scale - scale.float())
    return Saved(torch.stack([torch.zeros_like(m) + x for x in planes]).float())


def tensors(*results: Any) -> Iterator[Tensor]:
    """The tensors in results that may be tuples with None in them."""
    for x in results:
        if isinstance(x, Tensor):
            yield x
        elif x is not None:
            yield from tensors(*x)


class Exact(NamedTuple):
    """The sums of each row in float64, centred on the maximum as a float64 log-softmax is not: the gradient of a
    one-hot row lies far below the rounding error of 1."""

    d: Tensor
    s: Tensor
    a: Tensor
    b: Tensor
    sum_d: Tensor
    sum_e2: Tensor

    @property
    def entropy(self) -> Tensor:
        return self.s.log() - self.a / self.s

    def entropy_gradient(self, inv_tau: float) -> Tensor:
        return -inv_tau * self.d.exp() / self.s[:, None] * (finite(self.d) - (self.a / self.s)[:, None])


def exact(logits: Tensor, inv_tau: float, softcap: float | None = None) -> Exact:
    z = logits.double()
    z = z if softcap is None else capped(z, softcap)
    d = (z - z.amax(-1, keepdim=True)) * inv_tau
    e = d.exp()
    return Exact(d, e.sum(-1), (finite(d) * e).sum(-1), (finite(d) ** 2 * e).sum(-1), d.sum(-1), e.square().sum(-1))


def capped(z: Tensor, softcap: float) -> Tensor:
    return torch.where(z.isinf(), z, softcap * (z / softcap).tanh())


def slope_of_cap(z: Tensor, softcap: float) -> Tensor:
    """1 - tanh(z / c)^2, without the cancellation."""
    e = (-2 * z.double().abs() / softcap).exp()
    return 4 * e / (1 + e).square()


def finite(d: Tensor) -> Tensor:
    return d.clamp(min=-1e100)  # 0 * -inf is NaN, and the square is finite


def rows(vocab: int, offset: float, spread: float) -> Tensor:
    """Rows of many shapes, (rows, vocab), whose entropies at temperature `spread` run from 0 to log vocab."""
    generator = torch.Generator().manual_seed(vocab)
    noise = torch.randn(vocab, generator=generator)
    peak = torch.full((vocab,), -60.0).index_fill_(0, torch.tensor(vocab // 2), 0.0)
    is_first = torch.arange(vocab) == 0
    shapes = {
        "normal": noise,
        "wide": 3 * noise,
        "nearly uniform": 1e-3 * noise,
        "uniform": torch.zeros(vocab),
        "one-hot": peak,
        # float32 rounds the runner-up's distance to the maximum, which decides the gradient, by half a unit of 7.6e-6.
        "one-hot off the grid": torch.where(peak == 0, 0.5 + 2**-18, torch.where(is_first, -70.0, -85.0)),
        "nearly one-hot": peak / 4 + noise / 10,
        "rising": torch.linspace(-8, 0, vocab),  # every block brings a new maximum
        "falling": torch.linspace(0, -8, vocab),
        "some banned": torch.where(noise < noise.median() - 0.5, -INF, noise),
        "first half banned": torch.where(torch.arange(vocab) < vocab // 2, -INF, noise),
        "all but one banned": torch.full((vocab,), -INF).index_fill_(0, torch.tensor(vocab - 1), 0.0),
    }
    return torch.stack(list(shapes.values())) * spread + offset


def assert_entropy_close(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= 2e-6 * expected + 3e-7).all(), (error / (2e-6 * expected + 3e-7)).max()
    assert (actual >= 0).all()


def assert_gradient_close(actual: Tensor, expected: Tensor, scale: float = 1.0, relative: float = 2e-6) -> None:
    """Within `relative` of each row's largest entry, given exponentials below the normal numbers' range count as 0.

    In 16 bits, within that or within a unit in the last place of the correctly rounded entry, whichever is more.
    """
    allowed = relative * expected.abs().amax(-1, keepdim=True) + 4e-36 * scale
    if actual.dtype != torch.float32:
        expected = expected.to(actual.dtype).double()
        allowed = torch.maximum(allowed, unit_in_last_place(expected, actual.dtype))
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), (error / allowed).max()


def unit_in_last_place(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Of float64 numbers in the range of the dtype."""
    info = torch.finfo(dtype)
    exponent = values.abs().clamp(min=info.tiny).frexp().exponent.double() - 1
    return exponent.exp2() * info.eps
