"""The checks that several arguments share, and where a value can be looked at."""

import numbers
from typing import Any

import torch
from torch import Tensor

from em_kernels.ops import backend as backends
from em_kernels.ops.autograd import is_traced
from em_kernels.ops.types import host_sees

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def values_visible(tensor: Tensor) -> bool:
    """Whether the values can be looked at without a synchronisation, a graph break or a trace that forgets the look."""
    return host_sees(tensor) and not is_traced(tensor)


def check_tensor(name: str, value: Any) -> None:
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a torch.Tensor")


def check_floats(name: str, value: Any) -> None:
    check_tensor(name, value)
    if value.dtype not in _DTYPES:
        raise TypeError(f"{name} has dtype {value.dtype}, expected one of {', '.join(map(str, _DTYPES))}")


def check_logits(logits: Any, *, sharded: bool) -> None:
    check_floats("logits", logits)
    if logits.dim() == 0 or (logits.shape[-1] == 0 and not sharded):
        raise ValueError(f"logits has shape {tuple(logits.shape)}, expected (..., V) with V at least 1")


def as_float(name: str, value: Any) -> float:
    """A Python or NumPy number, integers included, as a float."""
    if isinstance(value, float):
        return value
    # NumPy's numbers are registered as the abstract kinds of numbers; torch.compile knows only Python's own.
    if isinstance(value, bool) or not isinstance(value, (int, numbers.Real)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected a float")
    return value if isinstance(value, int) else float(value)


def as_integer(name: str, value: Any, expected: str) -> int:
    """A Python or NumPy integer as an int."""
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt, numbers.Integral)):
        raise TypeError(f"{name} is a {type(value).__name__}, expected {expected}")
    return value if isinstance(value, int | torch.SymInt) else int(value)  # type: ignore[return-value]


def choose_backend(backend: str | None, device: torch.device, dtype: torch.dtype) -> str:
    """The backend that was asked for, or the best for logits of this device and dtype."""
    if backend is None:
        return backends.choose(device, dtype)
    reason = backends.unavailable_reason(backend, device, dtype)
    if reason is not None:
        raise ValueError(f"backend={backend!r} cannot run here: {reason}")
    return backend
