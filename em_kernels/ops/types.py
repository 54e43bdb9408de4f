"""The values that travel together through the operators, each with its name.

A row is a token. Logits are (outer, inner, V) with contiguous columns and any two strides between their outer * inner
rows, so that logits[:, :-1] of a (batch, time, V) tensor is not copied; every other tensor holds one number per row, in
the rows' order, unless its description says otherwise.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# The CPU as tensors name it, and as fake tensors may. A device is compared with both in a fraction of the time in which
# `device.type` makes a string.
CPUS = (torch.device("cpu"), torch.device("cpu", 0))

RowIndex = slice | Tensor


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of statistics and sums over logits of `dtype`: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def host_sees(tensor: Tensor) -> bool:
    """Whether the host can look at the tensor's values without waiting for a device."""
    return tensor.device in CPUS


def rows_of_logits(logits: Tensor) -> Tensor:
    """(..., V) to (outer, inner, V) with contiguous columns; a view unless the rows need more than two strides."""
    logits = logits.resolve_neg()
    # What follows would give the same, in twice the host's time.
    if logits.dim() == 2 and logits.is_contiguous():
        return logits.unsqueeze(0)
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        logits = logits.contiguous()
    if logits.dim() == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        return logits
    return logits.reshape(1, logits.shape[:-1].numel(), logits.shape[-1])


def row_count(logits: Tensor) -> int:
    return logits.shape[0] * logits.shape[1]


def new_gradient(logits: Tensor) -> Tensor:
    """Memory for the gradient of the logits, contiguous, whatever the strides of the logits are."""
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


class Temperature(NamedTuple):
    """tau of each row, (rows,), or where that is None, the one tau of all rows."""

    per_row: Tensor | None = None
    common: float = 1.0

    def of_rows(self, index: RowIndex) -> "Temperature":
        return self if self.per_row is None else Temperature(self.per_row[index])

    def inverse(self, dtype: torch.dtype) -> Tensor | float:
        return 1 / self.common if self.per_row is None else 1 / self.per_row.to(dtype)


class Divisor(NamedTuple):
    """What divides a sum over tokens: `total`, a 0-d tensor that stays on its device, times `number`.

    With `of_weights` the total is the sum of the token weights, which a backend makes in its own pass, and `total` is
    None. A total of 0 counts as 1, so that the mean over no tokens is 0 and not NaN. `number` is at least 1.
    """

    total: Tensor | None = None
    number: int = 1
    of_weights: bool = False

    def known(self, token_weight: Tensor | None, dtype: torch.dtype) -> "Divisor":
        """The same divisor with the sum of the weights as its total, for whoever does not make that sum."""
        if not self.of_weights:
            return self
        if token_weight is None:
            raise ValueError("the divisor is the sum of the token weights, and there are none")
        return Divisor(token_weight.sum(dtype=dtype), self.number)

    def reduced(self, values: Tensor, token_weight: Tensor | None) -> Tensor:
        """The sum of w times the value of each row, 0 in a masked row, over the divisor."""
        if token_weight is not None and token_weight.is_floating_point():
            values = values * token_weight
        return self.known(token_weight, values.dtype).divide(values.sum())

    def divide(self, values: Tensor) -> Tensor:
        values = values if self.number == 1 else values / self.number
        return values if self.total is None else values / torch.where(self.total == 0, 1, self.total)

    def row_factor(self, like: Tensor, rows: int, token_weight: Tensor | None) -> Tensor:
        """What multiplies the gradient of each row's entropy, w / divisor, in the statistics dtype of `like`."""
        dtype = statistics_dtype(like.dtype)
        factor = like.new_ones(rows, dtype=dtype)
        return self.known(token_weight, dtype).divide(factor if token_weight is None else factor * token_weight)


class Wanted(NamedTuple):
    """Which optional statistics a call computes; the backward needs what the gradient of the varentropy needs."""

    second_moment: bool = False
    extra: bool = False


