"""Entropy, log-sum-exp, log-probability, varentropy and more of every token, from logits or from hidden states."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch import distributed as dist

from em_kernels.arguments.checks import check_logits, choose_backend
from em_kernels.arguments.projection import Operands, chunking_of, operands_of
from em_kernels.arguments.sharding import group_of, local_logits, local_per_token
from em_kernels.arguments.tokens import Source, rows_of_target, tokens_of
from em_kernels.ops import logits as logits_operators
from em_kernels.ops.hidden import registered as hidden_operators
from em_kernels.ops.sharded import Place
from em_kernels.ops.types import EXTRA, Statistics, Wanted, rows_of_logits


class TokenStats(NamedTuple):
    """Per-token statistics of softmax(logits / temperature), float32 (float64 for float64 logits), shape (...).

    With l_j the log-probability of token j and p_j = exp(l_j). The last four fields have no gradient and are None
    unless `extra` asks for them.

    Attributes:
        entropy: H = -sum_j p_j l_j, in nats.
        lse: log sum_j exp(logits_j / temperature).
        logprob: l_target, or None where no target was given.
        varentropy: V = sum_j p_j (l_j + H)^2, the variance of the surprise, in nats squared. It is a difference of two
            sums: in float32 its error is about 2e-7 of the square of the mean distance from the largest logit.
        max_prob: max_j p_j.
        top1: 1 where the target is the most likely token, or one of several, and 0 where it is not.
        mean_logprob: (1/V) sum_j l_j, V the size of the vocabulary; its negative less log V is the self-certainty that
            INTUITOR rewards (arXiv 2505.19590).
        collision: sum_j p_j^2, the probability that two draws agree.
    """

    entropy: Tensor
    lse: Tensor
    logprob: Tensor | None
    varentropy: Tensor
    max_prob: Tensor | None = None
    top1: Tensor | None = None
    mean_logprob: Tensor | None = None
    collision: Tensor | None = None


def token_stats(
    logits: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    extra: Sequence[str] = (),
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> TokenStats:
    """Entropy, log-sum-exp, log-probability and varentropy of each token, each differentiable.

    The forward reads the logits once, the backward reads them once more and writes the gradient, whatever mix of the
    statistics the loss is made of. Saved for backward: the logits and a few numbers per token.

    Args:
        logits: (..., V), float32, bfloat16, float16 or (backend "torch") float64; any strides. A DTensor that is
            sharded along the vocabulary is worked on in parts, one that is sharded along the tokens gives each rank the
            statistics of its own tokens.
        target: (...), integers in [0, V): the token whose log-probability is wanted. Not looked at where masked. An
            entry out of range raises where the host sees it, on the CPU outside torch.compile; elsewhere every
            statistic of its token is NaN.
        mask: (...), bool, integer or float; 0 marks a token that is not read, is 0 in every field, and gets no
            gradient. A negative entry raises where the host sees it and gives NaN elsewhere. None keeps every token.
        temperature: tau > 0, a float or a tensor that broadcasts to logits.shape[:-1]. No gradient flows to it.
        extra: any of "max_prob", "top1" (needs a target), "mean_logprob", "collision": fields of the result without a
            gradient, from the same pass over the logits.
        process_group: the ranks that share the vocabulary: `logits` hold this rank's columns, in rank order; targets
            are those of the whole vocabulary, and every argument but the logits is the same on all ranks.
        backend: "triton", "native", "torch", or None to choose by the logits' device and dtype.

    Returns:
        TokenStats, each field of shape (...), the same on every rank.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: a gradient of the gradient, a forward-mode derivative or a torch.func transform is asked for.

    The gradient, with g the upstream gradient of each field and u_j = l_j + H, is
    (1/tau) [p_j (g_lse - g_logprob - g_V V + (2 g_V - g_H) u_j + g_V u_j^2) + g_logprob [j = target]].
    """
    statistics, shape = _of_logits(logits, target, mask, temperature, _wanted(extra, target), process_group, backend)
    return _token_stats(statistics, shape, extra)


def linear_token_stats(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor | None = None,
    *,
    mask: Tensor | None = None,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    extra: Sequence[str] = (),
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    token_count: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> TokenStats:
    """`token_stats(hidden @ weight.T, target)` without ever holding the logits: a chunk of tokens at a time.

    One matmul in the forward, three in the backward, which makes the logits again. Saved for backward: the arguments
    and a few numbers per token.

    Args:
        hidden: (..., D), float32, bfloat16, float16 or (backend "torch") float64: what the output projection is given.
        weight: (V, D), of hidden's dtype: the output projection. Under torch.autocast both are cast to its dtype.
            DTensors of both are taken as `linear_entropy_loss` takes them.
        target: (...), integers in [0, V), as in `token_stats`.
        mask: (...), bool, integer or float, as in `token_stats`.
        bias: (V,), of hidden's dtype, added to the logits.
        softcap: c > 0: logits become c tanh(logits / c).
        temperature: tau > 0, a float or a tensor that broadcasts to hidden.shape[:-1]. No gradient flows to it.
        extra: any of "max_prob", "top1", "mean_logprob", "collision", as in `token_stats`.
        chunk_size: tokens whose logits, or the gradient of these, are held at a time, the same on every rank that
            shares the vocabulary; None takes what fits into the scratch memory that `linear_entropy_loss` describes,
            and 512 with a sharded vocabulary.
        logits_dtype: None and torch.float32 keep the float32 result of a 16-bit matmul unrounded; the dtype of 16-bit
            hidden states rounds it.
        token_count: the number of this rank's tokens whose mask is not 0, where the caller knows it as an int: a GPU
            then leaves masked tokens out of the matmuls without a synchronisation. A wrong count raises where the host
            sees the mask, and makes NaN of every field elsewhere.
        process_group: the ranks that share the vocabulary: `weight` and `bias` hold this rank's rows, in rank order,
            and every other argument is the same on all of them. The backward is a collective: every rank must run it,
            with the same upstream gradients.
        backend: "triton", "native", "torch", or None to choose by hidden's device and dtype.

    Returns:
        TokenStats, each field of shape (...), differentiable by hidden, weight and bias; the same on every rank.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
        RuntimeError: a gradient of the gradient, a forward-mode derivative or a torch.func transform is asked for.
    """
    wanted = _wanted(extra, target)
    operands = operands_of(
        hidden, weight, bias, softcap=softcap, logits_dtype=logits_dtype, process_group=process_group
    )
    statistics = _of_operands(operands, target, mask, temperature, wanted, chunk_size, token_count, backend)
    return _token_stats(statistics, operands.source.shape, extra)


@torch.no_grad()
def token_entropy(
    logits: Tensor,
    mask: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """Entropy of each token in nats, without a gradient: for monitoring.

    Args:
        logits: (..., V), as in `token_stats`.
        mask: (...), bool, integer or float; 0 marks a token that is not read and whose entropy is 0.
        temperature: tau > 0, a float or a tensor that broadcasts to logits.shape[:-1].
        process_group: the ranks that share the vocabulary, as in `token_stats`.
        backend: "triton", "native", "torch", or None to choose by the logits' device and dtype.

    Returns:
        H of softmax(logits / temperature), float32 (float64 for float64 logits), shape (...).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    statistics, shape = _of_logits(logits, None, mask, temperature, Wanted(), process_group, backend)
    return statistics.entropy.view(shape)


