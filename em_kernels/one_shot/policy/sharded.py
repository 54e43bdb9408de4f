"""Whether the processes of a launch have to run a model together."""

from torch import nn
from torch.distributed.fsdp import FSDPModule


def is_sharded(model: nn.Module) -> bool:
    """Whether a forward pass of the model gathers parameters, which every process then has to take part in."""
    # DeepSpeed marks the parameters that ZeRO-3 has spread.
    return isinstance(model, FSDPModule) or any(hasattr(parameter, "ds_id") for parameter in model.parameters())
