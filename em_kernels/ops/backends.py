"""Which implementation can run where, and if not, why."""

import functools
import importlib.util

import torch

NAMES = ("triton", "cuda", "torch")


def unavailable_reason(backend: str, device: torch.device, dtype: torch.dtype = torch.float32) -> str | None:
    """Why `backend` cannot run on tensors of this device and dtype, or None if it can."""
    if backend not in NAMES:
        return f"there is no such backend; accepted are {', '.join(map(repr, NAMES))} or None"
    if backend == "torch":
        return None
    if backend == "cuda":
        return "this build has no compiled CUDA kernels; use 'triton'"
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the logits are float64; use 'torch'"
    if not _triton_installed():
        return "Triton is not installed"
    if device.type != "cuda" and not _triton_interpreted():
        return f"Triton compiles for a GPU and the logits are on {device} (TRITON_INTERPRET=1 runs it on the CPU)"
    return None


@torch.compiler.assume_constant_result
@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@torch.compiler.assume_constant_result
@functools.cache
def _triton_interpreted() -> bool:
    # Read once: Triton itself reads it when a kernel is defined, and never again.
    import triton

    return triton.knobs.runtime.interpret
