"""What the linear functions accept beside hidden states: the output projection, and how it is worked on in chunks."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from em_kernels.arguments.checks import as_float, as_integer, check_floats, choose_backend, values_visible
from em_kernels.arguments.sharding import Layout, VocabShard, group_of, local_operands
from em_kernels.arguments.tokens import Source
from em_kernels.ops.hidden import matmul
from em_kernels.ops.hidden.chunks import rows_that_fit
from em_kernels.ops.hidden.gradients import GATHERED_BYTES
from em_kernels.ops.hidden.head import Chunking, Head
from em_kernels.ops.sharded import Place
from em_kernels.ops.types import statistics_dtype

# Of scratch for a chunk, unless the gradient of the weight takes more. On the CPU, less does; more only costs the time
# to map it.
_SCRATCH_BYTES = 512 << 20
_SCRATCH_BYTES_ON_CPU = 128 << 20
# Ranks must cut the tokens alike, and do not know each other's share of the vocabulary: at 131k columns a rank, 400 MB
# of bfloat16 operands' logits and gradients.
_CHUNK_OF_RANKS = 512


class Operands(NamedTuple):
    """What a matmul makes logits of, on this rank.

    Attributes:
        source: the hidden states, (..., D).
        rows: the same as (rows, D).
        head: the output projection, or this rank's rows of it.
        shard: the ranks with the other rows of the output projection; None where there are none.
        layout: how the tokens lie over ranks; None unless hidden was a DTensor.
    """

    source: Source
    rows: Tensor
    head: Head
    shard: VocabShard | None
    layout: Layout | None

    def place(self, backend: str | None) -> Place:
        backend = choose_backend(backend, self.rows.device, self.head.logits_dtype)
        return Place(backend, group_of(self.shard))


def operands_of(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    process_group: "dist.ProcessGroup | None",
) -> Operands:
    """The operands as they are on this rank and as torch.autocast casts them, checked."""
    hidden, weight, bias, shard, layout = local_operands(hidden, weight, bias, process_group)
    hidden, weight, bias = _autocast(hidden, weight, bias)
    _check_operands(hidden, weight, bias, sharded=shard is not None)
    head = Head(weight, bias, _softcap(softcap), _logits_dtype(logits_dtype, hidden))
    source = Source("hidden", hidden, hidden.shape[:-1])
    return Operands(source, hidden.reshape(-1, hidden.shape[-1]), head, shard, layout)


def chunking_of(
    operands: Operands,
    kept: Tensor | None,
    *,
    chunk_size: int | None,
    token_count: int | None,
    grad_tolerance: float = 0.0,
) -> Chunking:
    count = _token_count(token_count, kept, len(operands.rows))
    tolerance = as_float("grad_tolerance", grad_tolerance)
    if not 0 <= tolerance < float("inf"):
        raise ValueError(f"grad_tolerance is {tolerance}, expected a finite number of at least 0")
    if chunk_size is None:
        size = _CHUNK_OF_RANKS if operands.shard else _tokens_of_a_chunk(operands, tolerance)
        return Chunking(size, tolerance, count)
    size = as_integer("chunk_size", chunk_size, "an int, or None")
    if size < 1:
        raise ValueError(f"chunk_size is {size}, expected at least 1, or None")
    return Chunking(size, tolerance, count)


def _token_count(token_count: int | None, kept: Tensor | None, rows: int) -> int | None:
    """The number of tokens that are not masked, where it says more than the mask does."""
    if token_count is None:
        return None
    count = as_integer("token_count", token_count, "an int, or None")
    if not 0 <= count <= rows:
        raise ValueError(f"token_count is {count}, expected 0 to {rows}, the number of tokens, or None")
    if kept is None:
        if count != rows:
            raise ValueError(f"token_count is {count} without a mask, expected {rows}, the number of tokens, or None")
        return None
    if values_visible(kept) and count != int(kept.sum()):
        raise ValueError(
            f"token_count is {count}, expected {int(kept.sum())}, the number of tokens whose mask is not 0, or None"
        )
    return count


def _tokens_of_a_chunk(operands: Operands, tolerance: float) -> int:
    weight, scratch = operands.head.weight, _SCRATCH_BYTES_ON_CPU
    if weight.device.type != "cpu":
        # The chunks' memory is free before the weight's float32 sum is rounded, and fewer chunks are fewer passes over
        # that sum.
        total = weight.numel() * statistics_dtype(weight.dtype).itemsize
        scratch = max(_SCRATCH_BYTES, total if weight.requires_grad and torch.is_grad_enabled() else 0)
        scratch -= 3 * GATHERED_BYTES if tolerance > 0 else 0
    logits, product = operands.head.logits_dtype, statistics_dtype(weight.dtype)
    gradient = matmul.gradient_dtype(weight, logits)
    return rows_that_fit(
        scratch,
        *weight.shape,
        logits=logits.itemsize,
        gradient=0 if gradient == logits else gradient.itemsize,
        product=product.itemsize,
    )


def _autocast(*operands: Any) -> list[Any]:
    """The operands of a matmul as torch.autocast casts them; it leaves float64 alone."""
    device = operands[0].device.type if isinstance(operands[0], Tensor) else "cpu"
    if not (torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)):
        return list(operands)
    dtype = torch.get_autocast_dtype(device)
    return [
        x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() and x.dtype != torch.float64 else x
        for x in operands
    ]


def _check_operands(hidden: Tensor, weight: Tensor, bias: Tensor | None, *, sharded: bool) -> None:
    check_floats("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (..., D) with D at least 1")
    dim = hidden.shape[-1]
    check_floats("weight", weight)
    if weight.dim() != 2 or weight.shape[1] != dim or (weight.shape[0] == 0 and not sharded):
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected (V, {dim}) with V at least 1")
    _check_belongs("weight", weight, hidden)
    if bias is not None:
        check_floats("bias", bias)
        if bias.shape != weight.shape[:1]:
            raise ValueError(f"bias has shape {tuple(bias.shape)}, expected (V,) = {tuple(weight.shape[:1])}")
        _check_belongs("bias", bias, hidden)


def _softcap(softcap: float | None) -> float | None:
    if softcap is None:
        return None
    cap = as_float("softcap", softcap)
    if not 0 < cap < float("inf"):
        raise ValueError(f"softcap is {cap}, expected a finite number above 0, or None")
    return cap


def _logits_dtype(logits_dtype: torch.dtype | None, hidden: Tensor) -> torch.dtype:
    unrounded = statistics_dtype(hidden.dtype)
    if logits_dtype not in (None, hidden.dtype, unrounded):
        accepted = " or ".join(sorted({str(hidden.dtype), str(unrounded)}))
        raise ValueError(f"logits_dtype is {logits_dtype!r}, expected None or {accepted} for hidden of {hidden.dtype}")
    return unrounded if logits_dtype is None else logits_dtype


def _check_belongs(name: str, value: Tensor, hidden: Tensor) -> None:
    if value.device != hidden.device:
        raise ValueError(f"{name} is on {value.device}, expected the device of hidden, {hidden.device}")
    if value.dtype != hidden.dtype:
        raise TypeError(
            f"{name} has dtype {value.dtype} and hidden {hidden.dtype}, expected the same: cast one, "
            f"{name}.to(hidden.dtype) or hidden.to({name}.dtype), or call under torch.autocast, which casts both"
        )
