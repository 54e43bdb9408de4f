"""The operators on logits, differentiable and registered with torch.library.

    row_statistics         one read of the logits; its backward reads them again and writes the gradient
    entropy_with_gradient  the reduced loss and, where it is needed, its gradient at once, while a row is still in
                           cache; its backward only hands the gradient on, scaled in place where the upstream gradient
                           is not 1

Whoever traces or watches the call sees the registered operator. A plain eager call goes straight to the same backend
under an autograd.Function: the registered route costs the host tens of microseconds a call, as much as the kernel
itself at decode-time sizes.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from em_kernels.ops import backend as backends
from em_kernels.ops.autograd import (
    arguments_of,
    is_traced,
    refuse_second_derivative,
    refuse_unsupported,
    scaled_gradients,
    upstream_of_statistics,
)
from em_kernels.ops.sharded import Place, implementation
from em_kernels.ops.types import (
    Divisor,
    Saved,
    Statistics,
    Temperature,
    Upstream,
    Wanted,
    new_gradient,
    row_count,
    rows_of_logits,
    statistics_dtype,
)


def row_statistics(
    logits: Tensor,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    place: Place,
    *,
    inplace_backward: bool = False,
) -> Statistics:
    """The statistics of each row; the optional ones are None where they are not wanted."""
    refuse_unsupported(logits)
    if is_traced(logits):
        *results, _ = _row_statistics_op(logits, kept, *temperature, target, *wanted, *place)
        return Statistics.without_empty(results, target is not None, wanted)
    if logits.requires_grad and torch.is_grad_enabled():
        *results, _ = _RowStatistics.apply(logits, kept, temperature, target, wanted, place, inplace_backward)
        return Statistics(*results)
    return implementation(place).row_statistics(logits, kept, temperature, target, wanted)[0]


def entropy_with_gradient(
    logits: Tensor,
    token_weight: Tensor | None,
    divisor: Divisor,
    temperature: Temperature,
    backend: str,
    *,
    needs_gradient: bool,
    inplace_backward: bool = False,
) -> Tensor:
    """The sum over rows of w H / divisor, a scalar, with its gradient made on the way where one is needed.

    The logits are (..., V) with any strides. Their rows are made where autograd does not record: a recorded view would
    cost the host more, in the backward too.
    """
    refuse_unsupported(logits)
    if is_traced(logits):
        divisor = divisor.known(token_weight, statistics_dtype(logits.dtype))
        return _entropy_with_gradient_op(
            rows_of_logits(logits),
            token_weight,
            divisor.total,
            divisor.number,
            *temperature,
            needs_gradient,
            backend,
        )[0]
    if needs_gradient:
        return _EntropyWithGradient.apply(logits, token_weight, divisor, temperature, backend, inplace_backward)[0]
    rows = rows_of_logits(logits)
    return backends.implementation(backend).entropy_with_gradient(rows, token_weight, divisor, temperature, None)


# ------------------------------------------------------------------------------------------------- the direct route


class _RowStatistics(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, kept, temperature, target, wanted, place, inplace_backward):
        statistics, saved = implementation(place).row_statistics(logits, kept, temperature, target, wanted)
        ctx.place, ctx.inplace_backward = place, inplace_backward
        ctx.mark_non_differentiable(saved.planes, *(() if statistics.extra is None else (statistics.extra,)))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, saved.planes, target)
        return *statistics, saved.planes

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        logits, planes, target = ctx.saved_tensors
        upstream = upstream_of_statistics(gradients)
        if torch.is_grad_enabled():  # create_graph=True: the registered operator knows that it has no derivative.
            return _row_gradient_op(logits, planes, target, list(upstream), *ctx.place), *[None] * 6
        logits = logits.detach()
        gradient = logits if ctx.inplace_backward else new_gradient(logits)
        implementation(ctx.place).row_gradient(logits, Saved(planes), target, upstream, gradient)
        if ctx.inplace_backward:
            # Whoever else saved the logits, a second backward included, is told rather than given the gradient.
            torch.autograd.graph.increment_version(logits)
        return gradient, *[None] * 6


class _EntropyWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, logits, token_weight, divisor, temperature, backend, inplace_backward):
        functions = backends.implementation(backend)
        ctx.scale_, ctx.inplace_backward = functions.scale_, inplace_backward
        rows = rows_of_logits(logits)
        # detach() shares the version counter, so that an in-place change of the logits before backward is noticed.
        gradient = logits.detach() if inplace_backward else new_gradient(logits)
        out = rows if inplace_backward else gradient.view(rows.shape)
        loss = functions.entropy_with_gradient(rows, token_weight, divisor, temperature, out)
        if inplace_backward:
            torch.autograd.graph.increment_version(gradient)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(gradient)
        return loss, None if inplace_backward else gradient

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, grad_gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        # A gradient in the logits' own memory is no result of the forward, so its use cannot be seen here.
        refuse_second_derivative(grad_loss if ctx.inplace_backward and torch.is_grad_enabled() else grad_gradient)
        return *scaled_gradients(ctx.saved_tensors, grad_loss, ctx.scale_), *[None] * 5


# --------------------------------------------------------------------------------------------- the registered route


def _row_statistics(
    logits: Tensor,
    kept: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None,
    second_moment: bool,
    extra: bool,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics in the order of `Statistics`, empty where not wanted, and the planes of `Saved`."""
    statistics, saved = implementation(Place(backend, group)).row_statistics(
        logits, kept, Temperature(row_temperature, temperature), target, Wanted(second_moment, extra)
    )
    return *statistics.with_empty(), saved.planes


