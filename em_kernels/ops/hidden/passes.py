"""The passes over the chunks of tokens: the reduced loss with its gradients, statistics, and the gradients of these.

entropy_and_gradients    three matmuls: a chunk's logits; from them, in place and by the logits' own backend, their
                         gradient; from that the chunk's gradient of hidden and its part of the weight's
row_statistics           one matmul
gradients_of_statistics  three matmuls, of which the first makes the logits again
"""

import torch
from torch import Tensor

from em_kernels.ops.hidden.chunks import Chunks
from em_kernels.ops.hidden.gradients import Gradients, Totals
from em_kernels.ops.hidden.head import Chunking, Head
from em_kernels.ops.sharded import Place, implementation
from em_kernels.ops.types import (
    Divisor,
    Needs,
    RowIndex,
    Saved,
    Statistics,
    Temperature,
    Upstream,
    Wanted,
    statistics_dtype,
)


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
    backend = implementation(place)
    loss = hidden.new_zeros((), dtype=statistics_dtype(hidden.dtype))
    # The divisor comes last: before it the gradient of a mean is as large as that of a sum.
    scale, undivided = divisor.divide(torch.ones_like(loss)), Divisor()
    tolerance: float | Tensor | None = chunking.grad_tolerance or None
    if hidden.dtype == torch.float16 and len(hidden) > 0:
        unit = _float16_unit(loss, token_weight, temperature)
        scale, undivided = scale * unit, Divisor(unit)
        tolerance = None if tolerance is None else tolerance / unit
    totals = Totals(hidden, head, needs, scale=scale, tolerance=tolerance, group=place.group)
    chunks = Chunks(hidden, head, None if token_weight is None else token_weight != 0, chunking.chunk_size)
    for index, h in chunks:
        z, slope = chunks.logits(h)
        loss += backend.entropy_with_gradient(
            z[None], _of(token_weight, index), undivided, temperature.of_rows(index), z[None]
        )
        totals.add(index, h, z if slope is None else z.mul_(slope))
    return loss * scale, totals.finish()


def row_statistics(
    hidden: Tensor,
    head: Head,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    chunk_size: int,
    place: Place,
) -> tuple[Statistics, Saved]:
    """The statistics of each row, and what `gradients_of_statistics` needs of it."""
    backend = implementation(place)
    results = Statistics.allocate(hidden, len(hidden), target is not None, wanted)
    saved = Saved.allocate(hidden, len(hidden))
    # The rows that no chunk holds are masked.
    outputs = (*results, saved.planes)
    for output in outputs:
        if output is not None:
            output.zero_()
    chunks = Chunks(hidden, head, kept, chunk_size)
    for index, h in chunks:
        z, _ = chunks.logits(h, with_slope=False)
        found, found_saved = backend.row_statistics(
            z[None], _of(kept, index), temperature.of_rows(index), _of(target, index), wanted
        )
        for output, part in zip(outputs, (*found, found_saved.planes), strict=True):
            if output is not None and part is not None:
                output[..., index] = part
    return results, saved


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
    backend = implementation(place)
    given = [g for g in upstream if g is not None]
    tolerance = None
    if chunking.grad_tolerance > 0 and given and len(hidden) > 0:
        # It bounds the gradient of an entropy before the upstream gradient multiplies it, as that of a mean is bounded.
        tolerance = (
            chunking.grad_tolerance * torch.stack([g.masked_fill(~saved.kept, 0).abs().amax() for g in given]).amax()
        )
    totals = Totals(hidden, head, needs, tolerance=tolerance, group=place.group)
    chunks = Chunks(hidden, head, saved.kept, chunking.chunk_size)
    for index, h in chunks:
        z, slope = chunks.logits(h)
        backend.row_gradient(z[None], saved.of_rows(index), _of(target, index), upstream.of_rows(index), z[None])
        totals.add(index, h, z if slope is None else z.mul_(slope))
    return totals.finish()


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


def _of(values: Tensor | None, index: RowIndex) -> Tensor | None:
    return None if values is None else values[index]
