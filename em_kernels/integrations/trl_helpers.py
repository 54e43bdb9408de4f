"""The functions on logits of trl.trainer.utils, by TRL's names and signatures: only the import changes.

The functions are those of TRL 1.16. TRL is not imported. These differences are deliberate:

- A logit of -inf has probability 0 and contributes 0 to entropy and gradient, where TRL's entropy is NaN.
- Results are float32 whatever the logits' dtype, where TRL's are rounded to the logits' dtype outside its GPU kernel.
- A row that `row_mask` leaves out is not read: what it contains and which index it has does not matter.
- An index outside the vocabulary raises ValueError on the CPU and gives NaN on a GPU.
- `chunk_size` of `entropy_from_logits` is accepted and changes nothing: no copy of the logits is made.
"""

import torch
from torch import Tensor

from em_kernels.entropy import entropy_loss
from em_kernels.stats import token_stats


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """Entropy of softmax(logits) in nats, differentiable.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        chunk_size: has no effect.

    Returns:
        (...), float32, or float64 for float64 logits.
    """
    return entropy_loss(logits, reduction="none")


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """Log-probabilities of the tokens `index` under softmax(logits / temperature), differentiable.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        index: (...) or, for K tokens of each row, (..., K), integers in [0, V).
        temperature: above 0.
        row_mask: of index's shape; 0 marks an entry whose log-probability is 0 and that gets no gradient.

    Returns:
        Of index's shape, float32, or float64 for float64 logits.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    if index.dim() < logits.dim():
        return _statistics(logits, index, temperature, row_mask)[0]
    if row_mask is not None and row_mask.shape != index.shape:
        raise ValueError(f"row_mask has shape {tuple(row_mask.shape)}, expected that of index, {tuple(index.shape)}")
    rows = None if row_mask is None else (row_mask != 0).any(-1)
    lse = token_stats(logits, mask=rows, temperature=temperature).lse.unsqueeze(-1)
    if row_mask is None:
        return logits.gather(-1, index).to(lse.dtype) / temperature - lse
    kept = row_mask != 0
    selected = logits.gather(-1, torch.where(kept, index, 0)).to(lse.dtype) / temperature
    # The where precedes the difference: what a masked entry contains must not reach it.
    return torch.where(kept, selected, 0.0) - torch.where(kept, lse, 0.0)


def selective_log_softmax_and_entropy(
    logits: Tensor,
    index: Tensor,
    entropy_requires_grad: bool = True,
    temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-probability of the token `index` under softmax(logits / temperature) and its entropy, from one pass.

    Args:
        logits: (..., V), float32, bfloat16, float16 or float64.
        index: (...), integers in [0, V).
        entropy_requires_grad: whether the entropy is differentiable.
        temperature: above 0.
        row_mask: (...); 0 marks a row that is not read, whose results are 0 and that gets no gradient.

    Returns:
        Log-probabilities and entropies in nats, each (...), float32, or float64 for float64 logits.

    Raises:
        ValueError, TypeError: an argument does not fit; the message names it.
    """
    logprob, entropy = _statistics(logits, index, temperature, row_mask)
    return logprob, entropy if entropy_requires_grad else entropy.detach()


def _statistics(logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
    stats = token_stats(logits, index, mask=row_mask, temperature=temperature)
    assert stats.logprob is not None
    return stats.logprob, stats.entropy
