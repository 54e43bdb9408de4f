"""What a result was made with besides its settings: the versions of packages and the device."""

import importlib.metadata
import platform
from typing import Any

import torch

_PACKAGES = ("torch", "transformers", "accelerate", "math-verify")


def surroundings() -> dict[str, Any]:
    """The versions by package and the name of the device, for a config.json."""
    import em_kernels

    versions = {package: importlib.metadata.version(package) for package in _PACKAGES}
    return {
        "versions": {"em_kernels": em_kernels.__version__, "python": platform.python_version(), **versions},
        "device": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else platform.processor() or platform.machine(),
    }
