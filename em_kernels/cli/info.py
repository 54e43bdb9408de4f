"""em-kernels info: versions, devices and backends."""

import os
import platform
from typing import Any


def add_parser(commands: Any) -> None:
    info = commands.add_parser("info", help="versions, devices and backends")
    info.set_defaults(run=_info)


def _info() -> None:
    import importlib.metadata

    import torch

    import em_kernels
    from em_kernels.ops import backend

    print(f"em_kernels    {em_kernels.__version__}")
    print(
        f"python        {platform.python_version()} on {platform.system()} {platform.machine()}, {os.cpu_count()} cores"
    )
    for package in ("torch", "triton", "transformers", "accelerate"):
        try:
            version = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            version = "not installed"
        print(f"{package:13} {version}")
    devices = [torch.device("cpu")]
    devices += [torch.device("cuda", i) for i in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        devices.append(torch.device("mps"))
    for device in devices:
        name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
        print(f"\nbackends on {device}{name}")
        for name in backend.NAMES:
            print(f"  {name:11} {backend.unavailable_reason(name, device) or 'runs'}")
