"""A model's usual output with one more field, and with no logits."""

import dataclasses
import functools
from typing import Any

import torch
from torch import Tensor
from transformers.utils import ModelOutput


@dataclasses.dataclass
class TokenStatsOutput(ModelOutput):
    """The statistics of each token that were asked for, each (batch, time) and float32; see `em_kernels.TokenStats`.

    Attributes: the fields of `em_kernels.TokenStats`, None where not asked for.
    """

    entropy: Tensor | None = None
    lse: Tensor | None = None
    logprob: Tensor | None = None
    varentropy: Tensor | None = None
    max_prob: Tensor | None = None
    top1: Tensor | None = None
    mean_logprob: Tensor | None = None
    collision: Tensor | None = None


# Compilation cannot trace the making of a class, and would pass over the cache with a warning.
@torch.compiler.disable
def without_logits(output: ModelOutput, **more: Any) -> Any:
    """The same output with logits None and with these fields, as a subclass of its class that has them.

    Data parallelism, sharding and Accelerate take outputs apart and put them together again, which a field that the
    class does not declare would not survive.
    """
    fields = {field.name: getattr(output, field.name) for field in dataclasses.fields(output)}
    kind: Any = type(output)
    return _with_fields(kind, tuple(more))(**{**fields, "logits": None, **more})


@functools.cache
def _with_fields(kind: type, names: tuple[str, ...]) -> type:
    own = {field.name for field in dataclasses.fields(kind)}
    added = [(name, Any, None) for name in names if name not in own]
    if not added:
        return kind
    fields = [*own, *(name for name, _, _ in added)]

    def reduced(output: Any) -> tuple[Any, ...]:
        # Pickle looks classes up by name, and this one has none in a module.
        return _restored, (kind, names, {field: getattr(output, field) for field in fields})

    return dataclasses.make_dataclass(kind.__name__, added, bases=(kind,), namespace={"__reduce__": reduced})


def _restored(kind: type, names: tuple[str, ...], fields: dict[str, Any]) -> Any:
    return _with_fields(kind, names)(**fields)
