import functools
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
from launch import CPU, ZERO, launched
from ranks import run_on_ranks
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from em_kernels.one_shot import memory, sharding
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.optimizer import make_optimizer
from em_kernels.one_shot.policy import adapter

TOKENS = torch.arange(20)[None]


def _model() -> Any:
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=1000,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
    )


def _bytes(tensors: Any) -> int:
    """The memory of tensors, and of the tensors that a tensor of 8 bits is made of."""
    total = 0
    for tensor in tensors:
        parts = [tensor.codes, tensor.scale] if hasattr(tensor, "codes") else [tensor]
        total += sum(part.nbytes for part in parts)
    return total


@pytest.mark.parametrize("way", ["float32", "8 bits", "adapters"])
def test_bytes_of_one_process_are_those_it_holds(way: str) -> None:
    model, size = _model(), memory.size_of(_model())
    config, expected = TrainConfig(), memory.whole(size)
    if way == "8 bits":
        pytest.importorskip("torchao")
        config = TrainConfig(dtype="bfloat16", optimizer="adamw8bit")
        model, expected = model.bfloat16(), memory.low_bit(size)
    if way == "adapters":
        pytest.importorskip("peft")
        adapter.add_adapter(model, 8)
        adapter.hold_frozen_in(model, torch.bfloat16)
        expected = memory.adapters(size, 8)
    optimizer = make_optimizer(model, config)
    with torch.autocast("cpu", torch.bfloat16, enabled=way == "adapters"):
        loss = model(input_ids=TOKENS, labels=TOKENS).loss
    loss.backward()
    with torch.compiler.set_stance("force_eager"):
        optimizer.step()
    parameters = list(model.parameters())
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name.startswith("exp_avg")]
    assert _bytes(parameters) == expected.parameters
    assert _bytes(p.grad for p in parameters if p.grad is not None) == expected.gradients
    # Norms are too small for 8 bits.
    assert _bytes(moments) == pytest.approx(expected.optimizer, rel=0.01)


def _live_bytes() -> int:
    gc.collect()
    storages = {}
    for found in gc.get_objects():
        if isinstance(found, Tensor):
            # A tensor that is spread over processes has no storage of its own.
            local = found.to_local() if hasattr(found, "to_local") else found
            if local.device.type == "cpu" and local.layout == torch.strided:
                storages[local.untyped_storage().data_ptr()] = local.untyped_storage().nbytes()
    return sum(storages.values())


def _held(variables: dict[str, str], folder: Path) -> int:
    """The bytes that a step has left in this process, without the gradients."""
    with launched(**variables):
        config = TrainConfig(shard="ACCELERATE_USE_DEEPSPEED" not in variables)
        accelerator = sharding.start(config, folder)
        if not config.shard:
            # The buffers of communication would be larger than the model.
            plugin = accelerator.state.deepspeed_plugin
            plugin.deepspeed_config["zero_optimization"] |= {
                "reduce_bucket_size": 1000,
                "contiguous_gradients": False,
                "overlap_comm": False,
                "stage3_prefetch_bucket_size": 0,
                "stage3_param_persistence_threshold": 0,
            }
        before = _live_bytes()
        make = functools.partial(make_optimizer, config=config)
        prepared, optimizer = sharding.prepare(accelerator, _model(), make, config)
        with sharding.micro_batch(accelerator, prepared, last=True) as backward:
            backward(prepared(input_ids=TOKENS, labels=TOKENS).loss)
        sharding.take_step(accelerator, prepared, optimizer, 1.0)
        if config.shard:
            optimizer.zero_grad()
        held = _live_bytes() - before
        if not config.shard:
            prepared.destroy()
        return held


@pytest.mark.slow
@pytest.mark.parametrize("way", ["fsdp2", "zero2", "zero3"])
def test_bytes_of_a_process_of_two_are_those_it_holds(way: str, tmp_path: Path) -> None:
    variables = CPU if way == "fsdp2" else ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": way[-1]}
    expected = getattr(memory, way)(memory.size_of(_model()), 2)
    held = expected.parameters + expected.optimizer
    if way == "zero3":
        # ZeRO-3 keeps the gradients' memory from the start.
        held += expected.gradients
    for found in run_on_ranks(2, _held, variables, tmp_path):
        assert found == pytest.approx(held, rel=0.08)


def test_the_paper_s_model_has_its_published_number_of_parameters() -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(memory._models()["Qwen2.5-7B"])
    assert memory.size_of(model).total == 7_615_616_512


def test_the_table_of_the_documentation_is_the_function_s() -> None:
    documented = (Path(__file__).parents[2] / "docs" / "sharded.md").read_text()
    assert memory.table() in documented
