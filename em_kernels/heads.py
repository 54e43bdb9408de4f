"""What the linear functions accept beside hidden states: the output projection that makes logits of them."""

from typing import Any

import torch
from torch import Tensor

from em_kernels import inputs
from em_kernels.ops.linear import ROWS, Head
from em_kernels.ops.operators import statistics_dtype

# Of scratch for a chunk: at 152k bfloat16, 1,280 tokens, which keep a GPU's matmul at its full rate. `grad_tolerance`
# gathers 96 MB more: 512 MB in all. On the CPU, less does; more only costs the time to map it.
_SCRATCH_BYTES = 400 << 20
_SCRATCH_BYTES_ON_CPU = 128 << 20


def prepare(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logits_dtype: torch.dtype | None,
    chunk_size: int | None,
) -> tuple[Tensor, Head, int]:
    """Hidden states in the dtype they are computed in, the head, and the tokens of a chunk, all checked."""
    hidden, weight, bias = (_autocast(x, hidden) for x in (hidden, weight, bias))
    _check_head(hidden, weight, bias)
    if softcap is not None:
        inputs.check_number("softcap", softcap)
        if not 0 < softcap < float("inf"):
            raise ValueError(f"softcap is {softcap}, expected a finite number above 0, or None")
    if logits_dtype not in (None, hidden.dtype, statistics_dtype(hidden.dtype)):
        accepted = {None, hidden.dtype, statistics_dtype(hidden.dtype)} - {None}
        raise ValueError(
            f"logits_dtype is {logits_dtype!r}, expected None or {' or '.join(sorted(map(str, accepted)))} "
            f"for hidden of {hidden.dtype}"
        )
    float32_logits = logits_dtype is not None and logits_dtype != hidden.dtype
    head = Head(weight, bias, None if softcap is None else float(softcap), float32_logits)
    if chunk_size is None:
        scratch = _SCRATCH_BYTES_ON_CPU if hidden.device.type == "cpu" else _SCRATCH_BYTES
        chunk_size = max(1, scratch // head.bytes_per_token())
        if chunk_size > ROWS:
            chunk_size -= chunk_size % ROWS
    elif isinstance(chunk_size, bool) or not isinstance(chunk_size, int):
        raise TypeError(f"chunk_size is a {type(chunk_size).__name__}, expected an int, or None")
    elif chunk_size < 1:
        raise ValueError(f"chunk_size is {chunk_size}, expected at least 1, or None")
    return hidden, head, chunk_size


def _autocast(operand: Any, hidden: Any) -> Any:
    """What torch.autocast makes of a matmul's operand; float64 it leaves alone."""
    if not (isinstance(operand, Tensor) and operand.is_floating_point() and operand.dtype != torch.float64):
        return operand
    device = hidden.device.type if isinstance(hidden, Tensor) else "cpu"
    return operand.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else operand


def _check_head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    """That hidden states, the output projection and its bias belong together."""
    inputs.check_floats("hidden", hidden)
    if hidden.dim() == 0 or hidden.shape[-1] == 0:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}, expected (..., D) with D at least 1")
    if hasattr(hidden, "full_tensor"):
        raise TypeError("hidden is a DTensor, expected a whole tensor: take hidden.to_local() or gather it first")
    for name, value in {"weight": weight, **({} if bias is None else {"bias": bias})}.items():
        inputs.check_floats(name, value)
        if hasattr(value, "full_tensor"):
            raise TypeError(f"{name} is a DTensor, expected a whole tensor: gather it with {name}.full_tensor() first")
        expected = (weight.shape[0], hidden.shape[-1])[: 2 if name == "weight" else 1] if weight.dim() == 2 else ()
        if tuple(value.shape) != expected or weight.shape[0] == 0:
            wanted = f"(V, {hidden.shape[-1]}) with V at least 1" if name == "weight" else f"(V,) = {expected}"
            raise ValueError(f"{name} has shape {tuple(value.shape)}, expected {wanted}")
        if value.device != hidden.device:
            raise ValueError(f"{name} is on {value.device}, expected the device of hidden, {hidden.device}")
        if value.dtype != hidden.dtype:
            raise TypeError(
                f"{name} has dtype {value.dtype} and hidden {hidden.dtype}, expected the same: cast one, "
                f"{name}.to(hidden.dtype) or hidden.to({name}.dtype), or call under torch.autocast, which casts both"
            )
