"""Which implementation can run where, and if not, why."""

import importlib.util

import torch

NAMES = ("triton", "cuda", "torch")
_TRITON_INSTALLED = importlib.util.find_spec("triton") is not None


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
    if not _TRITON_INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not _triton_interpreted():
        return f"Triton compiles for a GPU and the logits are on {device} (TRITON_INTERPRET=1 runs it on the CPU)"
    return None


@torch.compiler.assume_constant_result
def _triton_interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret
