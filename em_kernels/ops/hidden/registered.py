"""The operators on hidden states as autograd and torch.library see them: one route, eager, traced and compiled.

    entropy_with_gradient   makes every gradient in its forward; its backward only hands them on, scaled in place where
                            the upstream gradient is not 1
    row_statistics          its backward makes the logits again; saved between: the operands and (7, rows)

Registered operators take flat arguments, so the objects that travel together are unpacked in a call and packed again in
the operator, both in this file.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from em_kernels.ops.autograd import (
    arguments_of,
    refuse_second_derivative,
    refuse_unsupported,
    scaled_gradients,
    upstream_of_statistics,
)
from em_kernels.ops.hidden import passes
from em_kernels.ops.hidden.gradients import Gradients
from em_kernels.ops.hidden.head import Chunking, Head
from em_kernels.ops.sharded import Place, implementation
from em_kernels.ops.types import Divisor, Needs, Saved, Statistics, Temperature, Upstream, Wanted, statistics_dtype


def entropy_with_gradient(
    hidden: Tensor,
    head: Head,
    token_weight: Tensor | None,
    divisor: Divisor,
    temperature: Temperature,
    chunking: Chunking,
    place: Place,
) -> Tensor:
    """The sum over rows of w H / divisor, a scalar, with the gradients of hidden, weight and bias made on the way."""
    refuse_unsupported(hidden, head.weight, head.bias)
    needs = [x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, head.weight, head.bias)]
    # A chunk has some of the weights only, so their sum is made here.
    total, number, _ = divisor.known(token_weight, statistics_dtype(hidden.dtype))
    return _entropy_op(hidden, *head, token_weight, total, number, *temperature, *chunking, needs, *place)[0]


def row_statistics(
    hidden: Tensor,
    head: Head,
    kept: Tensor | None,
    temperature: Temperature,
    target: Tensor | None,
    wanted: Wanted,
    chunking: Chunking,
    place: Place,
) -> Statistics:
    """The statistics of each row; the optional ones are None where they are not wanted."""
    refuse_unsupported(hidden, head.weight, head.bias)
    *results, _ = _statistics_op(hidden, *head, kept, *temperature, target, *wanted, *chunking, *place)
    return Statistics.without_empty(results, target is not None, wanted)


# ----------------------------------------------------------------------------------- the loss, gradients in the forward


def _entropy(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logits_dtype: torch.dtype,
    token_weight: Tensor | None,
    divisor: Tensor | None,
    number: int,
    row_temperature: Tensor | None,
    temperature: float,
    chunk_size: int,
    grad_tolerance: float,
    token_count: int | None,
    needs: Sequence[bool],
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    with _without_autocast(hidden):
        loss, gradients = passes.entropy_and_gradients(
            hidden,
            Head(weight, bias, softcap, logits_dtype),
            token_weight,
            Divisor(divisor, number),
            Temperature(row_temperature, temperature),
            Chunking(chunk_size, grad_tolerance, token_count),
            Needs(*needs),
            Place(backend, group),
        )
    return loss, *gradients


_entropy_op = torch.library.custom_op("em_kernels::linear_entropy_with_gradient", _entropy, mutates_args=())
_entropy_arguments = arguments_of(_entropy)


@_entropy_op.register_fake
def _(*inputs):
    at = _entropy_arguments(inputs)
    loss = at.hidden.new_empty((), dtype=statistics_dtype(at.hidden.dtype))
    return loss, *Gradients.allocate(at.hidden, at.weight, Needs(*at.needs))


def _setup_entropy(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    at = _entropy_arguments(inputs)
    ctx.place, ctx.needs, ctx.dtype = Place(at.backend, at.group), at.needs, at.hidden.dtype
    ctx.set_materialize_grads(False)
    _, *gradients = output
    ctx.save_for_backward(*gradients)


def _backward_entropy(ctx: Any, grad_loss: Tensor, *grad_gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_second_derivative(*grad_gradients)
    gradients = scaled_gradients(ctx.saved_tensors, grad_loss, implementation(ctx.place).scale_)
    return _of_operands(ctx, gradients, ctx.needs, ctx.dtype)


_entropy_op.register_autograd(_backward_entropy, setup_context=_setup_entropy)


# ------------------------------------------------------------------------------------------------------- the statistics


def _statistics(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logits_dtype: torch.dtype,
    kept: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None,
    second_moment: bool,
    extra: bool,
    chunk_size: int,
    grad_tolerance: float,
    token_count: int | None,
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The statistics in the order of `Statistics`, empty where not wanted, and the planes of `Saved`."""
    with _without_autocast(hidden):
        statistics, saved = passes.row_statistics(
            hidden,
            Head(weight, bias, softcap, logits_dtype),
            kept,
            Temperature(row_temperature, temperature),
            target,
            Wanted(second_moment, extra),
            Chunking(chunk_size, grad_tolerance, token_count),
            Place(backend, group),
        )
    return *statistics.with_empty(), saved.planes


