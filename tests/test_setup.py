"""What setup.py builds."""

import shutil

import pytest
import torch

from em_kernels.ops.backends import native


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_compiled_kernels_are_there_wherever_there_is_a_compiler():
    # The build may fail without failing the installation, and every test of the kernels would be skipped.
    assert native.unavailable_reason(torch.device("cpu"), torch.float32) is None