class Sums(NamedTuple):
    """The sums over some columns of each row, with d_j = (z_j - m) / tau.

    Attributes:
        m: max z_j; -inf where there is no column or all logits are -inf, and every sum is 0 then.
        s: sum e^d_j.
        a: sum d_j e^d_j.
        b: sum d_j^2 e^d_j; None unless the second moment is wanted.
        columns: their number; None, like the two that follow, unless the extra statistics are wanted.
        sum_d: sum d_j; -inf where a logit is.
        sum_e2: sum e^(2 d_j).
    """

    m: Tensor
    s: Tensor
    a: Tensor
    b: Tensor | None = None
    columns: Tensor | None = None
    sum_d: Tensor | None = None
    sum_e2: Tensor | None = None

    @staticmethod
    def allocate(logits: Tensor, wanted: Wanted) -> "Sums":
        def new() -> Tensor:
            return logits.new_empty(row_count(logits), dtype=statistics_dtype(logits.dtype))

        b = new() if wanted.second_moment else None
        return Sums(new(), new(), new(), b, *((new(), new(), new()) if wanted.extra else ()))

    def each(self, function: Callable[[Tensor], Tensor]) -> "Sums":
        m, s, a, *optional = self
        return Sums(function(m), function(s), function(a), *(None if x is None else function(x) for x in optional))


class Statistics(NamedTuple):
    """The statistics of each row; a masked row is 0 in every field, a row without a distribution NaN.

    Attributes:
        entropy: H.
        lse: log sum_j exp(z_j / tau).
        logprob: the log-probability of the target; None without targets.
        varentropy: V; None unless the second moment is wanted.
        extra: (4, rows), in the order of EXTRA; None unless the extra statistics are wanted.
    """

    entropy: Tensor
    lse: Tensor
    logprob: Tensor | None = None
    varentropy: Tensor | None = None
    extra: Tensor | None = None

    @staticmethod
    def allocate(logits: Tensor, rows: int, has_target: bool, wanted: Wanted) -> "Statistics":
        new, dtype = logits.new_empty, statistics_dtype(logits.dtype)
        return Statistics(
            new(rows, dtype=dtype),
            new(rows, dtype=dtype),
            new(rows, dtype=dtype) if has_target else None,
            new(rows, dtype=dtype) if wanted.second_moment else None,
            new(len(EXTRA), rows, dtype=dtype) if wanted.extra else None,
        )

    def with_empty(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The fields for an operator's schema, which has no optional results: an empty tensor in place of None."""
        entropy, lse, *rest = self
        logprob, varentropy, extra = (entropy.new_empty(0) if field is None else field for field in rest)
        return entropy, lse, logprob, varentropy, extra

    @staticmethod
    def without_empty(fields: list[Tensor], has_target: bool, wanted: Wanted) -> "Statistics":
        entropy, lse, *rest = fields
        given = zip(rest, (has_target, *wanted), strict=True)
        return Statistics(entropy, lse, *(field if is_given else None for field, is_given in given))


EXTRA = ("max_prob", "top1", "mean_logprob", "collision")


class Saved(NamedTuple):
    """What the gradient of a row needs beside its logits: (7, rows), in the statistics dtype, a plane per number.

    m, s:           the row's maximum, and sum e^d of the whole row
    mean_d:         a / s
    varentropy:     V; 0 unless the second moment was wanted
    miss:           1 - p of the target, as a sum of the other columns; 0 without targets
    scale_hi, _lo:  log2(e) / tau as the sum of two numbers of the dtype; both are 0 in a masked row and nowhere else
    """

    planes: Tensor

    @staticmethod
    def allocate(logits: Tensor, rows: int) -> "Saved":
        return Saved(logits.new_empty(7, rows, dtype=statistics_dtype(logits.dtype)))

    @property
    def m(self) -> Tensor:
        return self.planes[0]

    @property
    def s(self) -> Tensor:
        return self.planes[1]

    @property
    def mean_d(self) -> Tensor:
        return self.planes[2]

    @property
    def varentropy(self) -> Tensor:
        return self.planes[3]

    @property
    def miss(self) -> Tensor:
        return self.planes[4]

    @property
    def scale_hi(self) -> Tensor:
        return self.planes[5]

    @property
    def scale_lo(self) -> Tensor:
        return self.planes[6]

    @property
    def kept(self) -> Tensor:
        return self.scale_hi != 0

    def of_rows(self, index: RowIndex) -> "Saved":
        return Saved(self.planes[:, index].contiguous())


class Upstream(NamedTuple):
    """The gradient of the loss with respect to each statistic, any strides; None where the loss does not use it."""

    entropy: Tensor | None = None
    lse: Tensor | None = None
    logprob: Tensor | None = None
    varentropy: Tensor | None = None

    def of_rows(self, index: RowIndex) -> "Upstream":
        return Upstream(*(None if g is None else g[index] for g in self))


class Needs(NamedTuple):
    """Which of the operands of an output projection need a gradient."""

    hidden: bool
    weight: bool
    bias: bool
