"""The questions that operators ask of autograd and of torch's tracers, some of which torch answers only in private."""

import inspect
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

from em_kernels.ops.types import Upstream, host_sees

_PLAIN = frozenset((Tensor, torch.nn.Parameter))


def is_traced(*operands: Tensor) -> bool:
    """Whether something watches or records the call, which must then go through the registered operators.

    torch.compile, torch.jit.trace, a TorchDispatchMode (make_fx, fake tensors, FLOP counters) and tensor subclasses do.
    """
    return (
        is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
        or not _PLAIN.issuperset(map(type, operands))
    )


def refuse_unsupported(*operands: Tensor | None) -> None:
    """Raises RuntimeError under torch.func's transforms, and for dual tensors of forward-mode differentiation."""
    if is_compiling():
        return
    if torch._C._are_functorch_transforms_active():
        raise RuntimeError("em_kernels does not run under torch.func's transforms (vmap, grad, jvp, ...)")
    if forward_ad._current_level >= 0 and any(
        operand is not None and forward_ad.unpack_dual(operand).tangent is not None for operand in operands
    ):
        raise RuntimeError("em_kernels has no forward-mode derivative; use backward() or torch.autograd.grad")


def upstream_of_statistics(gradients: Sequence[Tensor | None]) -> Upstream:
    """The gradients of an operator's statistics; the results that follow these have none."""
    _refuse_batched(*gradients)
    entropy, lse, logprob, varentropy, *_ = gradients
    given = (entropy, lse, logprob, varentropy)
    # A statistic that was not asked for is an empty result of its operator, and so is the gradient of it.
    return Upstream(*(None if g is None or g.numel() == 0 else g.resolve_neg() for g in given))


def refuse_second_derivative(*gradients_of_gradients: Tensor | None) -> None:
    """Raises RuntimeError where a loss is made of a gradient, which has no derivative here.

    An operator that makes a gradient in its forward returns it as a differentiable result, for this to be called.
    """
    if any(g is not None for g in gradients_of_gradients):
        raise RuntimeError("em_kernels has no derivative of its gradients (create_graph=True): they are final")


def scaled_gradients(
    gradients: Sequence[Tensor], factor: Tensor | None, scale_: Callable[[Tensor, Tensor], None]
) -> list[Tensor]:
    """The gradients that a forward has saved times the upstream gradient, in place where nobody needs them again.

    The upstream gradient is None where the loss does not enter what is differentiated.
    """
    _refuse_batched(factor)
    if factor is None:
        return [torch.zeros_like(gradient) for gradient in gradients]
    if torch.is_grad_enabled() or is_traced(factor, *gradients):
        return [gradient * factor for gradient in gradients]
    if torch._C._autograd._get_current_graph_task_keep_graph():
        gradients = [gradient.clone() for gradient in gradients]
    if host_sees(factor) and factor.item() == 1:
        return list(gradients)
    for gradient in gradients:
        if gradient.numel() > 0:
            scale_(gradient.view(1, -1, gradient.shape[-1]) if gradient.dim() != 3 else gradient, factor)
    return list(gradients)


def _refuse_batched(*gradients: Tensor | None) -> None:
    if is_compiling():
        return
    for g in gradients:
        if g is not None and torch._C._functorch.is_legacy_batchedtensor(g):
            raise RuntimeError("em_kernels has no backward with is_grads_batched=True; call it once for each gradient")


def arguments_of(operator: Callable[..., Any]) -> Callable[[Sequence[Any]], SimpleNamespace]:
    """A function that gives the arguments of a registered operator their names."""
    names = tuple(inspect.signature(operator).parameters)
    return lambda values: SimpleNamespace(**dict(zip(names, values, strict=True)))
