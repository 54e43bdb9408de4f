"""The operators on hidden states: logits = hidden @ weight.T chunk by chunk of tokens, never whole.

    entropy_with_gradient   three matmuls: a chunk's logits; from them, in place and by the logits' own operator, their
                            gradient; from that the chunk's gradient of hidden and its part of the weight's. The
                            backward only hands these on, scaled in place where the upstream gradient is not 1.
    row_statistics          one matmul; its backward makes the logits again, three matmuls. Saved between: the operands
                            and (5, rows).

The gradients of weight and bias are summed in float32 over all chunks and rounded once. Those of 16-bit hidden states
come from float32 products and are rounded once, too. The scratch is one chunk's logits, and what softcap or another
dtype of the logits adds, allocated once a call; and a few times a chunk's hidden states.

Masked rows are left out of the matmuls where the host can see the mask, on the CPU. Elsewhere to know their number
would be a synchronisation, and shapes that depend on it could not be captured in a graph: the matmuls run at full size,
over zeros in the masked rows, which the kernels do not read.

With `grad_tolerance` > 0, a row all of whose entries of the logits' gradient are no larger than it is left out of both
matmuls, and so is a column that is so in all rows of its chunk; what is left is gathered. How much that is has to be
known, on a GPU at the price of a synchronisation a chunk. Single columns rather than groups of them: in 512 tokens of
a real model's own completions at temperature 0.5, entries above 1e-6 lie in 6 % of the columns, but in 79 % of the
groups of 64.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from em_kernels.ops import operators
from em_kernels.ops.operators import (
    implementation,
    must_trace,
    new_row_statistics,
    refuse_batched,
    refuse_transforms,
    statistics_dtype,
)

# Measured on the CPU, 640 tokens of SmolLM2-135M's head: with a tenth of the columns the two matmuls take 0.15 of their
# time, gathers included, with half 0.53, with three quarters 0.79. A GPU's gathers cost more of its matmuls' time.
_LARGEST_SHARE_WORTH_COMPACTING = 0.5
# The most that is gathered at a time of the gradient, of the weight, and of the weight's gradient each.
_GATHERED_BYTES = 32 << 20
# Rows of a chunk are a multiple of this where there are as many: the tiles of matmul kernels.
ROWS = 128
# A row of the scratch starts at a multiple of this many elements, so that matmul kernels find it aligned.
_ALIGNED = 64
# Vocabulary columns converted to float32 at a time where the device has no matmul of 16-bit operands with a float32
# result, the CPU: 4096 x 576 are 9 MB.
_CONVERTED_COLUMNS = 4096

RowIndex = slice | Tensor


class Head(NamedTuple):
    """How logits are made from hidden states: softcap * tanh((hidden @ weight.T + bias) / softcap)."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    float32_logits: bool

    def logits_dtype(self) -> torch.dtype:
        return statistics_dtype(self.weight.dtype) if self.float32_logits else self.weight.dtype

    def bytes_per_token(self) -> int:
        """A token's logits, softcap's slope, the gradient rounded to other bits; its hidden state and its products."""
        logits = self.logits_dtype().itemsize
        rounded = 0 if self.logits_dtype() == self.weight.dtype else self.weight.element_size()
        vocab, dim = self.weight.shape
        products = dim * 2 * (statistics_dtype(self.weight.dtype).itemsize + self.weight.element_size())
        return vocab * (logits * (1 if self.softcap is None else 2) + rounded) + products


class Needs(NamedTuple):
    """Which gradients are wanted."""

    hidden: bool
    weight: bool
    bias: bool


