"""The CPU kernels of csrc/entropy_cpu.cpp through ctypes: float32, any strides between rows, every core torch may use.

The library is optional: without it these functions must not be called, and `unavailable_reason` says what is missing.

Passes over memory: `row_sums` reads the logits once, `row_gradient` reads them once and writes the gradient,
`entropy_with_gradient` does both in one read and one write where a row fits the second-level cache. None allocates
anything but its results.

Logits are (outer, inner, V) float32 with contiguous columns; what is given or returned per row is (outer * inner,)
float32 and contiguous unless stated otherwise. The temperature is one number, or a tensor with one per row.
"""

import ctypes
import functools
import math
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).parents[1] / "_entropy_cpu.so"

_POINTER, _INT64 = ctypes.c_void_p, ctypes.c_int64
# logits, inner, outer stride, inner stride, rows, V: how every function starts.
_ROWS = (_POINTER, _INT64, _INT64, _INT64, _INT64, _INT64)
_SIGNATURES = {
    "em_row_sums": (*_ROWS, _POINTER, _POINTER, ctypes.c_double, *(_POINTER,) * 4, ctypes.c_int),
    "em_row_gradient": (*_ROWS, *(_POINTER,) * 9, ctypes.c_int),
    "em_entropy_with_gradient": (*_ROWS, _POINTER, _POINTER, ctypes.c_double, _POINTER, _POINTER, ctypes.c_int),
}


def unavailable_reason() -> str | None:
    """Why the compiled kernels cannot be used here, or None if they can."""
    library = _load()
    return library if isinstance(library, str) else None


def row_sums(
    logits: Tensor, mask: Tensor | None, temperature: Tensor | float, *, second_moment: bool = False
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The maximum m of each row and, with d = (z - m) / temperature, s = sum e^d, a = sum d e^d, b = sum d^2 e^d.

    Args:
        logits: (outer, inner, V).
        mask: (rows,), bool; False marks a row that is not read and whose results are 0. None keeps every row.
        temperature: a float or (rows,).
        second_moment: whether b is wanted; None is returned in its place if not.

    Returns:
        m, s, a, b, each (rows,); NaN for a row of all -inf or with a NaN or +inf.
    """
    rows = logits.shape[0] * logits.shape[1]
    m, s, a = (logits.new_empty(rows) for _ in range(3))
    b = logits.new_empty(rows) if second_moment else None
    _call("em_row_sums", logits, mask, *_row_or_common(temperature), m, s, a, b)
    return m, s, a, b


def row_gradient(
    logits: Tensor,
    m: Tensor,
    scale_hi: Tensor,
    scale_lo: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor | None,
    out: Tensor,
    *,
    target: Tensor | None = None,
    alpha: Tensor | None = None,
) -> None:
    """Writes the gradient e^d (A + B d + C d^2) + alpha [j = target] of each row, with d = (z - m) / temperature.

    Args:
        logits: (outer, inner, V).
        m: (rows,), the row's maximum, as from `row_sums`.
        scale_hi, scale_lo: (rows,), log2(e) / temperature as a sum of two; a row whose scale_hi is 0 is not read, and
            its gradient is 0.
        A, B, C: (rows,); C may be None for 0.
        out: where to write the gradient, (outer, inner, V), contiguous or the logits' own memory.
        target, alpha: (rows,), int64 and float32, or both None. A target outside [0, V) makes its row NaN.
    """
    _call("em_row_gradient", logits, m, scale_hi, scale_lo, A, B, C, target, alpha, out)


def entropy_with_gradient(logits: Tensor, weight: Tensor, temperature: Tensor | float, out: Tensor) -> Tensor:
    """The entropy H of each row; writes the gradient of sum_r weight_r H_r.

    Args:
        logits: (outer, inner, V).
        weight: (rows,); 0 marks a row that is not read, and whose entropy and gradient are 0.
        temperature: a float or (rows,).
        out: where to write the gradient, (outer, inner, V), contiguous or the logits' own memory.

    Returns:
        H, (rows,), not multiplied by the weight. Both NaN for a row of all -inf or with a NaN or +inf.
    """
    entropy = logits.new_empty(logits.shape[0] * logits.shape[1])
    _call("em_entropy_with_gradient", logits, weight, *_row_or_common(temperature), entropy, out)
    return entropy


def _row_or_common(temperature: Tensor | float) -> tuple[Tensor | None, float]:
    return (temperature, math.nan) if isinstance(temperature, Tensor) else (None, temperature)


def _call(function: str, logits: Tensor, *arguments: Tensor | float | None) -> None:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    outer, inner, vocab = logits.shape
    getattr(library, function)(
        logits.data_ptr(),
        inner,
        logits.stride(0),
        logits.stride(1),
        outer * inner,
        vocab,
        *(x.data_ptr() if isinstance(x, Tensor) else x for x in arguments),
        torch.get_num_threads(),
    )


@functools.cache
def _load() -> ctypes.CDLL | str:
    """The library, or why there is none."""
    if not LIBRARY.exists():
        return "the compiled CPU kernels were not built (no C++ compiler when em_kernels was installed)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
        for name, signature in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = signature, None
    except (OSError, AttributeError) as error:
        return f"the compiled CPU kernels cannot be loaded: {error}"
    return library