_row_statistics_op = torch.library.custom_op("em_kernels::row_statistics", _row_statistics, mutates_args=())
_arguments_of_statistics = arguments_of(_row_statistics)


@_row_statistics_op.register_fake
def _(*inputs):
    at = _arguments_of_statistics(inputs)
    rows, wanted = row_count(at.logits), Wanted(at.second_moment, at.extra)
    statistics = Statistics.allocate(at.logits, rows, at.target is not None, wanted)
    return *statistics.with_empty(), Saved.allocate(at.logits, rows).planes


def _setup_row_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    at = _arguments_of_statistics(inputs)
    *_, extra, planes = output
    ctx.place = Place(at.backend, at.group)
    ctx.mark_non_differentiable(extra, planes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(at.logits, planes, at.target)


def _backward_row_statistics(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    logits, planes, target = ctx.saved_tensors
    gradient = _row_gradient_op(logits, planes, target, list(upstream_of_statistics(gradients)), *ctx.place)
    return gradient, *[None] * (len(ctx.needs_input_grad) - 1)


_row_statistics_op.register_autograd(_backward_row_statistics, setup_context=_setup_row_statistics)


@torch.library.custom_op("em_kernels::row_gradient", mutates_args=())
def _row_gradient_op(
    logits: Tensor,
    saved: Tensor,
    target: Tensor | None,
    upstream: Sequence[Tensor | None],
    backend: str,
    group: str,
) -> Tensor:
    gradient = new_gradient(logits)
    implementation(Place(backend, group)).row_gradient(logits, Saved(saved), target, Upstream(*upstream), gradient)
    return gradient


@_row_gradient_op.register_fake
def _(logits, *_):
    return new_gradient(logits)


def _backward_row_gradient(ctx: Any, gradient_of_gradient: Tensor) -> None:
    refuse_second_derivative(gradient_of_gradient)


_row_gradient_op.register_autograd(_backward_row_gradient)


def _loss_and_gradient(
    logits: Tensor,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    number: int,
    row_temperature: Tensor | None,
    temperature: float,
    needs_gradient: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The loss and its gradient, which is empty where it is not needed."""
    gradient = new_gradient(logits) if needs_gradient else None
    loss = backends.implementation(backend).entropy_with_gradient(
        logits, token_weight, Divisor(divisor, number), Temperature(row_temperature, temperature), gradient
    )
    return loss, logits.new_empty(0) if gradient is None else gradient


_entropy_with_gradient_op = torch.library.custom_op(
    "em_kernels::entropy_with_gradient", _loss_and_gradient, mutates_args=()
)
_arguments_of_entropy = arguments_of(_loss_and_gradient)


@_entropy_with_gradient_op.register_fake
def _(*inputs):
    at = _arguments_of_entropy(inputs)
    gradient = new_gradient(at.logits) if at.needs_gradient else at.logits.new_empty(0)
    return at.logits.new_empty((), dtype=statistics_dtype(at.logits.dtype)), gradient


def _setup_entropy_with_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    _, gradient = output
    ctx.scale_ = backends.implementation(_arguments_of_entropy(inputs).backend).scale_
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(gradient)


def _backward_entropy_with_gradient(
    ctx: Any, grad_loss: Tensor, grad_gradient: Tensor | None
) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(grad_gradient)
    return *scaled_gradients(ctx.saved_tensors, grad_loss, ctx.scale_), *[None] * (len(ctx.needs_input_grad) - 1)


_entropy_with_gradient_op.register_autograd(_backward_entropy_with_gradient, setup_context=_setup_entropy_with_gradient)
