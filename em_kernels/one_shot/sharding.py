"""Training whose parameters, gradients and optimiser state are spread over the processes.

Four ways give the same step: `config.shard` and FSDP2 through `accelerate launch` (PyTorch's fully_shard), and
DeepSpeed ZeRO-2 and ZeRO-3 through `accelerate launch`. The loss is made inside the forward of the model's head, where
each of them has the weight whole, so that nothing here gathers a weight for the loss.
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, InitProcessGroupKwargs
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed import checkpoint as distributed_checkpoint
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from transformers.integrations import unset_hf_deepspeed_config

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy.sharded import is_sharded

_ZERO_STAGES = (2, 3)
# The tag of DeepSpeed's checkpoint within a state's folder.
_TAG = "zero"


def start(config: TrainConfig, output: Path) -> Accelerator:
    """The Accelerator of this process, in whichever way the processes were launched.

    Raises:
        UsageError: the launch asks for a kind of parallelism that `train` has not, or for one that Accelerate has not
            set up on this machine.
    """
    fsdp, deepspeed = _asked("FSDP"), _asked("DEEPSPEED")
    for name, asked in (("Megatron-LM", _asked("MEGATRON_LM")), ("a parallelism config", _asked("PARALLELISM_CONFIG"))):
        if asked:
            raise UsageError(f"launched with {name}, expected data parallelism, FSDP2, ZeRO-2 or ZeRO-3")
    if config.shard and (fsdp or deepspeed):
        raise UsageError(f"--shard was given to a launch with {'FSDP' if fsdp else 'DeepSpeed'}, expected one of both")
    version = os.environ.get("FSDP_VERSION", "1")
    if fsdp and version != "2":
        raise UsageError(f"launched with FSDP version {version}, expected 2 (accelerate launch --fsdp_version 2)")
    if (config.shard or fsdp or deepspeed) and config.optimizer != "adamw":
        raise UsageError(f"optimizer is {config.optimizer!r}, expected 'adamw' for a sharded model")
    if deepspeed and importlib.util.find_spec("deepspeed") is None:
        raise UsageError("launched with DeepSpeed, which is not installed (pip install 'em_kernels[deepspeed]')")
    if fsdp:
        # The check of the head needs the weights on every process, where efficient loading leaves the first alone with
        # them.
        os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    # Accelerate names no backend for DeepSpeed on a machine without GPUs.
    over_gloo = [InitProcessGroupKwargs(backend="gloo")] if deepspeed and not torch.accelerator.is_available() else []
    accelerator = Accelerator(
        # The policy sets the precision that the model computes in; Accelerate's would copy the logits to float32.
        mixed_precision="no",
        log_with=None if config.report_to == "none" else config.report_to,
        project_dir=str(output),
        kwargs_handlers=over_gloo,
    )
    # This state is the process's. A trainer that ended in the middle of an accumulation has left it so that optimisers
    # neither step nor clear gradients.
    accelerator.sync_gradients = True
    # With this, Transformers would have ZeRO-3 load one process's part of the model, whose head could not be checked.
    unset_hf_deepspeed_config()
    _check(accelerator, fsdp=fsdp, deepspeed=deepspeed, shard=config.shard)
    return accelerator


def _asked(what: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{what}", "false").lower() in ("true", "1")


def _check(accelerator: Accelerator, *, fsdp: bool, deepspeed: bool, shard: bool) -> None:
    found = accelerator.distributed_type
    for name, asked, kind in (
        ("FSDP2", fsdp, DistributedType.FSDP),
        ("DeepSpeed", deepspeed, DistributedType.DEEPSPEED),
    ):
        if asked and found != kind:
            raise UsageError(
                f"launched with {name}, which Accelerate has not set up on {accelerator.device} ({found.value}); "
                "--shard in a launch without it shards on any device"
            )
    launched = int(os.environ.get("WORLD_SIZE", 1))
    if launched != accelerator.num_processes:
        # Without a GPU, Accelerate takes each process for a run of its own, and all the runs would write to one folder.
        raise UsageError(
            f"launched as {launched} processes of which Accelerate sees {accelerator.num_processes}; "
            "on a machine without GPUs, set ACCELERATE_USE_CPU=true"
        )
    if deepspeed and accelerator.state.deepspeed_plugin.zero_stage not in _ZERO_STAGES:
        stage = accelerator.state.deepspeed_plugin.zero_stage
        raise UsageError(f"launched with ZeRO stage {stage}, expected 2 or 3 (accelerate launch --zero_stage 3)")
    if shard and not dist.is_initialized():
        raise UsageError("--shard was given to one process, expected a launch of several (accelerate launch)")


def prepare(
    accelerator: Accelerator, model: Any, make_optimizer: Callable[[Any], torch.optim.Optimizer], config: TrainConfig
) -> tuple[Any, Any]:
    """Spreads the model over the processes, in place where it is sharded.

    Args:
        accelerator: the Accelerator from `start`.
        model: the model, whole, whose head has been checked.
        make_optimizer: makes the optimiser of a model's trainable parameters.
        config: the settings of the run.

    Returns:
        The model as it has to be called for a gradient, and its optimiser.
    """
    if config.shard:
        shard(model.to(accelerator.device))
        return model, make_optimizer(model)
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # A micro-batch's loss is a part of the step's, and no mean that DeepSpeed has to divide by their number.
        accelerator.state.deepspeed_plugin.deepspeed_config |= {
            "train_micro_batch_size_per_gpu": config.micro_batch_size,
            "gradient_accumulation_steps": 1,
            "gradient_clipping": config.max_grad_norm,
        }
        if config.dtype == "bfloat16":
            # DeepSpeed switches autocast off around the call of the model, so it is switched on inside.
            model.forward = torch.autocast(accelerator.device.type, torch.bfloat16)(model.forward)
    prepared, optimizer = accelerator.prepare(model, make_optimizer(model))
    return prepared, optimizer


def shard(model: Any) -> None:
    """Shards a Transformers model over all processes with fully_shard: each of its blocks, its embeddings and the rest.

    Embedding and output projection are gathered apart from each other only where they are two weights.
    """
    blocks = set(model._no_split_modules or ())
    for module in list(model.modules()):
        if type(module).__name__ in blocks:
            fully_shard(module)
    ends = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    if len({id(module.weight) for module in ends}) == len(ends):
        for module in ends:
            fully_shard(module)
    fully_shard(model)


@contextlib.contextmanager
def micro_batch(accelerator: Accelerator, prepared: Any, *, last: bool) -> Iterator[Callable[[Tensor], None]]:
    """Yields what runs the backward pass of one micro-batch, whose gradient is averaged over the processes by the last.

    Where gradients are sharded, each micro-batch averages its own, so that no process ever holds all of them.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        prepared.set_gradient_accumulation_boundary(is_boundary=last)
        yield prepared.backward
    elif last or isinstance(prepared, FSDPModule):
        yield Tensor.backward
    else:
        with accelerator.no_sync(prepared):
            yield Tensor.backward


