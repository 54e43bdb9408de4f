"""linear_entropy_loss: the entropy loss from hidden states and the output projection, without the logits."""

from typing import Any

import torch
from torch import Tensor, nn

from em_kernels import heads, inputs, reductions
from em_kernels.ops import linear


def linear_entropy_loss(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    chunk_size: int | None = None,
    grad_tolerance: float = 0.0,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Token-level entropy of softmax(hidden @ weight.T / temperature), without ever holding the logits.

    The value and gradients of `entropy_loss(hidden @ weight.T, mask)`, a chunk of tokens at a time. "mean" and "sum"
    make the gradients in the forward: three matmuls in all. "none" makes the logits again in the backward: four.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or (backend "torch") float64: what the output projection is given.
        weight: (V, D), of hidden's dtype: the output projection. Under torch.autocast both are cast to its dtype.
        mask: (...), bool or integer (zero marks a token that does not count), or float: the weight w of each token, at
            least 0. A token of weight 0 is not read and its gradient is 0; on the CPU it is left out of the matmuls, on
            other devices it takes its time all the same. None counts every token.
        bias: (V,), of hidden's dtype, added to the logits.
        softcap: c > 0: logits become c tanh(logits / c). In 16 bits that rounds several times: see logits_dtype.
        temperature: tau > 0, a float or a tensor that broadcasts to hidden.shape[:-1]. No gradient flows to it.
        reduction: "mean" = sum(w H) / sum(w), "sum" = sum(w H), or "none" = w H. A mean over no tokens is 0.
        num_items_in_batch: an int or 0-d tensor that replaces sum(w) as the divisor of "mean"; 0 leaves the sum.
        chunk_size: tokens whose logits are held at a time; None takes what fits into 512 MB of scratch (on the
            CPU, 128 MB, or 224 MB with grad_tolerance).
        grad_tolerance: entries of the logits' gradient, before the division by sum(w), that may be left out of the
            gradients; see below. 0 leaves out nothing.
        logits_dtype: torch.float32 keeps the float32 result of a 16-bit matmul unrounded, for twice the scratch; None
            rounds it to hidden's dtype.
        backend: "triton", "torch", or None to choose by hidden's device and dtype.

    Returns:
        float32 (float64 for float64 hidden): a scalar, or shape (...) with "none".

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    What `grad_tolerance` bounds: with G the logits' gradient before the division by S (sum(w) for "mean", 1 otherwise),
    every entry left out has |G_ij| <= grad_tolerance, since whole rows and columns of a chunk are left out, and only
    where all their entries are that small. The gradient of hidden is G weight / S, that of weight G.T hidden / S; what
    they lack is the same product of the entries left out, so that, entry by entry and u times an upstream gradient u,

        |error of hidden.grad[i, k]| <= grad_tolerance / S * sum_j |weight[j, k]|
        |error of weight.grad[j, k]| <= grad_tolerance / S * sum_i |hidden[i, k]|

    With "none", u is the largest |w * upstream gradient| of a token. The loss and the gradient of bias are exact. On a
    GPU the number of rows and columns left costs a synchronisation a chunk. Nothing is left out of a chunk where more
    than half of it would stay.
    """
    hidden, head, chunk_size = heads.prepare(hidden, weight, bias, softcap, logits_dtype, chunk_size)
    reductions.check_reduction(reduction, num_items_in_batch)
    inputs.check_number("grad_tolerance", grad_tolerance)
    if not 0 <= grad_tolerance < float("inf"):
        raise ValueError(f"grad_tolerance is {grad_tolerance}, expected a finite number of at least 0")
    row_weight = None if mask is None else inputs.flatten_mask(mask, hidden, "hidden")
    temperatures = inputs.flatten_temperature(temperature, hidden, "hidden")
    rows = hidden.reshape(-1, hidden.shape[-1])
    options: dict[str, Any] = {
        "chunk_size": chunk_size,
        "grad_tolerance": float(grad_tolerance),
        "backend": inputs.choose_backend(backend, hidden),
    }

    needs = linear.Needs(
        *(x is not None and x.requires_grad and torch.is_grad_enabled() for x in (hidden, head.weight, head.bias))
    )
    divisor, count = reductions.divisor_of(reduction, hidden, row_weight, num_items_in_batch)
    if reduction != "none" and any(needs):
        return linear.entropy_with_gradient(
            rows, head, row_weight, divisor, count, *temperatures, needs=needs, **options
        )

    kept = None if row_weight is None else row_weight != 0
    entropy, *_ = linear.row_statistics(rows, head, kept, *temperatures, **options)
    return reductions.reduce(entropy, row_weight, divisor, count, reduction, hidden.shape[:-1])


class LinearEntropyLoss(nn.Module):
    """`linear_entropy_loss` as a module: options are set once, `forward(hidden, weight, mask)` is called."""

    def __init__(
        self,
        *,
        softcap: float | None = None,
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        chunk_size: int | None = None,
        grad_tolerance: float = 0.0,
        logits_dtype: torch.dtype | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.softcap = softcap
        self.temperature = temperature
        self.reduction = reduction
        self.chunk_size = chunk_size
        self.grad_tolerance = grad_tolerance
        self.logits_dtype = logits_dtype
        self.backend = backend

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        mask: Tensor | None = None,
        bias: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> Tensor:
        return linear_entropy_loss(
            hidden,
            weight,
            mask,
            bias=bias,
            softcap=self.softcap,
            temperature=self.temperature,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
            chunk_size=self.chunk_size,
            grad_tolerance=self.grad_tolerance,
            logits_dtype=self.logits_dtype,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, backend={self.backend!r}"
