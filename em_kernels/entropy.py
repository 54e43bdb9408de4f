"""entropy_loss: the token-level entropy of softmax(logits / temperature), reduced, with a fused gradient."""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from em_kernels.arguments.checks import check_logits, choose_backend
from em_kernels.arguments.inplace import check_inplace
from em_kernels.arguments.reduction import divisor_of, reduced
from em_kernels.arguments.sharding import group_of, local_divisor, local_logits, local_per_token
from em_kernels.arguments.tokens import Source, tokens_of
from em_kernels.ops import logits as operators
from em_kernels.ops.autograd import is_traced
from em_kernels.ops.sharded import Place
from em_kernels.ops.types import Wanted, rows_of_logits


def entropy_loss(
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    reduction: str = "mean",
    num_items_in_batch: int | Tensor | None = None,
    inplace_backward: bool = False,
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """Token-level entropy of a language model's predictions, the loss of one-shot entropy minimisation.

    With p = softmax(logits / tau) and H = -sum_j p_j log p_j of each token, in nats, "mean" is sum(w H) / sum(w)
    (arXiv 2505.20282, equation 2) and its gradient dH/dz_j = -(1/tau) p_j (log p_j + H).

    Args:
        logits: (..., V), float32, bfloat16, float16 or (backend "torch") float64; any strides. A DTensor that is
            sharded along the vocabulary is worked on in parts, one that is sharded along the tokens gives each rank the
            loss of its own tokens, for which "mean" needs num_items_in_batch.
        mask: (...), bool or integer (0 marks a token that does not count, a positive number one that does), or float:
            the weight w of each token, at least 0. A token of weight 0 is not read: whatever it holds, its gradient is
            0. A negative entry raises where the host sees it, on the CPU outside torch.compile, and gives NaN
            elsewhere. None counts every token.
        temperature: tau > 0, a float or a tensor that broadcasts to logits.shape[:-1]. No gradient flows to it. Where
            the host cannot see it, one that is not positive gives NaN.
        reduction: "mean", "sum" = sum(w H), or "none" = w H. A mean over no tokens is 0 with a gradient of 0.
        num_items_in_batch: an int or a tensor of one element that replaces sum(w) as the divisor of "mean", for
            micro-batches of a batch of that many tokens; 0 leaves the sum.
        inplace_backward: write the gradient into the memory of `logits`, which then hold no logits any more: from this
            call on with "mean" and "sum", from backward on with "none", with float16 and with a sharded vocabulary.
            Under torch.compile the gradient gets memory of its own all the same.
        process_group: the ranks that share the vocabulary: `logits` hold this rank's columns, in rank order, and every
            other argument is the same on all of them. Every rank gets the same loss.
        backend: "triton", "native", "torch", or None to choose by the logits' device and dtype.

    Returns:
        float32 (float64 for float64 logits): a scalar, or shape (...) with "none".

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: a gradient of the gradient, a forward-mode derivative or a torch.func transform is asked for.

    Memory traffic: "mean" and "sum" write the gradient in the forward, two passes over memory, and save only it;
    "none" reads in the forward and reads and writes in the backward, and saves the logits. So do "mean" and "sum" of
    float16, whose gradient underflows unless it is made after the loss scale is known, and of a sharded vocabulary.
    Where no gradient is recorded, every reduction only reads.
    """
    logits, shard, layout = local_logits(logits, process_group)
    check_logits(logits, sharded=shard is not None)
    source = Source("logits", logits, logits.shape[:-1])
    mask, temperature = local_per_token(layout, mask=mask, temperature=temperature)
    tokens = tokens_of(source, mask, temperature)
    num_items_in_batch = local_divisor(reduction, num_items_in_batch, layout)
    divisor = divisor_of(reduction, num_items_in_batch, tokens, source)
    backend = choose_backend(backend, logits.device, logits.dtype)

    needs_grad = logits.requires_grad and torch.is_grad_enabled()
    in_place = inplace_backward and needs_grad and not is_traced(logits)
    if in_place:
        check_inplace(logits)
    # The gradient of float16 logits underflows unless it is made after the loss scale is known.
    if reduction != "none" and shard is None and not (needs_grad and logits.dtype == torch.float16):
        return operators.entropy_with_gradient(
            logits,
            tokens.token_weight,
            divisor,
            tokens.temperature,
            backend,
            needs_gradient=needs_grad,
            inplace_backward=in_place,
        )
    place = Place(backend, group_of(shard))
    statistics = operators.row_statistics(
        rows_of_logits(logits), tokens.kept, tokens.temperature, None, Wanted(), place, inplace_backward=in_place
    )
    return reduced(statistics.entropy, reduction, divisor, tokens)


class EntropyLoss(nn.Module):
    """`entropy_loss` as a module: it holds the options, and its forward takes the tensors and what changes by call."""

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
        self,
        logits: Tensor,
        mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
        process_group: "dist.ProcessGroup | None" = None,
    ) -> Tensor:
        return entropy_loss(
            logits,
            mask,
            temperature=self.temperature,
            reduction=self.reduction,
            num_items_in_batch=num_items_in_batch,
            inplace_backward=self.inplace_backward,
            process_group=process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, backend={self.backend!r}"
