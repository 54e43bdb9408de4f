"""The backend in C++ on the CPU: csrc/entropy_cpu.cpp through ctypes, on every core torch may use.

Passes over memory: `row_sums` and `row_statistics` read the logits once, `row_gradient` reads them once and writes the
gradient, `entropy_with_gradient` does both in one read and one write where two rows and their exponentials fit the
second-level cache, and only reads where no gradient is wanted. Nothing is allocated but the results, a number per row
of the loss, and two rows of float32 that each thread keeps from the first call on. Logits of 16 bits are widened as
they are read, and the arithmetic is that of float32 logits; a gradient may have fewer bits than its logits.

The library is optional: where it is missing, `unavailable_reason` says why, and the other functions raise that.
"""

import ctypes
import functools
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from em_kernels.ops.backends.torch import scale_ as scale_
from em_kernels.ops.types import (
    CPUS,
    Divisor,
    Saved,
    Statistics,
    Sums,
    Temperature,
    Upstream,
    Wanted,
    row_count,
)

LIBRARY = Path(__file__).parents[2] / "_entropy_cpu.so"

# As csrc/dtypes.h numbers them.
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

# The arguments of each function as csrc/entropy_cpu.cpp declares them, in the characters of `struct`, which pads
# them as the compiler does.
_ROWS = "Piqqq"  # pointer, dtype, inner, outer stride, inner stride
_GIVEN = f"{_ROWS}qqdq"  # logits, rows, V, soft cap, threads
_TEMPERATURE = "Pd"
_ARGUMENTS = {
    # kept, target, temperature; a pointer for each of Sums
    "em_row_sums": f"{_GIVEN}PP{_TEMPERATURE}{len(Sums._fields)}P",
    # kept, target, temperature; a pointer for each of Statistics; saved
    "em_row_statistics": f"{_GIVEN}PP{_TEMPERATURE}{len(Statistics._fields)}PP",
    # saved, target; pointer and stride for each of Upstream; out
    "em_row_gradient": f"{_GIVEN}PP{'Pq' * len(Upstream._fields)}{_ROWS}",
    # kept, token_weight, divisor, of_weights, temperature; out
    "em_entropy_with_gradient": f"{_GIVEN}PPdq{_TEMPERATURE}{_ROWS}",
}
# The others return nothing.
_RESULTS = {"em_entropy_with_gradient": ctypes.c_float}


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the compiled kernels cannot run on tensors of this device and dtype, or None if they can."""
    if device not in CPUS:
        return f"the compiled kernels run on the CPU and the logits are on {device}"
    if dtype not in _DTYPES:
        return f"the compiled kernels take {', '.join(map(str, _DTYPES))} and the logits are {dtype}"
    return _missing_library()


def row_sums(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None = None,
) -> Sums:
    sums = Sums.allocate(logits, wanted)
    _call("em_row_sums", logits, softcap, kept, target, *temperature, *sums)
    return sums


def row_statistics(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    softcap: float | None = None,
) -> tuple[Statistics, Saved]:
    rows = row_count(logits)
    statistics, saved = Statistics.allocate(logits, rows, target is not None, wanted), Saved.allocate(logits, rows)
    _call("em_row_statistics", logits, softcap, kept, target, *temperature, *statistics, *saved)
    return statistics, saved


def row_gradient(
    logits: Tensor,
    saved: Saved,
    target: Tensor | None,
    upstream: Upstream,
    out: Tensor,
    softcap: float | None = None,
) -> None:
    target = None if upstream.logprob is None else target
    with_strides = [x for g in upstream for x in ((None, 0) if g is None else (g, g.stride(0)))]
    _call("em_row_gradient", logits, softcap, *saved, target, *with_strides, *_out(out))


def entropy_with_gradient(
    logits: Tensor,
    token_weight: Tensor | None,
    divisor: Divisor,
    temperature: Temperature,
    out: Tensor | None,
    softcap: float | None = None,
) -> Tensor:
    is_bool = token_weight is not None and token_weight.dtype == torch.bool
    kept, weight = (token_weight, None) if is_bool else (None, token_weight)
    # 0 counts as 1.
    divided_by = (1.0 if divisor.total is None else divisor.total.item() or 1.0) * divisor.number
    of_weights = divisor.of_weights and token_weight is not None
    loss = _call(
        "em_entropy_with_gradient", logits, softcap, kept, weight, divided_by, of_weights, *temperature, *_out(out)
    )
    return torch.scalar_tensor(loss, dtype=torch.float32, device=logits.device)


def _out(out: Tensor | None) -> tuple[Tensor | None, int, int, int, int]:
    return (None, 0, 0, 0, 0) if out is None else (out, _DTYPES[out.dtype], out.shape[1], out.stride(0), out.stride(1))


def _call(function: str, logits: Tensor, softcap: float | None, *arguments: Tensor | float | None) -> float:
    library = _load()
    if isinstance(library, str):
        raise RuntimeError(library)
    call, pack = library[function]
    outer, inner, vocab = logits.shape
    outer_stride, inner_stride, _ = logits.stride()
    return call(
        pack(
            logits.data_ptr(),
            _DTYPES[logits.dtype],
            inner,
            outer_stride,
            inner_stride,
            outer * inner,
            vocab,
            softcap or 0.0,
            torch.get_num_threads(),
            # isinstance(x, Tensor) would take several times as long.
            *[0 if x is None else x if isinstance(x, (float, int)) else x.data_ptr() for x in arguments],
        )
    )


@torch.compiler.assume_constant_result
def _missing_library() -> str | None:
    library = _load()
    return library if isinstance(library, str) else None


@functools.cache
def _load() -> dict[str, tuple[Callable[[bytes], float], Callable[..., bytes]]] | str:
    """Of each function, itself and what packs its arguments, or why there is no library."""
    if not LIBRARY.exists():
        return "the compiled CPU kernels were not built (no C++ compiler when em_kernels was installed)"
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return f"the compiled CPU kernels cannot be loaded: {error}"
    functions = {}
    for name, fields in _ARGUMENTS.items():
        layout, size = struct.Struct(fields), getattr(library, f"{name}_size", None)
        if size is None or size() != layout.size:
            return "the compiled CPU kernels come from other sources than this code; install em_kernels again"
        function = getattr(library, name)
        function.argtypes, function.restype = (ctypes.c_char_p,), _RESULTS.get(name)
        functions[name] = function, layout.pack
    return functions
