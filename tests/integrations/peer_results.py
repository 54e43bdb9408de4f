"""What the tests of functions with a peer's signature share: the comparison of signatures, values and gradients."""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def parameters(function: Callable[..., Any]) -> list[tuple[str, Any]]:
    """The names and defaults of a function's parameters, without the context of an autograd function."""
    found = inspect.signature(function).parameters.values()
    return [(parameter.name, parameter.default) for parameter in found if parameter.name not in ("ctx", "self")]


def results_and_gradients(function: Callable[..., Any], *inputs: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """What the function returns, and the gradients of its inputs for upstream gradients of both signs."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    returned = function(*leaves)
    outputs = [returned] if isinstance(returned, Tensor) else list(returned)
    upstream = [torch.linspace(-1, 2, x.numel()).view_as(x).to(x.dtype) for x in outputs]
    return outputs, list(torch.autograd.grad(outputs, leaves, upstream))


def assert_same(
    ours: tuple[list[Tensor], list[Tensor]], peers: tuple[list[Tensor], list[Tensor]], error: float
) -> None:
    """Shapes are the same, and no value is further away than that part of its tensor's largest."""
    for own, other in zip([*ours[0], *ours[1]], [*peers[0], *peers[1]], strict=True):
        assert own.shape == other.shape
        assert other.abs().max() > 0
        assert (own - other).abs().max() <= error * other.abs().max()
