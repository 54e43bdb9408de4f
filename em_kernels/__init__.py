"""Fused token-level entropy of language models: the loss, its gradient, and per-token statistics."""

from em_kernels.entropy import EntropyLoss, entropy_loss
from em_kernels.stats import TokenStats, token_entropy, token_stats

__all__ = ["EntropyLoss", "TokenStats", "entropy_loss", "token_entropy", "token_stats"]
__version__ = "0.1.0"
