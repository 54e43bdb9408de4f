"""verl's functions on logits and on hidden states, by verl's names and signatures: only the import changes.

The functions are those of verl 0.9.1's verl.utils.torch_functional, verl.utils.kernel.linear_cross_entropy and
verl.utils.experimental.torch_functional. verl is not imported. These differences are deliberate:

- A logit of -inf has probability 0 and contributes 0 to entropy and gradient, where verl's entropy is NaN.
- Results are float32 whatever the logits' dtype, where some of verl's are rounded to the logits' dtype. The linear
  functions keep the logits of 16-bit operands unrounded, too.
- The entropy of a row with all mass on one token is 0, never negative. verl's is a difference of two sums that cancel.
- Only columns that exist count, whatever the vocabulary and the hidden size are multiples of. verl 0.9.1's kernel takes
  hidden sizes that are multiples of 128.
- A label outside the vocabulary raises ValueError on the CPU and gives NaN on a GPU.
- `linear_cross_entropy` and `FusedLinearForPPO` also take a temperature for each token.
- Arguments that choose how verl computes a result (`inplace_backward`, `impl_backend`, and `chunk_size` of functions
  that are given logits) are accepted and change nothing: no copy of the logits is made, and the gradient is written to
  memory of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from em_kernels.entropy import entropy_loss
from em_kernels.stats import linear_token_stats, token_stats


def entropy_from_logits(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats, differentiable.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.

    Returns:
        (...), float32, or float64 for float64 logits.
    """
    return entropy_loss(logits, reduction="none")


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    """`entropy_from_logits`, which needs no chunks.

    Args:
        logits: (..., V), as in `entropy_from_logits`.
        chunk_size: has no effect.
    """
    return entropy_from_logits(logits)


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    """Log-probability of each label under softmax(logits), differentiable.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        labels: (...), integers in [0, V), or as many in another shape.
        inplace_backward: has no effect.

    Returns:
        (...), float32, or float64 for float64 logits.

    Raises:
        ValueError: a label is outside the vocabulary and the host sees it, or shapes do not match.
    """
    return _logprob(
        logits, labels.reshape(logits.shape[:-1]) if labels.numel() == logits.shape[:-1].numel() else labels
    )


def logprobs_from_logits_v2(logits: Tensor, labels: Tensor) -> Tensor:
    """`logprobs_from_logits` by the name of verl's implementation in PyTorch."""
    return _logprob(logits, labels)


def logprobs_from_logits_naive(logits: Tensor, labels: Tensor) -> Tensor:
    """`logprobs_from_logits` by the name of verl's shortest implementation."""
    return _logprob(logits, labels)


def log_probs_from_logits_response(input_ids: Tensor, logits: Tensor, response_length: int) -> Tensor:
    """Log-probabilities of the last tokens of each sequence, given the logits of all positions.

    Args:
        input_ids: (batch, time), integers in [0, V).
        logits: (batch, time, V): those at a position predict the next token.
        response_length: the number of last tokens.

    Returns:
        (batch, response_length), float32.
    """
    return _logprob(logits[:, -response_length - 1 : -1], input_ids[:, -response_length:])


def log_probs_from_logits_response_rmpad(
    input_ids: Tensor, attention_mask: Tensor, logits_rmpad: Tensor, response_length: int
) -> Tensor:
    """`log_probs_from_logits_response` of logits without padding; flash-attn is not needed.

    Args:
        input_ids: (batch, time), integers in [0, V).
        attention_mask: (batch, time); 0 marks padding.
        logits_rmpad: (attended tokens, V), in the order of the attended positions.
        response_length: the number of last tokens.

    Returns:
        (batch, response_length), float32; 0 where the position before the token is padding.
    """
    batch, time = input_ids.shape
    indices = attention_mask.flatten().nonzero().squeeze(-1)
    attended = input_ids.flatten()[indices].unsqueeze(0)
    return log_probs_from_logits_all_rmpad(attended, logits_rmpad, indices, batch, time, response_length)


