"""The output projection that makes logits from hidden states, and how many tokens' logits are held at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.ops.types import statistics_dtype


class Head(NamedTuple):
    """The logits softcap * tanh((hidden @ weight.T + bias) / softcap), in `logits_dtype`, without what is None."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logits_dtype: torch.dtype

    def bytes_per_token(self) -> int:
        """A token's logits, softcap's slope, the gradient in the matmul's dtype, hidden states and their products."""
        own = self.weight.dtype
        rounded = 0 if self.logits_dtype == own else own.itemsize
        logits = self.logits_dtype.itemsize * (1 if self.softcap is None else 2)
        vocab, dim = self.weight.shape
        return vocab * (logits + rounded) + dim * 2 * (statistics_dtype(own).itemsize + own.itemsize)


class Chunking(NamedTuple):
    """How many tokens' logits are held at a time, and which entries of their gradient may be left out."""

    chunk_size: int
    grad_tolerance: float = 0.0