_statistics_op = torch.library.custom_op("em_kernels::linear_row_statistics", _statistics, mutates_args=())
_statistics_arguments = arguments_of(_statistics)


@_statistics_op.register_fake
def _(*inputs):
    at = _statistics_arguments(inputs)
    rows, wanted = at.hidden.shape[0], Wanted(at.second_moment, at.extra)
    statistics = Statistics.allocate(at.hidden, rows, at.target is not None, wanted)
    return *statistics.with_empty(), Saved.allocate(at.hidden, rows).planes


def _setup_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    at = _statistics_arguments(inputs)
    *_, extra, planes = output
    ctx.chunking = Chunking(at.chunk_size, at.grad_tolerance, at.token_count)
    ctx.softcap, ctx.logits_dtype, ctx.place = at.softcap, at.logits_dtype, Place(at.backend, at.group)
    ctx.mark_non_differentiable(extra, planes)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(at.hidden, at.weight, at.bias, planes, at.target)


def _backward_statistics(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
    upstream = upstream_of_statistics(gradients)
    hidden, weight, bias, planes, target = ctx.saved_tensors
    of_hidden, of_weight, of_bias, *_ = ctx.needs_input_grad
    needs = [of_hidden, of_weight, of_bias]
    head = Head(weight, bias, ctx.softcap, ctx.logits_dtype)
    results = _gradients_op(hidden, *head, planes, target, list(upstream), *ctx.chunking, needs, *ctx.place)
    return _of_operands(ctx, results, needs, hidden.dtype)


_statistics_op.register_autograd(_backward_statistics, setup_context=_setup_statistics)


def _gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    logits_dtype: torch.dtype,
    saved: Tensor,
    target: Tensor | None,
    upstream: Sequence[Tensor | None],
    chunk_size: int,
    grad_tolerance: float,
    token_count: int | None,
    needs: Sequence[bool],
    backend: str,
    group: str,
) -> tuple[Tensor, Tensor, Tensor]:
    with _without_autocast(hidden):
        return passes.gradients_of_statistics(
            hidden,
            Head(weight, bias, softcap, logits_dtype),
            Saved(saved),
            target,
            Upstream(*upstream),
            Chunking(chunk_size, grad_tolerance, token_count),
            Needs(*needs),
            Place(backend, group),
        )


_gradients_op = torch.library.custom_op("em_kernels::linear_row_gradient", _gradients, mutates_args=())
_gradients_arguments = arguments_of(_gradients)


@_gradients_op.register_fake
def _(*inputs):
    at = _gradients_arguments(inputs)
    return tuple(Gradients.allocate(at.hidden, at.weight, Needs(*at.needs)))


def _backward_gradients(ctx: Any, *gradients_of_gradients: Tensor) -> None:
    refuse_second_derivative(*gradients_of_gradients)


_gradients_op.register_autograd(_backward_gradients)


def _of_operands(
    ctx: Any, gradients: Sequence[Tensor], needs: Sequence[bool], dtype: torch.dtype
) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of the operator, of which hidden, weight and bias come first."""
    operands = [gradient.to(dtype) if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return *operands, *[None] * (len(ctx.needs_input_grad) - len(operands))


def _without_autocast(hidden: Tensor) -> torch.autocast:
    """Operands have been cast before; a matmul that is to have a float32 result must not be cast again."""
    return torch.autocast(hidden.device.type, enabled=False)