def log_probs_from_logits_all_rmpad(
    input_ids_rmpad: Tensor, logits_rmpad: Tensor, indices: Tensor, batch_size: int, seqlen: int, response_length: int
) -> Tensor:
    """`log_probs_from_logits_response` of tokens and logits without padding; flash-attn is not needed.

    Args:
        input_ids_rmpad: (1, attended tokens), integers in [0, V).
        logits_rmpad: (attended tokens, V).
        indices: (attended tokens,), the place of each in the flattened (batch_size, seqlen).
        batch_size, seqlen: the shape with padding.
        response_length: the number of last tokens.

    Returns:
        (batch_size, response_length), float32; 0 where the position before the token is padding.
    """
    # The last attended position of a sequence gets the first token of the next sequence as its label. What it predicts
    # is padding, which callers mask.
    following = input_ids_rmpad.squeeze(0).roll(-1)
    logprob = _logprob(logits_rmpad, following)
    padded = logprob.new_zeros(batch_size * seqlen).index_copy(0, indices, logprob)
    return padded.view(batch_size, seqlen)[:, -response_length - 1 : -1]


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    temperature: float | Tensor = 1.0,
    reduction: str = "none",
    dist_process_group: "dist.ProcessGroup | None" = None,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities of the labels and entropies of softmax(hidden @ weight.T / temperature), without the logits.

    Args:
        hidden: (..., D), float32, bfloat16 or float16.
        weight: (V, D), of hidden's dtype; with dist_process_group, this rank's rows of it.
        labels: (...), integers in [0, V), V the size of the whole vocabulary.
        temperature: above 0, a float or a tensor of (tokens,) or (...).
        reduction: "none", "sum" or "mean": of the log-probabilities. The entropies are not reduced.
        dist_process_group: the ranks that share the vocabulary, in the order of their rows. Every rank must run the
            backward, with the same upstream gradients. As with verl's function, the caller sums hidden's gradient over
            the ranks: each gets an equal share of it.

    Returns:
        The log-probabilities, (tokens,) or a scalar, and the entropies, (tokens,), in float32.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if not isinstance(reduction, str):
        raise TypeError(f"reduction is a {type(reduction).__name__}, expected 'none', 'sum' or 'mean'")
    if reduction.lower() not in ("none", "sum", "mean"):
        raise ValueError(f"reduction is {reduction!r}, expected 'none', 'sum' or 'mean'")
    rows = hidden.reshape(-1, hidden.shape[-1])
    if dist_process_group is not None:
        rows = _ShareOfGradient.apply(rows, dist.get_world_size(dist_process_group))
    stats = linear_token_stats(
        rows,
        weight,
        labels.reshape(-1),
        temperature=temperature.reshape(-1) if isinstance(temperature, Tensor) else temperature,
        process_group=dist_process_group,
    )
    logprob = stats.logprob
    assert logprob is not None
    if reduction.lower() == "sum":
        return logprob.sum(), stats.entropy
    return logprob.mean() if reduction.lower() == "mean" else logprob, stats.entropy


class FusedLinearForPPO(nn.Module):
    """Log-probabilities and entropies of softmax(hidden_states @ vocab_weights.T / temperature), without the logits.

    Args:
        chunk_size: tokens whose logits are in memory at a time.
        impl_backend: has no effect.
    """

    def __init__(self, chunk_size: int = 512, impl_backend: str = "torch") -> None:
        super().__init__()
        self.chunk_size = chunk_size
        self.impl_backend = impl_backend

    def forward(
        self, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float | Tensor = 1.0
    ) -> tuple[Tensor, Tensor]:
        """The log-probabilities of `input_ids` and the entropies, each (...), float32.

        Args:
            hidden_states: (..., D), float32, bfloat16 or float16.
            vocab_weights: (V, D), of the same dtype.
            input_ids: (...), the tokens whose log-probabilities are wanted.
            temperature: above 0, a float or a tensor of (tokens,) or (...).
        """
        if isinstance(temperature, Tensor) and temperature.numel() == input_ids.numel():
            temperature = temperature.reshape(input_ids.shape)
        stats = linear_token_stats(
            hidden_states, vocab_weights, input_ids, temperature=temperature, chunk_size=self.chunk_size
        )
        assert stats.logprob is not None
        return stats.logprob, stats.entropy


def _logprob(logits: Tensor, labels: Tensor) -> Tensor:
    logprob = token_stats(logits, labels).logprob
    assert logprob is not None
    return logprob


class _ShareOfGradient(torch.autograd.Function):
    """The identity, whose backward leaves each rank an equal share of a gradient that every rank has whole."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, ranks: int) -> Tensor:
        ctx.ranks = ranks
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient / ctx.ranks, None
