"""Liger's scaled cross entropy with entropy, by Liger's names and signatures: only the import changes.

The functions are those of liger-kernel 0.8.5: liger_kernel.ops.LigerFusedLinearScaledCrossEntropyFunction and
liger_kernel.transformers.functional.liger_fused_linear_scaled_cross_entropy_tp. Liger is not imported. These
differences are deliberate:

- The entropy is float32 and of unrounded logits, where Liger's is rounded to the input's dtype off Hopper GPUs.
- The gradient of the weight is summed in float32.
- The entropy of a row with all mass on one token is 0, never negative. Liger's is a difference of two sums that cancel.
- A target outside the vocabulary raises ValueError on the CPU and gives NaN on a GPU, where looking at it would be a
  synchronisation. Liger looks at it.
- Zero tokens, shards of different sizes and, on a sharded vocabulary, the CPU work.
- Arguments that choose how Liger computes a result (`m_tiles_per_cluster`, `tiles_per_reduce`) change nothing.
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

from em_kernels.stats import TokenStats, linear_token_stats


class LigerFusedLinearScaledCrossEntropyFunction:
    """Negative log-likelihood and entropy of each token, from hidden states. Called by `apply`, as Liger's is."""

    @staticmethod
    def apply(
        _input: Tensor,
        weight: Tensor,
        target: Tensor,
        temperature: float = 1.0,
        ignore_index: int = -100,
        m_tiles_per_cluster: int = 1,
        return_entropy: bool = False,
        selected_token_ids: Tensor | None = None,
    ) -> Any:
        """The negative log-likelihood of each target under softmax(_input @ weight.T / temperature), differentiable.

        Args:
            _input: (tokens, D), float32, bfloat16 or float16.
            weight: (V, D), of the same dtype.
            target: (tokens,), integers in [0, V) or ignore_index.
            temperature: above 0.
            ignore_index: the target of a token whose results are 0 and that gets no gradient.
            m_tiles_per_cluster: has no effect.
            return_entropy: whether to return the entropies, too.
            selected_token_ids: (K,), integers in [0, V): tokens whose log-probabilities are wanted everywhere.

        Returns:
            (tokens,), float32; with return_entropy or selected_token_ids, a tuple of it, the entropies in nats,
            (tokens,), and the log-probabilities, (tokens, K), those that are asked for.

        Raises:
            ValueError, TypeError: an argument does not fit; the message names it.
        """
        counted = target != ignore_index
        stats = linear_token_stats(_input, weight, target, mask=counted, temperature=temperature)
        outputs = _outputs(stats, return_entropy)
        if selected_token_ids is not None:
            outputs += (_log_probabilities(_input, weight, selected_token_ids, temperature, stats.lse, counted),)
        return outputs[0] if len(outputs) == 1 else outputs


def liger_fused_linear_scaled_cross_entropy_tp(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    tp_group: "dist.ProcessGroup | None",
    temperature: float = 1.0,
    ignore_index: int = -100,
    tiles_per_reduce: int = 1,
    return_entropy: bool = False,
) -> Any:
    """The negative log-likelihood of each target, the vocabulary sharded over ranks, differentiable.

    Args:
        input: (tokens, D), float32, bfloat16 or float16, the same on every rank.
        weight: (V of this rank, D), this rank's rows of the output projection, in rank order.
        target: (tokens,), integers in [0, V of all ranks) or ignore_index, the same on every rank.
        tp_group: the ranks that share the vocabulary; None for all ranks.
        temperature: above 0.
        ignore_index: the target of a token whose results are 0 and that gets no gradient.
        tiles_per_reduce: has no effect.
        return_entropy: whether to return the entropies, too.

    Returns:
        (tokens,), float32; with return_entropy, a tuple of it and the entropies in nats, (tokens,). The backward gives
        every rank the whole gradient of input and that of its own rows of weight; every rank must run it.

    Raises:
        RuntimeError: torch.distributed is not initialised.
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("torch.distributed is not initialised, expected a process group of the vocabulary's ranks")
    group = dist.group.WORLD if tp_group is None else tp_group
    stats = linear_token_stats(
        input, weight, target, mask=target != ignore_index, temperature=temperature, process_group=group
    )
    outputs = _outputs(stats, return_entropy)
    return outputs if return_entropy else outputs[0]


def _outputs(stats: TokenStats, return_entropy: bool) -> tuple[Tensor, ...]:
    assert stats.logprob is not None
    return (-stats.logprob, stats.entropy) if return_entropy else (-stats.logprob,)


def _log_probabilities(
    hidden: Tensor, weight: Tensor, tokens: Tensor, temperature: float, lse: Tensor, counted: Tensor
) -> Tensor:
    """(tokens, K): the logits of these tokens, made unrounded in lse's dtype, less the log-sum-exp."""
    if tokens.dim() != 1 or tokens.dtype != torch.int64:
        raise ValueError(
            f"selected_token_ids has shape {tuple(tokens.shape)} and dtype {tokens.dtype}, expected (K,) and int64"
        )
    counted = counted.unsqueeze(-1)
    # What an ignored token contains must not reach the weight's gradient.
    hidden = torch.where(counted, hidden, 0.0).to(lse.dtype)
    logits = hidden @ weight[tokens].to(lse.dtype).T
    return torch.where(counted, logits / temperature - lse.unsqueeze(-1), 0.0)
