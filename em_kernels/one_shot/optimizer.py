"""The optimiser of a run: AdamW with float32 state, or with 8-bit state over bfloat16 parameters."""

from typing import Any

import torch

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError


def make_optimizer(model: Any, config: TrainConfig) -> torch.optim.Optimizer:
    """The optimiser of the model's trainable parameters.

    Raises:
        UsageError: the package of the optimiser is not installed.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if config.optimizer == "adamw8bit":
        try:
            from torchao.optim import AdamW8bit
        except ImportError as error:
            raise UsageError(f"optimizer adamw8bit needs torchao (pip install 'em_kernels[8bit]'): {error}") from None
        # An update of 2e-5 is below bfloat16's resolution of most weights. Rounded up or down at random, by how near
        # each is, it is there on average.
        return AdamW8bit(parameters, lr=config.learning_rate, bf16_stochastic_round=True)
    # The fused optimiser updates each parameter in one pass over memory.
    return torch.optim.AdamW(parameters, lr=config.learning_rate, fused=True)
