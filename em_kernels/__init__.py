"""Fused token-level entropy of language models: the loss, its gradient, and per-token statistics."""

from em_kernels.entropy import EntropyLoss, entropy_loss
from em_kernels.linear_entropy import LinearEntropyLoss, linear_entropy_loss
from em_kernels.models.head import OutputHead, find_head
from em_kernels.stats import TokenStats, linear_token_entropy, linear_token_stats, token_entropy, token_stats

__all__ = [
    "EntropyLoss",
    "LinearEntropyLoss",
    "OutputHead",
    "TokenStats",
    "entropy_loss",
    "find_head",
    "linear_entropy_loss",
    "linear_token_entropy",
    "linear_token_stats",
    "token_entropy",
    "token_stats",
]
__version__ = "0.1.0"
