"""A vocabulary that is sharded over ranks: each holds some columns of the logits, and all hold every statistic.

1. A rank sums over its own columns, the target's left out, and reads the target's logit where it has that column.
2. One all-gather exchanges these few numbers per row, and every rank unites them in rank order, with the formula that
   unites any parts of a row (`statistics.combine`): the results are the same bits on every rank.
3. Statistics follow as without shards, and each rank writes the gradient of its own columns, without a collective.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from em_kernels.ops import backend as backends
from em_kernels.ops import statistics
from em_kernels.ops.backend import Backend
from em_kernels.ops.types import (
    Divisor,
    Saved,
    Statistics,
    Sums,
    Temperature,
    Upstream,
    Wanted,
    row_count,
    statistics_dtype,
)


class Place(NamedTuple):
    """Where an operator runs: the names of the backend and of the process group that shares the columns, or ''."""

    backend: str
    group: str = ""


def implementation(place: Place) -> Backend:
    """The backend of a place, as it is or over the ranks that share the columns."""
    local = backends.implementation(place.backend)
    return _OverRanks(local, place.group) if place.group else local


def sum_over_ranks_(values: Tensor, group: str) -> None:
    dist.all_reduce(values, group=_group(group))


def first_and_total(columns: int, device: torch.device, group: str) -> tuple[Tensor, Tensor]:
    """The first column of this rank, which holds `columns` of them, and the number of all ranks' columns: 0-d tensors.

    One collective.
    """
    first, total = _first_and_total_op(torch.empty(0, device=device), columns, group)
    return first, total


class _OverRanks:
    """A backend whose calls are those of all ranks together; it keeps the contract of `Backend`."""

    def __init__(self, local: Backend, group: str) -> None:
        self.local, self.group = local, _group(group)
        self.scale_ = local.scale_

    def row_sums(
        self,
        logits: Tensor,
        kept: Tensor | None,
        temperature: Temperature,
        target: Tensor | None,
        wanted: Wanted,
        softcap: float | None = None,
    ) -> Sums:
        return self._united(logits, kept, temperature, target, wanted, softcap)[0]

    def row_statistics(
        self,
        logits: Tensor,
        kept: Tensor | None,
        temperature: Temperature,
        target: Tensor | None,
        wanted: Wanted,
        softcap: float | None = None,
    ) -> tuple[Statistics, Saved]:
        sums, target_logit = self._united(logits, kept, temperature, target, wanted, softcap)
        return statistics.finish(sums, target_logit, kept, temperature, statistics_dtype(logits.dtype))

    def row_gradient(
        self,
        logits: Tensor,
        saved: Saved,
        target: Tensor | None,
        upstream: Upstream,
        out: Tensor,
        softcap: float | None = None,
    ) -> None:
        # It concerns a rank's own columns, if it has any, and what all ranks know of the row.
        if out.numel() > 0:
            self.local.row_gradient(logits, saved, target, upstream, out, softcap)

    def entropy_with_gradient(
        self,
        logits: Tensor,
        token_weight: Tensor | None,
        divisor: Divisor,
        temperature: Temperature,
        out: Tensor | None,
        softcap: float | None = None,
    ) -> Tensor:
        kept = None if token_weight is None else token_weight != 0
        found, saved = self.row_statistics(logits, kept, temperature, None, Wanted(), softcap)
        if out is not None:
            row_factor = divisor.row_factor(logits, row_count(logits), token_weight)
            self.row_gradient(logits, saved, None, Upstream(entropy=row_factor), out, softcap)
        return divisor.reduced(found.entropy, token_weight)

    def _united(
        self,
        logits: Tensor,
        kept: Tensor | None,
        temperature: Temperature,
        target: Tensor | None,
        wanted: Wanted,
        softcap: float | None,
    ) -> tuple[Sums, Tensor | None]:
        """The sums over the columns of all ranks, and the target's logit, NaN where no rank has its column."""
        if logits.shape[2] == 0:
            sums = _sums_of_no_column(logits, wanted)
        else:
            sums = self.local.row_sums(logits, kept, temperature, target, wanted, softcap)
        if len(sums.m) == 0:
            return sums, None if target is None else sums.m
        own = [field for field in sums if field is not None]
        if target is not None:
            own.append(_own_target_logits(logits, target, softcap))
        fields = iter(_gather(torch.stack(own), self.group).unbind(1))
        parts = sums.each(lambda _: next(fields))
        if target is None:
            return statistics.combine(parts, temperature), None
        found = next(fields)
        missing = found.isnan()
        target_logit = found.masked_fill(missing, 0).sum(0).masked_fill(missing.all(0), torch.nan)
        return statistics.combine(parts, temperature), target_logit


def _sums_of_no_column(logits: Tensor, wanted: Wanted) -> Sums:
    sums = Sums.allocate(logits, wanted).each(Tensor.zero_)
    return sums._replace(m=sums.m - torch.inf)


def _own_target_logits(logits: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    """The target's capped logit of each row, NaN where another rank has its column."""
    if logits.shape[2] == 0:
        return torch.full_like(target, torch.nan, dtype=statistics_dtype(logits.dtype))
    return statistics.target_logits(logits, target, softcap)


@torch.library.custom_op("em_kernels::first_and_total_column", mutates_args=())
def _first_and_total_op(like: Tensor, columns: int, group: str) -> Tensor:
    ranks = _group(group)
    counts = _gather(like.new_full((), columns, dtype=torch.int64), ranks)
    return torch.stack((counts[: dist.get_rank(ranks)].sum(), counts.sum()))


@_first_and_total_op.register_fake
def _(like, *_):
    return like.new_empty(2, dtype=torch.int64)


def _gather(values: Tensor, group: "dist.ProcessGroup") -> Tensor:
    """The values of every rank, stacked in rank order."""
    everyone = values.new_empty(dist.get_world_size(group), *values.shape)
    dist.all_gather(list(everyone.unbind(0)), values, group=group)
    return everyone


def _group(name: str) -> "dist.ProcessGroup":
    resolve: Any = dist.distributed_c10d._resolve_process_group
    return resolve(name)
