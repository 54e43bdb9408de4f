"""The passes over the chunks of tokens: the reduced loss with its gradients, statistics, and the gradients of these.

entropy_and_gradients    three matmuls: a chunk's logits; from them, by the logits' own backend, their gradient; from
                         that the chunk's gradient of hidden and its part of the weight's
row_statistics           one matmul
gradients_of_statistics  three matmuls, of which the first makes the logits again

Around the matmuls the float32 logits are read and their gradient is written once each, in the dtype in which the
matmuls take it, and the weight's float32 gradient is written by the first chunk and read and written by each other.
On a GPU a chunk is two launches for each part of it, and two more or, to round hidden's gradient from float32, three.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from em_kernels.ops.hidden.chunks import Chunks
from em_kernels.ops.hidden.gradients import Gradients, Totals
from em_kernels.ops.hidden.head import Chunking, Head
from em_kernels.ops.hidden.kept import kept_rows
from em_kernels.ops.sharded import Place, implementation
from em_kernels.ops.types import (
    Divisor,
    Needs,
    Saved,
    Statistics,
    Temperature,
    Upstream,
    Wanted,
    statistics_dtype,
)

_T = TypeVar("_T")


def entropy_and_gradients(
    hidden: Tensor,
    head: Head,
    token_weight: Tensor | None,
    divisor: Divisor,
    temperature: Temperature,
    chunking: Chunking,
    needs: Needs,
    place: Place,
) -> tuple[Tensor, Gradients]:
    """The sum over rows of w H / divisor, 0-d, and the gradient of each operand that needs one."""
    backend, softcap = implementation(place), head.softcap
    rows = kept_rows(_kept(token_weight), len(hidden), chunking.token_count)
    hidden, token_weight = rows.hidden(hidden), rows.token_weight(token_weight)
    temperature = rows.temperature(temperature, hidden)
    zero = hidden.new_zeros((), dtype=statistics_dtype(hidden.dtype))
    scale = None
    if hidden.dtype == torch.float16 and len(hidden) > 0:
        # The divisor comes last: before it the gradient of a mean is as large as that of a sum.
        unit = _float16_unit(zero, token_weight, temperature)
        scale, divisor = divisor.divide(unit), Divisor(unit)

    def write_gradient(index: slice, z: Tensor, out: Tensor) -> Tensor:
        weight = _of(token_weight, index)
        return backend.entropy_with_gradient(z, weight, divisor, temperature.of_rows(index), out, softcap)

    tolerance = divisor.divide(zero + chunking.grad_tolerance) if chunking.grad_tolerance > 0 else None
    losses, totals = _over_chunks(hidden, head, chunking, needs, tolerance, place.group, write_gradient)
    loss = torch.stack(losses).sum() if losses else zero
    loss = loss if scale is None else loss * scale
    return rows.nan_if_wrong(loss), totals.finish(rows, scale)


def row_statistics(
    hidden: Tensor,
    head: Head,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    chunking: Chunking,
    place: Place,
) -> tuple[Statistics, Saved]:
    """The statistics of each row, and what `gradients_of_statistics` needs of it."""
    backend = implementation(place)
    rows = kept_rows(kept, len(hidden), chunking.token_count)
    hidden, target = rows.hidden(hidden), rows.target(target)
    temperature = rows.temperature(temperature, hidden)
    chunks = Chunks(hidden, head, chunking.chunk_size, in_parts=not place.group)
    found = [
        backend.row_statistics(
            chunks.logits(part)[None],
            _of(rows.kept, part),
            temperature.of_rows(part),
            _of(target, part),
            wanted,
            head.softcap,
        )
        for chunk in chunks
        for part in chunks.parts(chunk)
    ]
    if not found:
        found = [(Statistics.allocate(hidden, 0, target is not None, wanted), Saved.allocate(hidden, 0))]

    def joined(*parts: Tensor | None) -> Any:
        given = [part for part in parts if part is not None]
        return rows.among_all(torch.cat(given, -1), -1) if given else None

    statistics, saved = zip(*found, strict=True)
    planes = joined(*(part.planes for part in saved))
    return Statistics(*map(joined, *statistics)), Saved(planes)


def gradients_of_statistics(
    hidden: Tensor,
    head: Head,
    saved: Saved,
    target: Tensor | None,
    upstream: Upstream,
    chunking: Chunking,
    needs: Needs,
    place: Place,
) -> Gradients:
    """The gradient of each operand that needs one, from the gradient of the loss by each statistic."""
    backend, softcap = implementation(place), head.softcap
    rows = kept_rows(saved.kept, len(hidden), chunking.token_count)
    hidden, target = rows.hidden(hidden), rows.target(target)
    saved, upstream = rows.saved(saved), rows.upstream(upstream)
    given = [g for g in upstream if g is not None]
    tolerance = None
    if chunking.grad_tolerance > 0 and given and len(hidden) > 0:
        # It bounds the gradient of an entropy before the upstream gradient multiplies it, as that of a mean is bounded.
        tolerance = (
            chunking.grad_tolerance * torch.stack([g.masked_fill(~saved.kept, 0).abs().amax() for g in given]).amax()
        )

    def write_gradient(index: slice, z: Tensor, out: Tensor) -> None:
        backend.row_gradient(z, saved.of_rows(index), _of(target, index), upstream.of_rows(index), out, softcap)

    _, totals = _over_chunks(hidden, head, chunking, needs, tolerance, place.group, write_gradient)
    return totals.finish(rows, None)


def _over_chunks(
    hidden: Tensor,
    head: Head,
    chunking: Chunking,
    needs: Needs,
    tolerance: Tensor | None,
    group: str,
    write_gradient: Callable[[slice, Tensor, Tensor], _T],
) -> tuple[list[_T], Totals]:
    """What `write_gradient` returns for each part of a chunk, and the sums of the gradients.

    `write_gradient` is given a part's rows, their logits, and the memory for their gradient. The memory of the chunks
    is free when this returns, so that what is allocated next may lie there.
    """
    # Over ranks a part is an exchange of its rows' sums, of which there should be few.
    chunks = Chunks(hidden, head, chunking.chunk_size, in_parts=not group)
    totals = Totals(hidden, head, needs, one_chunk=len(chunks) == 1, tolerance=tolerance, group=group)
    results = []
    for chunk in chunks:
        for part in chunks.parts(chunk):
            z = chunks.logits(part)
            gradient = chunks.gradient(chunk)
            out = gradient[part.start - chunk.start : part.stop - chunk.start]
            results.append(write_gradient(part, z[None], out[None]))
        totals.add(chunk, hidden[chunk], gradient)
    return results, totals


def _kept(token_weight: Tensor | None) -> Tensor | None:
    return token_weight if token_weight is None or token_weight.dtype == torch.bool else token_weight != 0


def _float16_unit(like: Tensor, token_weight: Tensor | None, temperature: Temperature) -> Tensor:
    """What to divide a gradient of the logits by so that float16 holds it, before any loss scale has multiplied it.

    An entry is p (log p + H) w / tau. The first two factors are below 8 at any vocabulary, and about 1 / V in a row
    that is nearly uniform: at 100,000 tokens, below float16's normal numbers. 2^10 times as much is within its range on
    both sides.
    """
    tau = torch.full_like(like, temperature.common) if temperature.per_row is None else temperature.per_row
    largest = torch.ones_like(like)
    if token_weight is not None:
        largest = token_weight.to(like.dtype).amax()
        # A masked token may have any temperature.
        tau = tau if temperature.per_row is None else torch.where(token_weight != 0, tau, 1)
    return torch.where(largest == 0, 1, largest) / (2.0**10 * tau.amin().clamp(max=1))


def _of(values: Tensor | None, index: slice) -> Tensor | None:
    return None if values is None else values[index]
