"""token_stats and linear_token_stats: entropy, log-sum-exp, log-probability and varentropy of every token."""

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels import heads, inputs
from em_kernels.ops import linear, operators


class TokenStats(NamedTuple):
    """Per-token statistics of softmax(logits / temperature), float32 (float64 for float64 logits), shape (...).

    With l_j the log-probability of token j and p_j = exp(l_j):

    Attributes:
        entropy: H = -sum_j p_j l_j, in nats.
        lse: log sum_j exp(logits_j / temperature).
        logprob: l_target, or None where no target was given.
        varentropy: V = sum_j p_j (l_j + H)^2, the variance of the surprise, in nats squared.
    """

    entropy: Tensor
    lse: Tensor
    logprob: Tensor | None
    varentropy: Tensor


def token_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> TokenStats:
    """Entropy, log-sum-exp, log-probability and varentropy of each token, each differentiable.

    The forward reads the logits once, the backward reads them once more and writes the gradient, whatever mix of the
    statistics the loss is made of. Saved for backward: the logits and a few numbers per token.

    Args:
        logits: (..., V), float32, bfloat16, float16 or (backend "torch") float64; any strides.
        target: (...), integers in [0, V): the token whose log-probability is wanted. Not looked at where masked. An
            entry out of range raises on the CPU; on a GPU, where seeing it would cost a synchronisation, it gives NaN.
        mask: (...), bool, integer or float; zero marks a token that is not read, is 0 in every field, and gets no
            gradient. None keeps every token.
        temperature: tau > 0, a float or a tensor that broadcasts to logits.shape[:-1]. No gradient flows to it.
        backend: "triton", "torch", or None to choose by the logits' device and dtype.

    Returns:
        TokenStats, each field of shape (...).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.

    The gradient, with g the upstream gradient of each field and u_j = l_j + H, is
    (1/tau) [p_j (g_lse - g_logprob - g_V V + (2 g_V - g_H) u_j + g_V u_j^2) + g_logprob [j = target]].
    """
    inputs.check_logits(logits)
    mask = None if mask is None else inputs.flatten_mask(mask, logits) != 0
    target = None if target is None else inputs.flatten_target(target, logits, mask, logits.shape[-1])
    statistics = operators.row_statistics(
        inputs.flatten_logits(logits),
        mask,
        *inputs.flatten_temperature(temperature, logits),
        target,
        varentropy=True,
        backend=inputs.choose_backend(backend, logits),
    )
    return _token_stats(statistics, target, logits.shape[:-1])


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats(hidden @ weight.T, target)` without ever holding the logits: a chunk of tokens at a time.

    One matmul in the forward, three in the backward, which makes the logits again. Saved for backward: the arguments
    and a few numbers per token.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or (backend "torch") float64: what the output projection is given.
        weight: (V, D), of hidden's dtype: the output projection. Under torch.autocast both are cast to its dtype.
        target: (...), integers in [0, V), as in `token_stats`.
        mask: (...), bool, integer or float; zero marks a token that is not read, is 0 in every field, and gets no
            gradient. None keeps every token.
        bias: (V,), of hidden's dtype, added to the logits.
        softcap: c > 0: logits become c tanh(logits / c).
        temperature: tau > 0, a float or a tensor that broadcasts to hidden.shape[:-1]. No gradient flows to it.
        chunk_size: tokens whose logits are held at a time; None takes what fits into 512 MB of scratch (on the
            CPU, 128 MB).
        logits_dtype: torch.float32 keeps the float32 result of a 16-bit matmul unrounded; None rounds it to hidden's
            dtype.
        backend: "triton", "torch", or None to choose by hidden's device and dtype.

    Returns:
        TokenStats, each field of shape (...), differentiable by hidden, weight and bias.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    hidden, head, chunk_size = heads.prepare(hidden, weight, bias, softcap, logits_dtype, chunk_size)
    mask = None if mask is None else inputs.flatten_mask(mask, hidden, "hidden") != 0
    target = None if target is None else inputs.flatten_target(target, hidden, mask, len(weight), "hidden")
    statistics = linear.row_statistics(
        hidden.reshape(-1, hidden.shape[-1]),
        head,
        mask,
        *inputs.flatten_temperature(temperature, hidden, "hidden"),
        target,
        varentropy=True,
        chunk_size=chunk_size,
        backend=inputs.choose_backend(backend, hidden),
    )
    return _token_stats(statistics, target, hidden.shape[:-1])


@torch.no_grad()
def token_entropy(
    logits: Tensor,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Entropy of each token in nats, without a gradient: for monitoring.

    Args:
        logits: (..., V), as in `token_stats`.
        mask: (...), bool, integer or float; zero marks a token that is not read and whose entropy is 0.
        temperature: tau > 0, a float or a tensor that broadcasts to logits.shape[:-1].
        backend: "triton", "torch", or None to choose by the logits' device and dtype.

    Returns:
        H of softmax(logits / temperature), float32 (float64 for float64 logits), shape (...).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    inputs.check_logits(logits)
    entropy, *_ = operators.row_statistics(
        inputs.flatten_logits(logits),
        None if mask is None else inputs.flatten_mask(mask, logits) != 0,
        *inputs.flatten_temperature(temperature, logits),
        backend=inputs.choose_backend(backend, logits),
    )
    return entropy.view(logits.shape[:-1])


def _token_stats(
    statistics: tuple[Tensor, Tensor, Tensor, Tensor], target: Tensor | None, shape: torch.Size
) -> TokenStats:
    entropy, lse, logprob, varentropy = statistics
    return TokenStats(
        entropy.view(shape),
        lse.view(shape),
        None if target is None else logprob.view(shape),
        varentropy.view(shape),
    )
