"""The optimiser of a run, AdamW with float32 state or with 8-bit state over bfloat16 parameters, and its updates."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError

# Elements of a parameter whose update is made at a time, so that it takes little memory.
_AT_ONCE = 2**22


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


@torch.no_grad()
def update_norm(optimizer: Any) -> float | None:
    """The norm of what the last step has added to the parameters, computed from the state that AdamW keeps.

    A copy of the parameters from before the step would take their memory once more. Where the state is not PyTorch's
    own, of 8 bits or DeepSpeed's, nothing tells, and the result is None. Every process has to make the call.
    """
    inner = getattr(optimizer, "optimizer", optimizer)
    if type(inner) is not torch.optim.AdamW:
        return None
    square, sharded = 0.0, False
    for group in inner.param_groups:
        rate, shrunk = group["lr"], 1 - group["lr"] * group["weight_decay"]
        for parameter in group["params"]:
            state = inner.state.get(parameter)
            if not state:
                continue
            sharded = sharded or isinstance(parameter, DTensor)
            steps, (beta1, beta2) = float(state["step"]), group["betas"]
            for after, first, second in _pieces(parameter, state["exp_avg"], state["exp_avg_sq"]):
                root = (second / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                moved = (first / root).mul_(rate / (1 - beta1**steps))
                # The parameter was shrunk before it was moved.
                moved += (after + moved).mul_((1 - shrunk) / shrunk)
                square += float(moved.square().sum())
    if sharded:
        total = torch.tensor(square, dtype=torch.float64, device=after.device)
        torch.distributed.all_reduce(total)
        square = float(total)
    return math.sqrt(square)


def _pieces(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    flat = [(tensor.to_local() if isinstance(tensor, DTensor) else tensor).reshape(-1) for tensor in tensors]
    return zip(*(tensor.split(_AT_ONCE) for tensor in flat), strict=True)
