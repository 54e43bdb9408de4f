"""The package's public names, which are imported when they are first asked for."""

import subprocess
import sys

import pytest
import torch

import em_kernels


def test_every_public_name_is_there() -> None:
    for name in em_kernels.__all__:
        assert getattr(em_kernels, name).__name__ == name
        assert name in dir(em_kernels)
    with pytest.raises(AttributeError, match="module 'em_kernels' has no attribute 'entropie'"):
        _ = em_kernels.entropie


def test_first_use_may_be_in_compiled_code() -> None:
    program = """
import torch
import em_kernels
loss = torch.compile(lambda logits: em_kernels.entropy_loss(logits), fullgraph=True, backend="eager")
print(loss(torch.zeros(2, 8)).item())
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert float(result.stdout) == pytest.approx(torch.tensor(8.0).log().item())
