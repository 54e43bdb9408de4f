"""linear_entropy_loss: the entropy loss from hidden states and the output projection, without the logits."""

import torch
from torch import Tensor, nn
from torch import distributed as dist

from em_kernels.arguments.projection import chunking_of, operands_of
from em_kernels.arguments.reduction import divisor_of, reduced
from em_kernels.arguments.sharding import local_divisor, local_per_token
from em_kernels.arguments.tokens import tokens_of
from em_kernels.ops.hidden import registered as operators
from em_kernels.ops.types import Wanted


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
    token_count: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """Token-level entropy of softmax(hidden @ weight.T / temperature), without ever holding the logits.

    The value and gradients of `entropy_loss(hidden @ weight.T, mask)`, a chunk of tokens at a time. "mean" and "sum"
    make the gradients in the forward: three matmuls in all. "none" makes the logits again in the backward: four.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or (backend "torch") float64: what the output projection is given.
            A DTensor that is sharded along the tokens gives each rank the loss of its own tokens, for which "mean"
            needs num_items_in_batch.
        weight: (V, D), of hidden's dtype: the output projection. Under torch.autocast both are cast to its dtype. A
            DTensor that is sharded along the rows, beside hidden states that are the same on every rank, is worked on
            in parts; beside tokens of each rank's own, it is gathered.
        mask: (...), bool or integer (0 marks a token that does not count, a positive number one that does), or float:
            the weight w of each token, at least 0. A token of weight 0 is not read and its gradient is 0; on the CPU it
            is left out of the matmuls, on other devices it takes its time all the same unless token_count is given. A
            negative entry raises where the host sees it, on the CPU outside torch.compile, and gives NaN elsewhere.
            None counts every token.
        bias: (V,), of hidden's dtype, added to the logits.
        softcap: c > 0: logits become c tanh(logits / c).
        temperature: tau > 0, a float or a tensor that broadcasts to hidden.shape[:-1]. No gradient flows to it.
        reduction: "mean" = sum(w H) / sum(w), "sum" = sum(w H), or "none" = w H. A mean over no tokens is 0.
        num_items_in_batch: an int or a tensor of one element that replaces sum(w) as the divisor of "mean"; 0 leaves
            the sum.
        chunk_size: tokens whose logits, or the gradient of these, are held at a time, the same on every rank that
            shares the vocabulary; None takes what fits into the scratch memory (below), and 512 with a sharded
            vocabulary.
        grad_tolerance: entries of the logits' gradient, before the division by sum(w), that may be left out of the
            gradients; see below. 0 leaves out nothing.
        logits_dtype: None and torch.float32 keep the float32 result of a 16-bit matmul unrounded. The dtype of 16-bit
            hidden states rounds it, for half to two thirds of the memory of a chunk and an error of some per cent in
            both gradients.
        token_count: the number of this rank's tokens whose mask is not 0, where the caller knows it as an int: a GPU
            then leaves masked tokens out of the matmuls, too, without a synchronisation. A wrong count raises where the
            host sees the mask, and makes NaN of the result elsewhere.
        process_group: the ranks that share the vocabulary: `weight` and `bias` hold this rank's rows, in rank order,
            and every other argument is the same on all of them. Every rank gets the same loss and the whole gradient of
            hidden. The backward of "none" is a collective: every rank must run it, with the same upstream gradient.
        backend: "triton", "native", "torch", or None to choose by hidden's device and dtype.

    Returns:
        float32 (float64 for float64 hidden): a scalar, or shape (...) with "none".

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: a gradient of the gradient, a forward-mode derivative or a torch.func transform is asked for.

    Memory, in bytes, beyond the operands and their gradients: for a chunk of T tokens 4 T (V + D), or with logits_dtype
    of 16 bits T (2 V + 4 D). A GPU makes float32 logits of 16-bit operands in parts of a chunk: T (2 V + 4 D) + 4 V
    max(256, T / 4), or T (6 V + 4 D) for fewer than 256 tokens and for a sharded vocabulary. T is such that this is at
    most 512 MiB or, where that is more, 4 V D for a weight that needs a gradient, and on the CPU 128 MiB. 16-bit
    operands add 4 V D for the float32 sum that the weight's gradient is rounded from. grad_tolerance gathers up to 96
    MiB, on a GPU out of these. A mask adds a copy of hidden, and where masked tokens are left out of the matmuls, one
    of hidden's gradient.

    What `grad_tolerance` bounds: with G the logits' gradient before the division by S (sum(w) for "mean", 1 otherwise),
    every entry left out has |G_ij| <= grad_tolerance, since whole rows and columns of a chunk are left out, and only
    where all their entries are that small. The gradient of hidden is G weight / S, that of weight G.T hidden / S; what
    they lack is the same product of the entries left out, so that, entry by entry and u times an upstream gradient u,

        |error of hidden.grad[i, k]| <= grad_tolerance / S * sum_j |weight[j, k]|
        |error of weight.grad[j, k]| <= grad_tolerance / S * sum_i |hidden[i, k]|

    With "none", u is the largest |w * upstream gradient| of a token. Neither the loss nor the gradient of bias lacks
    anything. On a GPU the number of rows and columns left costs a synchronisation a chunk. Nothing is left out of a
    chunk where more than half of it would stay.
    """
    operands = operands_of(
        hidden, weight, bias, softcap=softcap, logits_dtype=logits_dtype, process_group=process_group
    )
    source, layout = operands.source, operands.layout
    mask, temperature = local_per_token(layout, mask=mask, temperature=temperature)
    tokens = tokens_of(source, mask, temperature)
    chunking = chunking_of(
        operands, tokens.kept, chunk_size=chunk_size, token_count=token_count, grad_tolerance=grad_tolerance
    )
    num_items_in_batch = local_divisor(reduction, num_items_in_batch, layout)
    divisor = divisor_of(reduction, num_items_in_batch, tokens, source)
    place = operands.place(backend)

    trainable = (operands.rows, operands.head.weight, operands.head.bias)
    needs_grad = any(x is not None and x.requires_grad for x in trainable)
    if reduction != "none" and needs_grad and torch.is_grad_enabled():
        return operators.entropy_with_gradient(
            operands.rows, operands.head, tokens.token_weight, divisor, tokens.temperature, chunking, place
        )
    statistics = operators.row_statistics(
        operands.rows, operands.head, tokens.kept, tokens.temperature, None, Wanted(), chunking, place
    )
    return reduced(statistics.entropy, reduction, divisor, tokens)


class LinearEntropyLoss(nn.Module):
    """`linear_entropy_loss` as a module: it holds the options, and its forward takes the tensors."""

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
        process_group: "dist.ProcessGroup | None" = None,
        token_count: int | None = None,
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
            token_count=token_count,
            process_group=process_group,
            backend=self.backend,
        )

    def extra_repr(self) -> str:
        return f"temperature={self.temperature}, reduction={self.reduction!r}, backend={self.backend!r}"
