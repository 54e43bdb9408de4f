"""The environments that launchers give their processes, for the processes of `ranks`."""

import base64
import contextlib
import json
from collections.abc import Iterator
from typing import Any

import pytest
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch import distributed as dist

CPU = {"ACCELERATE_USE_CPU": "true"}
ZERO = {"ACCELERATE_USE_DEEPSPEED": "true", "DS_ACCELERATOR": "cpu"}
# A parameter below the threshold would stay whole, and all those of a tiny model are.
_ALL_IN_PARTS = {"stage3_param_persistence_threshold": 0}


def zero(stage: int) -> dict[str, str]:
    """The environment of a launch with ZeRO of a stage."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "zero_optimization": {"stage": stage, **_ALL_IN_PARTS},
    }
    # Accelerate takes the text of the file in place of its name.
    text = base64.urlsafe_b64encode(json.dumps(config).encode()).decode()
    return ZERO | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": text}


@contextlib.contextmanager
def launched(**variables: str) -> Iterator[None]:
    """The environment of a process that a launcher has started, with these variables besides."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (own | variables).items():
            patched.setenv(name, value)
        if "ACCELERATE_USE_DEEPSPEED" in variables:
            import deepspeed

            # Collectives go over gloo, and not through an extension that DeepSpeed would compile first.
            patched.setitem(deepspeed.ops.__compatible_ops__, "deepspeed_shm_comm", False)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


@contextlib.contextmanager
def zero_settings(stage: int) -> Iterator[dict[str, Any]]:
    """The arguments of Transformers' TrainingArguments for ZeRO of a stage, and the environment that they need."""
    config = {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": 0.0,
        "zero_optimization": {"stage": stage, **_ALL_IN_PARTS},
        "zero_allow_untested_optimizer": True,
    }
    from transformers.integrations import unset_hf_deepspeed_config

    with launched(**ZERO):
        # Transformers names no backend for DeepSpeed on a machine without GPUs.
        PartialState(backend="gloo")
        try:
            yield {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}
        finally:
            # Models would go on being loaded in parts.
            unset_hf_deepspeed_config()


def whole_parameters(model: Any) -> dict[str, Tensor]:
    """A copy of each parameter, gathered where ZeRO-3 has partitioned it."""
    parts = [parameter for parameter in model.parameters() if hasattr(parameter, "ds_id")]
    if not parts:
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts):
        return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def trains_in_parts(trainer: Any) -> bool:
    """Whether a trainer of Transformers runs under ZeRO-3."""
    plugin = trainer.accelerator.state.deepspeed_plugin if trainer.is_deepspeed_enabled else None
    return plugin is not None and plugin.zero_stage == 3


def check_in_parts(model: Any) -> None:
    """Checks that this process holds its share of each parameter, to which padding may belong, and no more."""
    size = dist.get_world_size()
    for name, parameter in model.named_parameters():
        assert parameter.numel() == 0, name
        assert parameter.ds_tensor.numel() == -(-parameter.ds_numel // size), name
