"""The output projection that makes logits from hidden states, and how tokens go through it."""

from typing import NamedTuple

import torch
from torch import Tensor


class Head(NamedTuple):
    """The logits softcap * tanh((hidden @ weight.T + bias) / softcap), in `logits_dtype`, without what is None."""

    weight: Tensor
    bias: Tensor | None
    softcap: float | None
    logits_dtype: torch.dtype


class Chunking(NamedTuple):
    """How tokens go through the matmuls.

    Attributes:
        chunk_size: how many tokens' logits are held at a time.
        grad_tolerance: the entries of the logits' gradient that may be left out.
        token_count: how many tokens are not masked; None where the caller does not know.
    """

    chunk_size: int
    grad_tolerance: float = 0.0
    token_count: int | None = None
