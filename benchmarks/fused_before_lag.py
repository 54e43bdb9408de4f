"""This suite measures the fused kernel before the lag, a program a row, on shapes of entropy_loss.

It needs the package em_kernels of an earlier commit before this checkout on PYTHONPATH; on_gpu.sh unpacks that. Peers
are left out. A time over that of the copy compares with the one that entropy_loss finds for ours on the same machine.
"""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import entropy_loss
import torch
from entropy_loss import Configuration, header, line

import em_kernels

__all__ = ["configurations", "header", "line", "missing", "rows"]

_NAME = "fused kernel before the lag"
_FLOOR = "copy | copy"
_VARIANTS = ("forward+backward", "inplace_backward", "masked 0.5")
# Many rows say how the kernels fare with each vocabulary, few rows how they fill the device.
_FEW_ROWS = 64


def configurations(size: str, device: str) -> Iterator[Configuration]:
    for c in entropy_loss.configurations(size, device):
        # The mean over float16 logits does not use the fused kernel.
        if c.logits == "peaked" and c.dtype != "float16" and (c.part != "tokens" or c.rows <= _FEW_ROWS):
            yield replace(c, compiled=False, memory=False, budget=min(c.budget, 0.5))


def missing(device: torch.device) -> dict[str, str]:
    return {}


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    checkout = Path(__file__).parents[1]
    if Path(em_kernels.__file__).parents[1] == checkout:
        raise RuntimeError(f"em_kernels is that of {checkout}, expected one of an earlier commit on PYTHONPATH")
    prepared = entropy_loss.prepare(c, only="ours")
    # A failure of the earlier kernel is none of ours, so its names are others.
    names = {_FLOOR: _FLOOR} | {f"{_NAME} | {variant}": f"ours | {variant}" for variant in _VARIANTS}
    renamed = prepared._replace(
        calls={name: prepared.calls[of_suite] for name, of_suite in names.items()},
        check=lambda name, result: prepared.check(names[name], result),
        notes={name: prepared.notes[of_suite] for name, of_suite in names.items()},
    )
    yield from entropy_loss.timed_rows("fused_before_lag", c, renamed)
