"""The operators as the public functions call them: differentiable, and registered with torch.library.

    row_statistics         one read of the logits; its backward reads them again and writes the gradient
    entropy_with_gradient  the reduced loss and its gradient at once, while a row is still in cache; its backward only
                           hands the gradient on, scaled in place where the upstream gradient is not 1

Tracing (torch.compile, fake tensors, tensor subclasses) goes through the registered operator. A plain eager call goes
straight to the same implementation under an autograd.Function: the registered path costs the host tens of
microseconds a call, as much as the kernel itself at decode-time sizes.

Logits are (outer, inner, V) with contiguous columns; everything per row is (outer * inner,). A row whose mask is False,
or whose weight is 0, is not read. `row_temperature` overrides `temperature` where it is not None.
"""

import functools
import importlib
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_MODULES = {"triton": "em_kernels.ops.triton_entropy", "torch": "em_kernels.ops.blocked"}


@functools.cache
def implementation(backend: str) -> ModuleType:
    return importlib.import_module(_MODULES[backend])


def row_statistics(
    logits: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None = None,
    *,
    varentropy: bool = False,
    backend: str,
    inplace_backward: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, lse, log-probability of the target and varentropy per row; the last two empty where not asked for."""
    arguments = (logits, mask, row_temperature, temperature, target, varentropy, backend)
    if must_trace(logits):
        return _row_statistics_op(*arguments)[:4]
    if not (logits.requires_grad and torch.is_grad_enabled()):
        return implementation(backend).row_statistics(*arguments[:-1])[:4]
    return _RowStatistics.apply(*arguments, inplace_backward)[:4]


def entropy_with_gradient(
    logits: Tensor,
    weight: Tensor | None,
    divisor: Tensor | None,
    count: int,
    row_temperature: Tensor | None,
    temperature: float,
    *,
    backend: str,
    inplace_backward: bool = False,
) -> Tensor:
    """The sum over rows of weight / divisor / count * H, a scalar, with its gradient made on the way."""
    arguments = (logits, weight, divisor, count, row_temperature, temperature, backend)
    if must_trace(logits):
        return _entropy_with_gradient_op(*arguments)[0]
    return _EntropyWithGradient.apply(*arguments, inplace_backward)


def must_trace(logits: Tensor) -> bool:
    """Whether a call must go through the registered operators, which an eager one need not."""
    refuse_transforms()
    return torch.compiler.is_compiling() or type(logits) not in (Tensor, torch.nn.Parameter)


# --------------------------------------------------------------------------------------------- the registered operators


@torch.library.custom_op("em_kernels::row_statistics", mutates_args=())
def _row_statistics_op(
    logits: Tensor,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None,
    varentropy: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fifth result is what backward needs of each row, (5, rows): max, mean of d, sum of e^d, and log2(e) / tau as
    the sum of two numbers, both 0 of a masked row."""
    return implementation(backend).row_statistics(logits, mask, row_temperature, temperature, target, varentropy)


@_row_statistics_op.register_fake
def _(logits, mask, row_temperature, temperature, target, varentropy, backend):
    return new_row_statistics(logits, logits.shape[0] * logits.shape[1], target, varentropy)


@torch.library.custom_op("em_kernels::row_gradient", mutates_args=())
def _row_gradient_op(
    logits: Tensor,
    saved: Tensor,
    varentropy: Tensor,
    target: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_logprob: Tensor | None,
    grad_varentropy: Tensor | None,
    backend: str,
) -> Tensor:
    return implementation(backend).row_gradient(
        logits, saved, varentropy, target, grad_entropy, grad_lse, grad_logprob, grad_varentropy, new_gradient(logits)
    )


@_row_gradient_op.register_fake
def _(logits, *_):
    return new_gradient(logits)


@torch.library.custom_op("em_kernels::entropy_with_gradient", mutates_args=())
def _entropy_with_gradient_op(
    logits: Tensor,
    weight: Tensor | None,
    divisor: Tensor | None,
    count: int,
    row_temperature: Tensor | None,
    temperature: float,
    backend: str,
) -> tuple[Tensor, Tensor]:
    gradient = new_gradient(logits)
    loss = implementation(backend).entropy_with_gradient(
        logits, weight, divisor, count, row_temperature, temperature, gradient
    )
    return loss, gradient


@_entropy_with_gradient_op.register_fake
def _(logits, *_):
    return new_statistics(logits), new_gradient(logits)


def host_sees(tensor: Tensor) -> bool:
    """Whether an implementation may look at values: without a device synchronisation, that is."""
    return tensor.device.type == "cpu"


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def new_statistics(logits: Tensor, *shape: int) -> Tensor:
    return logits.new_empty(shape, dtype=statistics_dtype(logits.dtype))


def new_row_statistics(
    source: Tensor, rows: int, target: Tensor | None, varentropy: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The results of `row_statistics`, unwritten, for as many rows of logits, or of hidden states they are made of."""
    return (
        new_statistics(source, rows),
        new_statistics(source, rows),
        new_statistics(source, 0 if target is None else rows),
        new_statistics(source, rows if varentropy else 0),
        new_statistics(source, 5, rows),
    )


def new_gradient(logits: Tensor) -> Tensor:
    return logits.new_empty(logits.shape)


# ------------------------------------------------------------------------------------------------------------- autograd


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(logits, mask, row_temperature, temperature, target, varentropy, backend, inplace_backward):
        return implementation(backend).row_statistics(logits, mask, row_temperature, temperature, target, varentropy)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
        logits, _, _, _, target, _, ctx.backend, *inplace_backward = inputs
        *_, varentropy, saved = output
        ctx.inplace_backward = inplace_backward == [True]
        ctx.mark_non_differentiable(saved)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, saved, varentropy, target)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, saved, varentropy, target = ctx.saved_tensors
        # A statistic that was not asked for is empty, and so is its gradient.
        upstream = tuple(None if g is None or g.numel() == 0 else g for g in upstream[:4])
        refuse_batched(*upstream)
        arguments = (logits, saved, varentropy, target, *upstream)
        if must_trace(logits):
            gradient = _row_gradient_op(*arguments, ctx.backend)
        else:
            logits = logits.detach()
            gradient = logits if ctx.inplace_backward else new_gradient(logits)
            implementation(ctx.backend).row_gradient(*arguments, gradient)
            if ctx.inplace_backward:
                # Whoever else saved the logits, a second backward included, is told rather than given the gradient.
                torch.autograd.graph.increment_version(logits)
        return (gradient, *[None] * (len(ctx.needs_input_grad) - 1))


class _EntropyWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, weight, divisor, count, row_temperature, temperature, backend, inplace_backward):
        # detach() shares the version counter, so that an in-place change of the logits before backward is noticed.
        gradient = logits.detach() if inplace_backward else new_gradient(logits)
        loss = implementation(backend).entropy_with_gradient(
            logits, weight, divisor, count, row_temperature, temperature, gradient
        )
        if inplace_backward:
            torch.autograd.graph.increment_version(gradient)
        ctx.backend = backend
        ctx.save_for_backward(gradient)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        refuse_batched(grad_loss)
        # Only a graph that is run again needs the unscaled gradient again.
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradient = gradient.clone()
        implementation(ctx.backend).scale_(gradient, grad_loss)
        return (gradient, *[None] * 7)


def _setup_entropy_with_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    ctx.backend = inputs[-1]
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


@once_differentiable
def _backward_entropy_with_gradient(ctx: Any, grad_loss: Tensor, _: Tensor | None) -> tuple[Tensor | None, ...]:
    (gradient,) = ctx.saved_tensors
    return (gradient * grad_loss, *[None] * 6)


def refuse_transforms() -> None:
    if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
        raise RuntimeError("em_kernels does not run under torch.func's transforms (vmap, grad, jvp, ...)")


def refuse_batched(*upstream: Tensor | None) -> None:
    if not torch.compiler.is_compiling() and any(
        g is not None and torch._C._functorch.is_legacy_batchedtensor(g) for g in upstream
    ):
        raise RuntimeError("em_kernels has no backward with is_grads_batched=True; call it once for each gradient")


_row_statistics_op.register_autograd(_RowStatistics.backward, setup_context=_RowStatistics.setup_context)
_entropy_with_gradient_op.register_autograd(_backward_entropy_with_gradient, setup_context=_setup_entropy_with_gradient)
