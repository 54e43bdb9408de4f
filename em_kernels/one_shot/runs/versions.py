"""The versions of what makes a result, so that results of unlike versions can be told apart."""

import platform

import accelerate
import torch
import transformers

import em_kernels


def versions() -> dict[str, str]:
    return {
        "em_kernels": em_kernels.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "accelerate": accelerate.__version__,
    }
