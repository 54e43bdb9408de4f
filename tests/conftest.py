"""What all tests share: the implementations under test, and the processors they are tested on."""

import importlib.util
import os

import torch

# Kernels are interpreted where there is no GPU; Triton reads this when it defines them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

from em_kernels.ops import backends, native_cpu, operators

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two threads each on two cores spend their time waiting for each other.
    torch.set_num_threads(1)

# "pytorch off cpu" is what runs on a device whose values the host must not look at: no row is left out of a block.
IMPLEMENTATIONS = ("pytorch", "pytorch off cpu", "compiled", "triton")


class Implementation:
    """How to ask for one implementation: the backend's name, and the device its tensors live on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = "triton" if name == "triton" else "torch"
        on_gpu = name in ("triton", "pytorch off cpu") and torch.cuda.is_available()
        self.device = "cuda" if on_gpu else "cpu"

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    def skip_dtype(self, dtype: torch.dtype) -> None:
        if self.name == "compiled" and dtype != torch.float32:
            pytest.skip("the compiled CPU kernels are float32; PyTorch serves the other dtypes")
        if self.name == "triton" and dtype == torch.float64:
            pytest.skip("the Triton kernels compute in float32")


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    this = Implementation(request.param)
    if this.name == "compiled" and native_cpu.unavailable_reason():
        pytest.skip(native_cpu.unavailable_reason())
    if this.name.startswith("pytorch"):
        monkeypatch.setattr(native_cpu, "unavailable_reason", lambda: "switched off by the test")
    if this.name == "pytorch off cpu" and this.device == "cpu":
        monkeypatch.setattr(operators, "host_sees", lambda _: False)
    if this.name == "triton":
        reason = backends.unavailable_reason("triton", torch.device(this.device))
        if reason:
            pytest.skip(reason)
    return this


@pytest.fixture(autouse=True, scope="session")
def interpreter_fuses_multiply_and_add():
    """The interpreter rounds twice where a GPU rounds once, which is what the kernels use the instruction for."""
    if importlib.util.find_spec("triton") is None:
        return
    from triton.runtime import interpreter

    def create_fma(self, x, y, z):
        exact = x.data.astype(np.float64) * y.data + z.data
        return interpreter.TensorHandle(exact.astype(np.float32), z.dtype.scalar)

    interpreter.InterpreterBuilder.create_fma = create_fma


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