def take_step(accelerator: Accelerator, prepared: Any, optimizer: Any, max_grad_norm: float) -> float:
    """Clips the gradient, steps unless it is not finite, and returns the norm that it had."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        # The clipping is DeepSpeed's own, by the run's max_grad_norm, and so is zeroing the gradient.
        prepared.step()
        return float(prepared.get_global_grad_norm())
    norm = accelerator.clip_grad_norm_(prepared.parameters(), max_grad_norm)
    gradient_norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
    if gradient_norm < float("inf"):
        optimizer.step()
    return gradient_norm


def save_state(accelerator: Accelerator, prepared: Any, optimizer: Any, folder: Path) -> None:
    """Writes the trainable parameters and the optimiser state; each process writes its part of them.

    Raises:
        OSError: a process cannot write its part.
    """
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        prepared.save_checkpoint(str(folder), tag=_TAG, exclude_frozen_parameters=True)
    else:
        state = _state(accelerator, prepared, optimizer)
        try:
            with _alone_or_together() as how:
                distributed_checkpoint.save(state, checkpoint_id=folder, **how)
        except CheckpointException as failure:
            # It is no Exception. Every process gets that of each process that failed.
            rank, (error, _) = next(iter(failure.failures.items()))
            raise OSError(f"{folder} cannot be written by process {rank}: {error}") from error


def restore_state(accelerator: Accelerator, prepared: Any, optimizer: Any, folder: Path) -> None:
    """Puts what `save_state` has written, by as many processes, back in place."""
    if accelerator.distributed_type == DistributedType.DEEPSPEED:
        prepared.load_checkpoint(str(folder), tag=_TAG, load_module_strict=False)
        return
    state = _state(accelerator, prepared, optimizer)
    with _alone_or_together() as how:
        distributed_checkpoint.load(state, checkpoint_id=folder, **how)
    model, inner = accelerator.unwrap_model(prepared), _unwrapped(optimizer)
    set_optimizer_state_dict(model, inner, state["optimizer"])


def _state(accelerator: Accelerator, prepared: Any, optimizer: Any) -> dict[str, Any]:
    """The live parameters, which a load overwrites in place, and a copy of the optimiser's state by parameter name."""
    model = accelerator.unwrap_model(prepared)
    for module in model.modules():
        # After a forward pass without a backward one, the outermost parameters are still whole, and others than the
        # optimiser's.
        if isinstance(module, FSDPModule):
            module.reshard()
    return {
        "model": {name: p.detach() for name, p in model.named_parameters() if p.requires_grad},
        "optimizer": get_optimizer_state_dict(model, _unwrapped(optimizer)),
    }


@contextlib.contextmanager
def _alone_or_together() -> Iterator[dict[str, bool]]:
    with warnings.catch_warnings():
        # torch warns of one process even where it has been told.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield {"no_dist": not dist.is_initialized()}


def _unwrapped(optimizer: Any) -> Any:
    # Accelerate's wrapper may skip a step, where the optimiser's state is made by a step with a gradient of 0.
    return getattr(optimizer, "optimizer", optimizer)


def whole_state(model: Any, *, trained_alone: bool) -> dict[str, Any] | None:
    """The model's state dict, whole in the first process's memory, for which every process has to make the call.

    With `trained_alone` it need not have the frozen parameters. None says that the model is not sharded.
    """
    if isinstance(model, nn.Module) and isinstance(model, FSDPModule):
        options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=trained_alone)
        return get_model_state_dict(model, options=options)
    if not is_sharded(model):
        return None
    import deepspeed

    # The parameters in this one are empty.
    whole = model.state_dict()
    # Tied weights are in a state dict under both of their names.
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if trained_alone and not parameter.requires_grad:
            continue
        # One parameter at a time is whole on a device.
        with deepspeed.zero.GatheredParameters([parameter]):
            if dist.get_rank() == 0:
                whole[name] = parameter.detach().cpu().clone()
    return whole