class Gradients(NamedTuple):
    """Those that are wanted; empty where not."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor


def entropy_with_gradient(
    hidden: Tensor,
    head: Head,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    count: int,
    row_temperature: Tensor | None,
    temperature: float,
    *,
    chunk_size: int,
    grad_tolerance: float,
    needs: Needs,
    backend: str,
) -> Tensor:
    """The sum over rows of weight / divisor / count * H, a scalar, with the gradients made on the way."""
    arguments = (
        *(hidden, *head, row_weight, divisor, count, row_temperature, temperature),
        *(chunk_size, grad_tolerance, *needs, backend),
    )
    if must_trace(hidden) or must_trace(head.weight):
        return _entropy_with_gradient_op(*arguments)[0]
    return _EntropyWithGradient.apply(*arguments)


def row_statistics(
    hidden: Tensor,
    head: Head,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None = None,
    *,
    varentropy: bool = False,
    chunk_size: int,
    grad_tolerance: float = 0.0,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Entropy, lse, log-probability of the target and varentropy per row; the last two empty where not asked for."""
    refuse_transforms()
    return _row_statistics_op(
        hidden, *head, mask, row_temperature, temperature, target, varentropy, chunk_size, grad_tolerance, backend
    )[:4]


# -------------------------------------------------------------------------------------------------- the chunk loops


def _without_autocast(function: Callable[..., Any]) -> Callable[..., Any]:
    """Operands have been cast by now; a matmul that is to have a float32 result must not be cast again."""

    @functools.wraps(function)
    def outside(hidden: Tensor, *arguments: Any) -> Any:
        with torch.autocast(hidden.device.type, enabled=False):
            return function(hidden, *arguments)

    return outside


@_without_autocast
def _entropy_and_gradients(
    hidden: Tensor,
    head: Head,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    count: int,
    row_temperature: Tensor | None,
    temperature: float,
    chunk_size: int,
    grad_tolerance: float,
    needs: Needs,
    backend: str,
) -> tuple[Tensor, Gradients]:
    kernels = implementation(backend)
    chunks = _Chunks(hidden, head, None if row_weight is None else row_weight != 0, chunk_size)
    totals = _Totals(hidden, head, needs)
    loss = hidden.new_zeros((), dtype=statistics_dtype(hidden.dtype))
    # The divisor comes last: before it the gradient of a mean is no smaller than that of a sum, which float16 can hold.
    scale = torch.full_like(loss, 1.0 / count)
    if divisor is not None:
        scale = scale / torch.where(divisor == 0, 1, divisor)
    tolerance: float | Tensor = grad_tolerance
    if hidden.dtype == torch.float16 and row_weight is not None and row_weight.is_floating_point() and len(hidden) > 0:
        # Nor may the weights take it out of float16's range: the largest of them comes last, too.
        largest = row_weight.amax()
        largest = torch.where(largest == 0, 1, largest)
        row_weight, scale, tolerance = row_weight / largest, scale * largest, grad_tolerance / largest
    for index, h in chunks:
        z, slope = chunks.logits(h)
        weight, tau = (None if x is None else x[index] for x in (row_weight, row_temperature))
        loss += kernels.entropy_with_gradient(z[None], weight, None, 1, tau, temperature, z[None])
        totals.add(index, h, _through_softcap(z, slope), scale, tolerance if grad_tolerance > 0 else None)
    return loss * scale, totals.scaled(scale)


