"""The rows that go into the matmuls: those of the tokens that count, where the host can know how many they are.

On the CPU the host looks at the mask. Elsewhere to look would be a synchronisation, and shapes that depend on what is
seen could not be captured in a graph: there the caller may say how many tokens count, and a sort of the mask brings
their numbers to the front. Without that number the matmuls run at full size, over zeros in the masked rows, which the
kernels do not read.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.ops import types
from em_kernels.ops.types import Saved, Temperature, Upstream, statistics_dtype


class KeptRows(NamedTuple):
    """The rows that go into the matmuls, and the way of their results back among all rows.

    Attributes:
        numbers: the numbers of these rows, ascending; None where all rows go.
        kept: False marks a row among them that is masked; None where none of them is.
        wrong: 0-d, whether the caller's count is not that of the mask; None where no count was given. Every statistic,
            the loss, and the gradient of every row are NaN then.
        total: the number of all rows.
    """

    numbers: Tensor | None
    kept: Tensor | None
    wrong: Tensor | None
    total: int

    def hidden(self, hidden: Tensor) -> Tensor:
        if self.numbers is not None:
            return hidden.index_select(0, self.numbers)
        # Garbage times a gradient of 0 would be NaN in the gradient of the weight.
        return hidden if self.kept is None else hidden.masked_fill(~self.kept.unsqueeze(-1), 0)

    def token_weight(self, token_weight: Tensor | None) -> Tensor | None:
        if token_weight is None or self.numbers is None:
            return token_weight
        return None if token_weight.dtype == torch.bool else token_weight[self.numbers]

    def temperature(self, temperature: Temperature, like: Tensor) -> Temperature:
        """The temperature of these rows; NaN, which makes NaN of all that follows, where the count is wrong."""
        if self.numbers is not None:
            temperature = temperature.of_rows(self.numbers)
        if self.wrong is None:
            return temperature
        tau = temperature.per_row
        if tau is None:
            rows = self.total if self.numbers is None else len(self.numbers)
            tau = like.new_full((rows,), temperature.common, dtype=statistics_dtype(like.dtype))
        return Temperature(tau.masked_fill(self.wrong, torch.nan))

    def target(self, target: Tensor | None) -> Tensor | None:
        return target if target is None or self.numbers is None else target[self.numbers]

    def saved(self, saved: Saved) -> Saved:
        return saved if self.numbers is None else saved.of_rows(self.numbers)

    def upstream(self, upstream: Upstream) -> Upstream:
        return upstream if self.numbers is None else upstream.of_rows(self.numbers)

    def among_all(self, values: Tensor, dim: int) -> Tensor:
        """Values of these rows along `dim` as values of all rows, 0 for the others."""
        if self.numbers is not None:
            shape = list(values.shape)
            shape[dim] = self.total
            values = values.new_zeros(shape).index_copy_(dim, self.numbers, values)
        return self.nan_if_wrong(values)

    def nan_if_wrong(self, values: Tensor) -> Tensor:
        return values if self.wrong is None else values.masked_fill_(self.wrong, torch.nan)


def kept_rows(kept: Tensor | None, rows: int, token_count: int | None) -> KeptRows:
    if kept is None:
        return KeptRows(None, None, None, rows)
    if types.host_sees(kept):
        numbers = kept.nonzero().squeeze(-1)
        wrong = None if token_count is None else torch.tensor(len(numbers) != token_count)
        return KeptRows(None if len(numbers) == rows else numbers, None, wrong, rows)
    if token_count is None:
        return KeptRows(None, kept, None, rows)
    return KeptRows(first_set(kept, token_count), None, kept.sum() != token_count, rows)


def first_set(flags: Tensor, count: int) -> Tensor:
    """The places of the first `count` True flags, ascending; where there are fewer, False ones follow."""
    return flags.to(torch.uint8).argsort(descending=True, stable=True)[:count]
