"""Calling a model that DeepSpeed ZeRO-3 has loaded in parts, before DeepSpeed's engine is made of it."""

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn


@contextlib.contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Makes each module's own parameters whole while its forward runs, until the block ends.

    Every process has to call the model together. A module whose parameters are whole is left alone, as all are where
    no part of the model is another process's, or where DeepSpeed's engine has gathered them.
    """
    if not any(hasattr(parameter, "ds_id") for parameter in model.parameters()):
        yield
        return
    from deepspeed.runtime.zero.partition_parameters import GatheredParameters, ZeroParamStatus

    whole: dict[nn.Module, GatheredParameters] = {}

    def gather(module: nn.Module, inputs: Any) -> None:
        parts = [
            p
            for p in module.parameters(recurse=False)
            if getattr(p, "ds_status", None) == ZeroParamStatus.NOT_AVAILABLE
        ]
        if parts:
            whole[module] = GatheredParameters(parts)
            whole[module].__enter__()

    def release(module: nn.Module, inputs: Any, output: Any) -> None:
        if module in whole:
            whole.pop(module).__exit__(None, None, None)

    hooks: list[Any] = []
    for module in model.modules():
        hooks.append(module.register_forward_pre_hook(gather))
        hooks.append(module.register_forward_hook(release, always_call=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