@_without_autocast
def _statistics(
    hidden: Tensor,
    head: Head,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None,
    varentropy: bool,
    chunk_size: int,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    kernels = implementation(backend)
    chunks = _Chunks(hidden, head, mask, chunk_size)
    results = new_row_statistics(hidden, len(hidden), target, varentropy)
    for result in results:
        result.zero_()
    for index, h in chunks:
        z, _ = chunks.logits(h, with_slope=False)
        kept, tau, t = (None if x is None else x[index] for x in (mask, row_temperature, target))
        parts = kernels.row_statistics(z[None], kept, tau, temperature, t, varentropy)
        for result, part in zip(results, parts, strict=True):
            if result.numel() > 0:
                result[..., index] = part
    return results


@_without_autocast
def _gradients_of_statistics(
    hidden: Tensor,
    head: Head,
    saved: Tensor,
    varentropy: Tensor,
    target: Tensor | None,
    upstream: tuple[Tensor | None, ...],
    chunk_size: int,
    grad_tolerance: float,
    needs: Needs,
    backend: str,
) -> Gradients:
    kernels = implementation(backend)
    chunks = _Chunks(hidden, head, saved[3] != 0, chunk_size)
    totals = _Totals(hidden, head, needs)
    tolerance = None
    if grad_tolerance > 0 and len(hidden) > 0:
        # Of the entropies' gradients before they are multiplied, as that of a mean is.
        of_kept = [g.masked_fill(saved[3] == 0, 0).abs().amax() for g in upstream if g is not None]
        tolerance = grad_tolerance * torch.stack(of_kept).amax()
    for index, h in chunks:
        z, slope = chunks.logits(h)
        t, *grads = (None if x is None else x[index].contiguous() for x in (target, *upstream))
        variance = varentropy[index] if varentropy.numel() > 0 else varentropy
        kernels.row_gradient(z[None], saved[:, index].contiguous(), variance, t, *grads, z[None])
        totals.add(index, h, _through_softcap(z, slope), None, tolerance)
    return totals.scaled(None)


class _Chunks:
    """The chunks of the rows that count, and the memory their logits are made in."""

    def __init__(self, hidden: Tensor, head: Head, kept: Tensor | None, chunk_size: int) -> None:
        self.hidden, self.head, self.kept = hidden, head, kept
        self.rows = kept.nonzero().squeeze(-1) if kept is not None and operators.host_sees(kept) else None
        self.count = len(hidden) if self.rows is None else len(self.rows)
        # Equal chunks rather than a small last one.
        size = -(-self.count // max(1, -(-self.count // chunk_size)))
        whole = -(-size // ROWS) * ROWS
        self.size = max(1, min(whole, self.count) if whole <= chunk_size else size)
        self._logits: Tensor | None = None
        self._slope: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[RowIndex, Tensor]]:
        for start in range(0, self.count, self.size):
            if self.rows is not None:
                index: RowIndex = self.rows[start : start + self.size]
                yield index, self.hidden[index]
                continue
            index = slice(start, min(start + self.size, self.count))
            h = self.hidden[index]
            # Garbage times a gradient of 0 would be NaN in the gradient of the weight.
            yield index, h if self.kept is None else h.masked_fill(~self.kept[index].unsqueeze(-1), 0)

    def logits(self, h: Tensor, *, with_slope: bool = True) -> tuple[Tensor, Tensor | None]:
        """Those of a chunk, and their derivative by what softcap was given; both overwritten by the next chunk's."""
        weight, bias, softcap, _ = self.head
        vocab = weight.shape[0]
        if self._logits is None:
            self._logits = h.new_empty(self.size, -(-vocab // _ALIGNED) * _ALIGNED, dtype=self.head.logits_dtype())
        z = self._logits[: len(h), :vocab]
        _matmul(h, weight.t(), out=z)
        if bias is not None:
            z += bias
        if softcap is None:
            return z, None
        torch.tanh(z.div_(softcap), out=z)
        slope = None
        if with_slope:
            if self._slope is None:
                self._slope = torch.empty_like(self._logits)
            slope = torch.mul(z, z, out=self._slope[: len(h), :vocab]).neg_().add_(1)
        return z.mul_(softcap), slope


class _Totals:
    """The gradients as they are summed over chunks, from each chunk's gradient of the logits."""

    def __init__(self, hidden: Tensor, head: Head, needs: Needs) -> None:
        self.head, self.needs = head, needs
        self.gradients = _new_gradients(hidden, head, needs)
        for gradient in self.gradients:
            gradient.zero_()
        # Summed where they are returned, if that is not too narrow.
        summed = statistics_dtype(hidden.dtype)
        self.weight = self.gradients.weight.to(summed) if needs.weight else None
        self.bias = self.gradients.bias.to(summed) if needs.bias else None
        self._rounded: Tensor | None = None

    def add(
        self, index: RowIndex, h: Tensor, gradient: Tensor, scale: Tensor | None, tolerance: float | Tensor | None
    ) -> None:
        if self.bias is not None:
            self.bias += gradient.sum(dim=0, dtype=self.bias.dtype)
        if not (self.needs.hidden or self.needs.weight):
            return
        active = None if tolerance is None else _active(gradient, tolerance)
        if active is None:
            if gradient.dtype != h.dtype:
                if self._rounded is None:
                    self._rounded = torch.empty_like(gradient, dtype=h.dtype)
                gradient = self._rounded[: len(h)].copy_(gradient)
            if self.needs.hidden:
                self._put(index, _float32_product(gradient, self.head.weight), scale)
            if self.weight is not None:
                _add_transposed_product(self.weight, gradient, h)
            return

        rows, columns = active
        h = h[rows]
        product = h.new_zeros(h.shape, dtype=statistics_dtype(h.dtype))
        # No more at a time than a quarter of the chunk's logits, however small a chunk was asked for.
        gathered = min(_GATHERED_BYTES, gradient.numel() * gradient.element_size() // 4)
        for part in columns.split(max(1, gathered // (4 * max(*h.shape, 1)))):
            block = gradient[rows.unsqueeze(-1), part].to(h.dtype)
            if self.needs.hidden:
                product += _float32_product(block, self.head.weight[part])
            if self.weight is not None:
                total = self.weight[part]
                _add_transposed_product(total, block, h)
                self.weight[part] = total
        if self.needs.hidden:
            self._put(index.start + rows if isinstance(index, slice) else index[rows], product, scale)

    def _put(self, index: RowIndex, product: Tensor, scale: Tensor | None) -> None:
        self.gradients.hidden[index] = (product if scale is None else product.mul_(scale)).to(
            self.gradients.hidden.dtype
        )

    def scaled(self, scale: Tensor | None) -> Gradients:
        for total, gradient in ((self.weight, self.gradients.weight), (self.bias, self.gradients.bias)):
            if total is not None:
                scaled = total if scale is None else total.mul_(scale)
                if scaled is not gradient:
                    gradient.copy_(scaled)
        return self.gradients


def _active(gradient: Tensor, tolerance: float | Tensor) -> tuple[Tensor, Tensor] | None:
    """The rows and columns with an entry above the tolerance or NaN; None where they are too many to leave any out."""
    rows, columns = (~_within(gradient, dim, tolerance) for dim in (1, 0))
    # Both counts in one transfer; nonzero() would wait for the device once more each.
    row_count, column_count = torch.stack((rows.sum(), columns.sum())).tolist()
    if row_count * column_count > _LARGEST_SHARE_WORTH_COMPACTING * gradient.numel():
        return None
    return _places(rows, row_count), _places(columns, column_count)


def _places(flags: Tensor, count: int) -> Tensor:
    """Where the `count` True flags are, in order."""
    return flags.to(torch.uint8).argsort(descending=True, stable=True)[:count]


def _within(gradient: Tensor, dim: int, tolerance: float | Tensor) -> Tensor:
    # Without |gradient| in memory; on the CPU, seven times faster than torch.aminmax. In float32, since a comparison
    # with 16 bits rounds the tolerance.
    lowest, highest = (x.to(statistics_dtype(x.dtype)) for x in (gradient.amin(dim), gradient.amax(dim)))
    return (lowest >= -tolerance) & (highest <= tolerance)


def _through_softcap(gradient: Tensor, slope: Tensor | None) -> Tensor:
    return gradient if slope is None else gradient.mul_(slope)


def _new_gradients(hidden: Tensor, head: Head, needs: Needs) -> Gradients:
    """float32 for float16, in which a mean's gradient underflows until a loss scale has multiplied it."""
    dtype = torch.float32 if hidden.dtype == torch.float16 else hidden.dtype
    weight = head.weight
    return Gradients(
        hidden.new_empty(hidden.shape if needs.hidden else (0,), dtype=dtype),
        weight.new_empty(weight.shape if needs.weight else (0,), dtype=dtype),
        weight.new_empty(weight.shape[0] if needs.bias else 0, dtype=dtype),
    )


# -------------------------------------------------------------------------------------- matmuls that keep their float32


def _has_float32_output(operand: Tensor) -> bool:
    """Whether torch.mm multiplies 16-bit operands to a float32 result here. Not every ROCm build does."""
    return operand.device.type == "cuda" and torch.version.hip is None


def _matmul(a: Tensor, b: Tensor, *, out: Tensor) -> None:
    """a @ b in out's dtype, which may be float32 where the operands' is not."""
    if out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif _has_float32_output(a):
        torch.mm(a, b, out_dtype=out.dtype, out=out)
    else:
        wide = a.to(out.dtype)
        for start in range(0, b.shape[1], _CONVERTED_COLUMNS):
            columns = slice(start, start + _CONVERTED_COLUMNS)
            out[:, columns] = wide @ b[:, columns].to(out.dtype)


def _float32_product(gradient: Tensor, weight: Tensor) -> Tensor:
    """gradient @ weight, (rows, V) by (V, D), not rounded to 16 bits."""
    dtype = statistics_dtype(gradient.dtype)
    if gradient.dtype == dtype:
        return gradient @ weight
    if _has_float32_output(gradient):
        return torch.mm(gradient, weight, out_dtype=dtype)
    product = gradient.new_zeros(len(gradient), weight.shape[1], dtype=dtype)
    for columns in range(0, len(weight), _CONVERTED_COLUMNS):
        part = slice(columns, columns + _CONVERTED_COLUMNS)
        product.addmm_(gradient[:, part].to(dtype), weight[part].to(dtype))
    return product


def _add_transposed_product(total: Tensor, gradient: Tensor, h: Tensor) -> None:
    """Adds gradient.T @ h, (V, rows) by (rows, D), to the float32 total."""
    if gradient.dtype == total.dtype:
        total.addmm_(gradient.t(), h)
    elif _has_float32_output(gradient):
        torch.addmm(total, gradient.t(), h, out_dtype=total.dtype, out=total)
    else:
        wide = h.to(total.dtype)
        for columns in range(0, len(total), _CONVERTED_COLUMNS):
            part = slice(columns, columns + _CONVERTED_COLUMNS)
            total[part].addmm_(gradient[:, part].to(total.dtype).t(), wide)


# --------------------------------------------------------------------------------------------- the registered operators


def _entropy_with_gradient(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    float32_logits: bool,
    row_weight: Tensor | None,
    divisor: Tensor | None,
    count: int,
    row_temperature: Tensor | None,
    temperature: float,
    chunk_size: int,
    grad_tolerance: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    loss, gradients = _entropy_and_gradients(
        hidden,
        Head(weight, bias, softcap, float32_logits),
        row_weight,
        divisor,
        count,
        row_temperature,
        temperature,
        chunk_size,
        grad_tolerance,
        Needs(needs_hidden, needs_weight, needs_bias),
        backend,
    )
    return loss, *gradients


_entropy_with_gradient_op = torch.library.custom_op(
    "em_kernels::linear_entropy_with_gradient", _entropy_with_gradient, mutates_args=()
)


@_entropy_with_gradient_op.register_fake
def _(hidden, weight, bias, softcap, float32_logits, *rest):
    needs = Needs(*rest[-4:-1])
    head = Head(weight, bias, softcap, float32_logits)
    return hidden.new_empty((), dtype=statistics_dtype(hidden.dtype)), *_new_gradients(hidden, head, needs)


@torch.library.custom_op("em_kernels::linear_row_statistics", mutates_args=())
def _row_statistics_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    float32_logits: bool,
    mask: Tensor | None,
    row_temperature: Tensor | None,
    temperature: float,
    target: Tensor | None,
    varentropy: bool,
    chunk_size: int,
    grad_tolerance: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fifth result is what backward needs of each row, as in `operators`."""
    head = Head(weight, bias, softcap, float32_logits)
    return _statistics(hidden, head, mask, row_temperature, temperature, target, varentropy, chunk_size, backend)


@_row_statistics_op.register_fake
def _(hidden, weight, bias, softcap, float32_logits, mask, row_temperature, temperature, target, varentropy, *_):
    return new_row_statistics(hidden, hidden.shape[0], target, varentropy)


@torch.library.custom_op("em_kernels::linear_row_gradient", mutates_args=())
def _row_gradient_op(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    float32_logits: bool,
    saved: Tensor,
    varentropy: Tensor,
    target: Tensor | None,
    grad_entropy: Tensor | None,
    grad_lse: Tensor | None,
    grad_logprob: Tensor | None,
    grad_varentropy: Tensor | None,
    chunk_size: int,
    grad_tolerance: float,
    needs_hidden: bool,
    needs_weight: bool,
    needs_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients_of_statistics(
        hidden,
        Head(weight, bias, softcap, float32_logits),
        saved,
        varentropy,
        target,
        (grad_entropy, grad_lse, grad_logprob, grad_varentropy),
        chunk_size,
        grad_tolerance,
        Needs(needs_hidden, needs_weight, needs_bias),
        backend,
    )


@_row_gradient_op.register_fake
def _(hidden, weight, bias, softcap, float32_logits, *rest):
    return tuple(_new_gradients(hidden, Head(weight, bias, softcap, float32_logits), Needs(*rest[-4:-1])))


# ------------------------------------------------------------------------------------------------------------- autograd


class _EntropyWithGradient(torch.autograd.Function):
    """The eager call: the gradients are its own, to be scaled in place."""

    @staticmethod
    def forward(ctx, *arguments):
        loss, *gradients = _entropy_with_gradient(*arguments)
        _setup_entropy_with_gradient(ctx, arguments, (loss, *gradients))
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        refuse_batched(grad_loss)
        gradients = ctx.saved_tensors
        if torch._C._autograd._get_current_graph_task_keep_graph():
            gradients = [gradient.clone() for gradient in gradients]
        scale_ = implementation(ctx.backend).scale_
        for gradient in gradients:
            if gradient.numel() > 0:
                scale_(gradient.view(1, -1, gradient.shape[-1]), grad_loss)
        return _spread(ctx, gradients)


def _setup_entropy_with_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    *_, ctx.needs_hidden, ctx.needs_weight, ctx.needs_bias, ctx.backend = inputs
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(*output[1:])


def _setup_traced_entropy_with_gradient(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    ctx.mark_non_differentiable(*output[1:])
    _setup_entropy_with_gradient(ctx, inputs, output)


@once_differentiable
def _backward_entropy_with_gradient(ctx: Any, grad_loss: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    return _spread(ctx, [gradient * grad_loss for gradient in ctx.saved_tensors])


def _spread(ctx: Any, gradients: Any) -> tuple[Tensor | None, ...]:
    """A gradient for each argument of the operator, of which hidden, weight and bias come first."""
    needs = (ctx.needs_hidden, ctx.needs_weight, ctx.needs_bias)
    wanted = [gradient.to(ctx.dtype) if needed else None for gradient, needed in zip(gradients, needs, strict=True)]
    return (*wanted, *[None] * (len(ctx.needs_input_grad) - len(wanted)))


def _setup_row_statistics(ctx: Any, inputs: tuple, output: tuple[Tensor, ...]) -> None:
    hidden, weight, bias, *ctx.head, _, _, _, target, _, ctx.chunk_size, ctx.grad_tolerance, ctx.backend = inputs
    *_, varentropy, saved = output
    ctx.mark_non_differentiable(saved)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(hidden, weight, bias, saved, varentropy, target)


@once_differentiable
def _backward_row_statistics(ctx: Any, *upstream: Tensor | None) -> tuple[Tensor | None, ...]:
    refuse_batched(*upstream)
    hidden, weight, bias, saved, varentropy, target = ctx.saved_tensors
    # A statistic that was not asked for is empty, and so is its gradient.
    upstream = tuple(None if g is None or g.numel() == 0 else g for g in upstream[:4])
    ctx.needs_hidden, ctx.needs_weight, ctx.needs_bias = needs = ctx.needs_input_grad[:3]
    ctx.dtype = hidden.dtype
    options = (ctx.chunk_size, ctx.grad_tolerance, *needs, ctx.backend)
    return _spread(
        ctx, _row_gradient_op(hidden, weight, bias, *ctx.head, saved, varentropy, target, *upstream, *options)
    )


_entropy_with_gradient_op.register_autograd(
    _backward_entropy_with_gradient, setup_context=_setup_traced_entropy_with_gradient
)
_row_statistics_op.register_autograd(_backward_row_statistics, setup_context=_setup_row_statistics)
