"""The backend in Triton: where it runs, which can be asked without Triton."""

import importlib.util

import torch

from em_kernels.ops.types import CPUS

_INSTALLED = importlib.util.find_spec("triton") is not None


def unavailable_reason(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why the kernels cannot run on tensors of this device and dtype, or None if they can."""
    if dtype == torch.float64:
        return "the Triton kernels compute in float32 and the logits are float64; use 'torch'"
    if not _INSTALLED:
        return "Triton is not installed"
    if device.type != "cuda" and not (device in CPUS and _interpreted()):
        return f"Triton compiles for a GPU and the logits are on {device} (TRITON_INTERPRET=1 runs it on the CPU)"
    return None


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    import triton

    return triton.knobs.runtime.interpret