@torch.no_grad()
def linear_token_entropy(
    hidden: Tensor,
    weight: Tensor,
    mask: Tensor | None = None,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    temperature: float | Tensor = 1.0,
    chunk_size: int | None = None,
    logits_dtype: torch.dtype | None = None,
    token_count: int | None = None,
    process_group: "dist.ProcessGroup | None" = None,
    backend: str | None = None,
) -> Tensor:
    """`token_entropy(hidden @ weight.T, mask)` without ever holding the logits: a chunk of tokens at a time.

    Args:
        hidden, weight, bias, softcap, chunk_size, logits_dtype, token_count, process_group: as in `linear_token_stats`.
        mask: (...), bool, integer or float; 0 marks a token that is not read and whose entropy is 0.
        temperature: tau > 0, a float or a tensor that broadcasts to hidden.shape[:-1].
        backend: "triton", "native", "torch", or None to choose by hidden's device and dtype.

    Returns:
        H of softmax(logits / temperature), float32 (float64 for float64 hidden), shape (...).

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    operands = operands_of(
        hidden, weight, bias, softcap=softcap, logits_dtype=logits_dtype, process_group=process_group
    )
    statistics = _of_operands(operands, None, mask, temperature, Wanted(), chunk_size, token_count, backend)
    return statistics.entropy.view(operands.source.shape)


def _of_logits(
    logits: Tensor,
    target: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    wanted: Wanted,
    process_group: "dist.ProcessGroup | None",
    backend: str | None,
) -> tuple[Statistics, torch.Size]:
    logits, shard, layout = local_logits(logits, process_group)
    check_logits(logits, sharded=shard is not None)
    source = Source("logits", logits, logits.shape[:-1])
    mask, target, temperature = local_per_token(layout, mask=mask, target=target, temperature=temperature)
    tokens = tokens_of(source, mask, temperature)
    target = rows_of_target(target, source, tokens.kept, logits.shape[-1], shard)
    backend = choose_backend(backend, logits.device, logits.dtype)
    place = Place(backend, group_of(shard))
    rows = rows_of_logits(logits)
    return logits_operators.row_statistics(rows, tokens.kept, tokens.temperature, target, wanted, place), source.shape


def _of_operands(
    operands: Operands,
    target: Tensor | None,
    mask: Tensor | None,
    temperature: float | Tensor,
    wanted: Wanted,
    chunk_size: int | None,
    token_count: int | None,
    backend: str | None,
) -> Statistics:
    source, head, layout = operands.source, operands.head, operands.layout
    mask, target, temperature = local_per_token(layout, mask=mask, target=target, temperature=temperature)
    tokens = tokens_of(source, mask, temperature)
    target = rows_of_target(target, source, tokens.kept, head.weight.shape[0], operands.shard)
    chunking = chunking_of(operands, tokens.kept, chunk_size=chunk_size, token_count=token_count)
    return hidden_operators.row_statistics(
        operands.rows, head, tokens.kept, tokens.temperature, target, wanted, chunking, operands.place(backend)
    )


def _wanted(extra: Sequence[str], target: Tensor | None) -> Wanted:
    if isinstance(extra, str):
        raise TypeError(f"extra is the string {extra!r}, expected a sequence of names")
    for name in extra:
        if name not in EXTRA:
            raise ValueError(f"extra has {name!r}, expected any of {', '.join(map(repr, EXTRA))}")
    if "top1" in extra and target is None:
        raise ValueError("extra has 'top1', whether the target is the most likely token, and no target is given")
    return Wanted(second_moment=True, extra=len(extra) > 0)


def _token_stats(statistics: Statistics, shape: torch.Size, extra: Sequence[str]) -> TokenStats:
    def shaped(field: Any) -> Any:
        # A view of what has the shape already would cost the host, and the backward, as much as a small kernel.
        return field if field is None or len(shape) == 1 else field.view(shape)

    *fields, extras = statistics
    asked = {} if extras is None else {name: shaped(extras[EXTRA.index(name)]) for name in extra}
    return TokenStats(*map(shaped, fields), **asked)
