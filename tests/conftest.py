"""What all tests share: the implementations under test, and the processors they are tested on."""

import importlib.util
import os

import torch

# No test may depend on a network. The hub's client reads the variable once, when it is first imported.
os.environ["HF_HUB_OFFLINE"] = "1"
# Kernels are interpreted where there is no GPU; Triton reads this when it defines them.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numpy as np
import pytest

from em_kernels.ops import backend, types

if "PYTEST_XDIST_WORKER" in os.environ:
    # Two workers with two threads each on two cores spend their time waiting for each other.
    torch.set_num_threads(1)

# "torch off cpu" is what runs on a device whose values the host must not look at: no row is left out of a block.
IMPLEMENTATIONS = ("torch", "torch off cpu", "native", "triton")
# `make quick` leaves these to the tests of the backends' contract: the interpreter is slow.
THOROUGH = ("torch off cpu", "triton")


class Implementation:
    """How to ask for one implementation: the backend's name, and the device its tensors live on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.backend = name.partition(" ")[0]
        on_gpu = name in ("triton", "torch off cpu") and torch.cuda.is_available()
        self.device = "cuda" if on_gpu else "cpu"

    @property
    def interpreted(self) -> bool:
        return self.name == "triton" and self.device == "cpu"

    def skip_dtype(self, dtype: torch.dtype) -> None:
        """Skips the test where the backend has no kernel for logits of this dtype."""
        reason = backend.unavailable_reason(self.backend, torch.device(self.device), dtype)
        if reason is not None:
            pytest.skip(reason)

    def skip_hidden_dtype(self, dtype: torch.dtype) -> None:
        """The same for hidden states of this dtype, whose logits are float32 unless they are asked to be rounded."""
        self.skip_dtype(types.statistics_dtype(dtype))


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request, monkeypatch):
    this = Implementation(request.param)
    this.skip_dtype(torch.float32)
    if this.name == "torch off cpu" and this.device == "cpu":
        monkeypatch.setattr(types, "host_sees", lambda _: False)
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


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """The folder of the tiny model. Most tests need no Transformers, so that it is imported here."""
    from tiny_model import save_tiny_model

    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


def pytest_collection_modifyitems(items):
    for item in items:
        callspec = getattr(item, "callspec", None)
        if callspec is not None and callspec.params.get("implementation") in THOROUGH:
            item.add_marker(pytest.mark.thorough)
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
