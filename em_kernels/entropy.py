"""entropy_loss: the token-level entropy of softmax(logits / temperature), reduced, with a fused gradient."""

import torch
from torch import Tensor, nn

from em_kernels import inputs, reductions
from em_kernels.ops import operators


def entropy_loss(
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    inplace_backward: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Token-level entropy of a language model's predictions, the loss of one-shot entropy minimisation.

    With p = softmax(logits / tau) and H = -sum_j p_j log p_j of each token, in nats, "mean" is sum(w H) / sum(w)
    (arXiv 2505.20282, equation 2) and its gradient dH/dz_j = -(1/tau) p_j (log p_j + H).

    Args:
        logits: (..., V), float32, bfloat16, float16 or (backend "torch") float64; any strides.
        mask: (...), bool or integer (zero marks a token that does not count), or float: the weight w of each token, at
            least 0. A token of weight 0 is not read: whatever it holds, its gradient is 0. None counts every token.
        temperature: tau > 0, a float or a tensor that broadcasts to logits.shape[:-1]. No gradient flows to it.
        reduction: "mean", "sum" = sum(w H), or "none" = w H. A mean over no tokens is 0 with a gradient of 0.
        num_items_in_batch: an int or 0-d tensor that replaces sum(w) as the divisor of "mean", for micro-batches of a
            batch of that many tokens; 0 leaves the sum.
        inplace_backward: write the gradient into the memory of `logits`, which then hold no logits any more: from this
            call on with "mean" and "sum", from backward on with "none" and with float16. Under torch.compile the
            gradient gets memory of its own all the same.
        backend: "triton", "torch", or None to choose by the logits' device and dtype.

    Returns:
        float32 (float64 for float64 logits): a scalar, or shape (...) with "none".

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    Memory traffic: "mean" and "sum" write the gradient in the forward, two passes over memory, and save only it;
    "none" reads in the forward and reads and writes in the backward, and saves the logits. So do "mean" and "sum" of
    float16, whose gradient underflows unless it is made after the loss scale is known.
    """
    inputs.check_logits(logits)
    reductions.check_reduction(reduction, num_items_in_batch)
    backend = inputs.choose_backend(backend, logits)
    weight = None if mask is None else inputs.flatten_mask(mask, logits)
    rows, (row_temperature, common_temperature) = (
        inputs.flatten_logits(logits),
        inputs.flatten_temperature(temperature, logits),
    )

    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    writes_in_place = inplace_backward and needs_grad and not operators.must_trace(logits)
    if writes_in_place and _overlaps(logits):
        raise ValueError(
            "inplace_backward needs logits whose elements have memory of their own, "
            f"given logits of shape {tuple(logits.shape)} and strides {logits.stride()}"
        )
    if writes_in_place and rows.data_ptr() != logits.data_ptr():
        raise ValueError(
            "inplace_backward needs logits with a contiguous last dimension and at most two strides between tokens, "
            f"given logits of shape {tuple(logits.shape)} and strides {logits.stride()}"
        )
    divisor, count = reductions.divisor_of(reduction, logits, weight, num_items_in_batch)

    if reduction != "none" and needs_grad and logits.dtype != torch.float16:
        return operators.entropy_with_gradient(
            rows,
            weight,
            divisor,
            count,
            row_temperature,
            common_temperature,
            backend=backend,
            inplace_backward=inplace_backward,
        )

    entropy, *_ = operators.row_statistics(
        rows,
        weight if weight is None else weight != 0,
        row_temperature,
        common_temperature,
        backend=backend,
        inplace_backward=inplace_backward,
    )
    return reductions.reduce(entropy, weight, divisor, count, reduction, logits.shape[:-1])


class EntropyLoss(nn.Module):
    """`entropy_loss` as a module: the options are set once, `forward(logits, mask, num_items_in_batch)` is called."""

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        reduction: str = "mean",
        inplace_backward: bool = False,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        self.temperature = temperature
        self.reduction = reduction
        self.inplace_backward = inplace_backward
        self.backend = backend

    def forward(
        self, logits: Tensor, mask: Tensor | None = None, num_items_in_batch: int | Tensor | None = None
    ) -> Tensor:
        return entropy_loss(
            logits,
            mask,
            temperature=self.temperature,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
            inplace_backward=self.inplace_backward,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, backend={self.backend!r}"


def _overlaps(logits: Tensor) -> bool:
    """Whether elements may share memory, as those of an expanded tensor do."""
    reach = 1
    for stride, size in sorted((stride, size) for size, stride in zip(logits.shape, logits.stride(), strict=True)):
        if size > 1 and stride < reach:
            return True
        reach = max(reach, stride * size)
    return False
