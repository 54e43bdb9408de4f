"""What the public functions accept: checked, with errors that name the argument, and flattened to rows.

A row is a token. `source` is the tensor the tokens come from, logits or hidden states, and `name` what the caller knows
it by. The operators take logits as (outer, inner, V), whose outer * inner rows have any two strides, so that
logits[:, :-1] of a (batch, time, V) tensor is not copied; everything else per row is one-dimensional.
"""

import torch
from torch import Tensor

from em_kernels.ops import backends
from em_kernels.ops.operators import statistics_dtype

# 1 / tau and log2(e) / tau are float32 numbers, with room for the distances between logits they are multiplied with.
_LOWEST_TEMPERATURE, _HIGHEST_TEMPERATURE = 1e-30, 1e30
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_logits(logits: Tensor) -> None:
    check_floats("logits", logits)
    if logits.dim() == 0 or logits.shape[-1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V at least 1")


def choose_backend(backend: str | None, source: Tensor) -> str:
    if backend is None:
        on_gpu = source.device.type == "cuda"
        return (
            "triton" if on_gpu and not backends.unavailable_reason("triton", source.device, source.dtype) else "torch"
        )
    reason = backends.unavailable_reason(backend, source.device, source.dtype)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run here: {reason}")
    return backend


def flatten_logits(logits: Tensor) -> Tensor:
    """(..., V) to (outer, inner, V) with contiguous columns; a view unless the rows need more than two strides."""
    if logits.stride(-1) != 1 and logits.shape[-1] != 1:
        logits = logits.contiguous()
    vocab = logits.shape[-1]
    if logits.dim() == 3 and logits.stride(0) != logits.shape[1] * logits.stride(1):
        return logits
    return logits.reshape(1, -1, vocab)


def flatten_mask(mask: Tensor, source: Tensor, name: str = "logits") -> Tensor:
    """(...) to (rows,): bool for a bool or integer mask, the row weights in the statistics' dtype for a float one."""
    _check_per_token("mask", mask, source, name)
    if mask.is_complex():
        raise TypeError(f"mask has dtype {mask.dtype}, expected bool, an integer or a float dtype")
    mask = mask.detach().reshape(-1)
    if not mask.is_floating_point():
        return mask if mask.dtype == torch.bool else mask != 0
    if values_visible(mask) and bool((mask < 0).any()):
        raise ValueError(f"mask has a negative weight ({mask.min().item():g}), expected weights of at least 0")
    return mask.to(statistics_dtype(source.dtype))


def flatten_target(target: Tensor, source: Tensor, mask: Tensor | None, vocab: int, name: str = "logits") -> Tensor:
    _check_per_token("target", target, source, name)
    if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
        raise TypeError(f"target has dtype {target.dtype}, expected an integer dtype")
    target = target.reshape(-1).to(torch.int64)
    if values_visible(target):
        out_of_range = (target < 0) | (target >= vocab)
        if mask is not None:
            out_of_range &= mask
        if bool(out_of_range.any()):
            raise ValueError(
                f"target has {target[out_of_range][0].item()} where it is not masked, expected values in [0, {vocab})"
            )
    return target


def flatten_temperature(
    temperature: float | Tensor, source: Tensor, name: str = "logits"
) -> tuple[Tensor | None, float]:
    """A temperature per row, or None and the one temperature of all rows."""
    dtype = statistics_dtype(source.dtype)
    if isinstance(temperature, Tensor):
        if temperature.is_complex() or temperature.dtype == torch.bool:
            raise TypeError(f"temperature has dtype {temperature.dtype}, expected a float or integer dtype")
        shape = source.shape[:-1]
        try:
            expanded = temperature.detach().expand(shape)
        except RuntimeError:
            raise ValueError(
                f"temperature has shape {tuple(temperature.shape)}, "
                f"expected one that broadcasts to {name}.shape[:-1] = {tuple(shape)}"
            ) from None
        if values_visible(temperature):
            accepted = (temperature >= _LOWEST_TEMPERATURE) & (temperature <= _HIGHEST_TEMPERATURE)
            if not bool(accepted.all()):
                raise ValueError(
                    f"temperature has {temperature[~accepted][0].item():g}, expected values above 0 (1e-30 to 1e30)"
                )
        return expanded.to(source.device, dtype, non_blocking=True).reshape(-1).contiguous(), 1.0
    if isinstance(temperature, bool) or not isinstance(temperature, (int, float)):
        raise TypeError(f"temperature is a {type(temperature).__name__}, expected a float or a torch.Tensor")
    if not _LOWEST_TEMPERATURE <= temperature <= _HIGHEST_TEMPERATURE:
        raise ValueError(f"temperature is {temperature}, expected a value above 0 (1e-30 to 1e30)")
    if torch.compiler.is_compiling():
        # As an operator's float argument it would be burnt into the graph; a factor of a tensor may change.
        scalar = torch.ones((), dtype=dtype, device=source.device) * temperature
        return scalar.expand(source.shape[:-1]).reshape(-1).contiguous(), 1.0
    return None, temperature


def values_visible(tensor: Tensor) -> bool:
    """Whether the values can be looked at without a device synchronisation or a graph break."""
    return tensor.device.type == "cpu" and not torch.compiler.is_compiling() and type(tensor) is Tensor


def check_number(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float")


def check_floats(name: str, value: Tensor) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}, expected one of {', '.join(map(str, _DTYPES))}")


def _check_per_token(name: str, value: Tensor, source: Tensor, source_name: str) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")
    if value.shape != source.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(value.shape)}, expected {source_name}.shape[:-1] = {tuple(source.shape[:-1])}"
        )
    if value.device != source.device:
        raise ValueError(f"{name} is on {value.device}, expected the device of {source_name}, {source.device}")
