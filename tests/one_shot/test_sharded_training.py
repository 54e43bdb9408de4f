"""Two processes that share a model's parameters, against one process that has all of them."""

import contextlib
import dataclasses
import functools
import importlib.util
import re
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType
from launch import CPU, ZERO, check_in_parts, launched, zero
from ranks import run_on_ranks
from safetensors.torch import load_file
from torch import Tensor
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from em_kernels.models.head import find_head
from em_kernels.one_shot import sharding, training
from em_kernels.one_shot.config import LOSSES, TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.interruption import Interrupted
from em_kernels.one_shot.metrics import StepStats
from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.optimizer import make_optimizer
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sharded import is_sharded
from em_kernels.one_shot.runs.folder import RunFolder

pytestmark = pytest.mark.slow

TAU = 0.5
_NOTHING = contextlib.nullcontext()


def _part(rollout: dict[str, Tensor], rank: int, size: int) -> Rollout:
    return Rollout(**{name: tensor[rank::size] for name, tensor in rollout.items()})


def _policy(model: Any, loss: str) -> Policy:
    return Policy(model, None, find_head(model) if loss == "linear" else None)


def _on_a_rank(folder: Path, rollout: dict[str, Tensor], loss: str, tied: bool) -> tuple[StepStats, dict[str, Tensor]]:
    """One process's share of a step of the sharded model: the statistics, and the whole gradient of each parameter."""
    with launched(ACCELERATE_USE_CPU="true"):
        accelerator = Accelerator(mixed_precision="no")
        model = _load(folder, tied)
        policy = _policy(model, loss)
        sharding.shard(model)
        assert is_sharded(model)
        part = _part(rollout, accelerator.process_index, accelerator.num_processes)
        stats = accumulate_gradient(accelerator, policy, part, temperature=TAU, micro_batch_size=3)
        return stats, {name: p.grad.full_tensor() for name, p in model.named_parameters()}


class _Step(NamedTuple):
    """A step: its statistics, gradients, the gradient's norm, the parameters after it, and a linear layer's dtypes."""

    stats: StepStats
    gradients: dict[str, Tensor]
    norm: float
    parameters: dict[str, Tensor]
    dtypes: set[torch.dtype]


def _with_zero(folder: Path, rollout: dict[str, Tensor], config: TrainConfig, stage: int) -> _Step:
    """One process's share of a step under DeepSpeed, the tensors whole."""
    with launched(**zero(stage)):
        accelerator = sharding.start(config, folder)
        from deepspeed.utils import safe_get_full_grad

        model, dtypes = _load(folder, tied=False), set()
        head = find_head(model) if config.loss == "linear" else None
        model.model.layers[0].mlp.down_proj.register_forward_hook(lambda _, inputs, output: dtypes.add(output.dtype))
        make = functools.partial(make_optimizer, config=config)
        prepared, optimizer = sharding.prepare(accelerator, model, make, config)
        assert is_sharded(model) == (stage == 3)
        policy = Policy(model, None, head, config.dtype, prepared=prepared)
        part = _part(rollout, accelerator.process_index, accelerator.num_processes)
        stats = accumulate_gradient(accelerator, policy, part, temperature=TAU, micro_batch_size=3)
        if stage == 3:
            check_in_parts(model)
        gradients = {name: safe_get_full_grad(p).clone() for name, p in model.named_parameters()}
        norm = sharding.take_step(accelerator, prepared, optimizer, config.max_grad_norm)
        state = sharding.whole_state(model, trained_alone=False) or model.state_dict()
        prepared.destroy()
        return _Step(stats, gradients, norm, {name: tensor.clone() for name, tensor in state.items()}, dtypes)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_computes_in_bfloat16(tiny_folder: Path, rollout: Rollout, stage: int) -> None:
    config = TrainConfig(dtype="bfloat16", micro_batch_size=3)
    for step in run_on_ranks(2, _with_zero, tiny_folder, vars(rollout), config, stage):
        assert step.dtypes == {torch.bfloat16}
        assert {gradient.dtype for gradient in step.gradients.values()} == {torch.float32}


@pytest.mark.parametrize("stage", [2, 3])
@pytest.mark.parametrize("loss", LOSSES)
def test_zero_takes_the_step_of_one_process(tiny_folder: Path, rollout: Rollout, loss: str, stage: int) -> None:
    config = TrainConfig(loss=loss, micro_batch_size=3, learning_rate=1e-3, max_grad_norm=0.1)
    model = _load(tiny_folder, tied=False)
    accelerator = Accelerator(mixed_precision="no")
    expected = accumulate_gradient(accelerator, _policy(model, loss), rollout, temperature=TAU, micro_batch_size=100)
    of_one = {name: p.grad.clone() for name, p in model.named_parameters()}
    norm = sharding.take_step(accelerator, model, make_optimizer(model, config), config.max_grad_norm)
    assert norm > config.max_grad_norm
    steps = run_on_ranks(2, _with_zero, tiny_folder, vars(rollout), config, stage)
    for step in steps:
        assert step.stats.tokens == expected.tokens
        assert step.stats.loss == pytest.approx(expected.loss, rel=1e-6)
        assert step.stats.entropy == pytest.approx(expected.entropy, rel=1e-6)
        assert step.norm == pytest.approx(norm, rel=1e-5)
        assert step.dtypes == {torch.float32}
        for name, gradient in of_one.items():
            assert _difference(step.gradients[name], gradient) < 5e-6, name
    for name, parameter in model.named_parameters():
        assert _difference(steps[0].parameters[name], parameter.detach()) < 1e-5, name


def _load(folder: Path, tied: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    with torch.no_grad():
        model.lm_head.weight[0] *= 2
    if tied:
        model.lm_head.weight = model.get_input_embeddings().weight
    return model


@pytest.mark.parametrize("tied", [False, True], ids=["two weights", "tied"])
@pytest.mark.parametrize("loss", LOSSES)
def test_fully_shard_gives_the_gradient_of_one_process(
    tiny_folder: Path, rollout: Rollout, loss: str, tied: bool
) -> None:
    model = _load(tiny_folder, tied)
    expected = accumulate_gradient(
        Accelerator(mixed_precision="no"), _policy(model, loss), rollout, temperature=TAU, micro_batch_size=100
    )
    for stats, gradients in run_on_ranks(2, _on_a_rank, tiny_folder, vars(rollout), loss, tied):
        assert stats.tokens == expected.tokens
        assert stats.loss == pytest.approx(expected.loss, rel=1e-6)
        assert stats.entropy == pytest.approx(expected.entropy, rel=1e-6)
        assert gradients.keys() == dict(model.named_parameters()).keys()
        for name, parameter in model.named_parameters():
            assert _difference(gradients[name], parameter.grad) < 5e-6, name


def _difference(actual: Tensor, expected: Tensor) -> float:
    return float((actual - expected).norm() / expected.norm())


_ADAPTERS = {"lora_rank": 4, "evaluation_size": 0, "steps": 3}
_WAYS: dict[str, tuple[dict[str, Any], dict[str, str]]] = {
    "data parallel": ({}, CPU),
    "fully_shard": ({"shard": True}, CPU),
    "fsdp2": ({}, CPU),
    "fully_shard, adapters": ({"shard": True, **_ADAPTERS}, CPU),
    "zero2": ({}, zero(2)),
    "zero3": ({}, zero(3)),
    "zero3, adapters": (_ADAPTERS, zero(3)),
}


def _start_fsdp2(config: TrainConfig, output: Path) -> Accelerator:
    """An Accelerator that prepares models for FSDP2, which Accelerate sets up for GPUs alone."""
    accelerator = Accelerator(mixed_precision="no")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", cpu_ram_efficient_loading=False
    )
    AcceleratorState._shared_state |= {"distributed_type": DistributedType.FSDP, "fsdp_plugin": plugin}
    assert accelerator.is_fsdp2
    return accelerator


def _train(config: TrainConfig, output: Path, way: str, ended: str = "", resume: bool = False) -> None:
    """One process of a run that keeps every second state and ends, if at all, as its last step begins.

    It fails, or one of its processes alone gets a signal: the second in a step, the first in an evaluation.
    """
    with launched(**_WAYS[way][1]), pytest.MonkeyPatch.context() as patched:
        train_on, evaluation = training.accumulate_gradient, training.evaluate
        taken: list[int] = []

        def ending(accelerator: Accelerator, policy: Policy, *given: Any, **named: Any) -> Any:
            taken.append(1)
            if way.startswith("zero3"):
                check_in_parts(policy.model)
            if len(taken) == config.steps and ended == "by an error":
                raise ZeroDivisionError
            if len(taken) == config.steps - 1 and ended == "by a signal" and dist.get_rank() == 1:
                signal.raise_signal(signal.SIGTERM)
            return train_on(accelerator, policy, *given, **named)

        def evaluated(*given: Any, **named: Any) -> Any:
            if dist.get_rank() == 0 and ended == "by a signal in an evaluation":
                signal.raise_signal(signal.SIGTERM)
            return evaluation(*given, **named)

        patched.setattr(training, "accumulate_gradient", ending)
        patched.setattr(training, "evaluate", evaluated)
        if way == "fsdp2":
            patched.setattr(sharding, "start", _start_fsdp2)
        # The process group serves the next test.
        patched.setattr(Accelerator, "end_training", lambda _: None)
        signalled = ended.startswith("by a signal")
        with contextlib.suppress(ZeroDivisionError), pytest.raises(Interrupted) if signalled else _NOTHING:
            training.train(config, output, resume=resume, state_every=2)


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[TrainConfig, Path]]:
    """A finished run of two processes, for each of the ways to launch it."""
    folder = tmp_path_factory.mktemp("runs")
    # Processes whose completions end early have to wait for the others, and one has no problem to solve.
    shutil.copytree(tiny_folder, folder / "ending")
    _load(tiny_folder, tied=False).save_pretrained(folder / "ending")

    @functools.cache
    def run(way: str) -> tuple[TrainConfig, Path]:
        config = TrainConfig(
            model=str(folder / "ending"),
            learning_rate=1e-3,
            batch_size=4,
            micro_batch_size=1,
            max_new_tokens=8,
            **{"steps": 4, "evaluation_size": 1, **_WAYS[way][0]},
        )
        run_on_ranks(2, _train, config, folder / way, way)
        return config, folder / way

    return run


def _checkpoint(run: Path) -> dict[str, Tensor]:
    [file] = (run / "checkpoint").glob("*.safetensors")
    return load_file(file)


@pytest.mark.parametrize("way", ["fully_shard", "fsdp2", "zero2", "zero3"])
def test_sharded_run_ends_as_data_parallelism_does(runs: Callable[[str], tuple[TrainConfig, Path]], way: str) -> None:
    (_, expected), (_, run) = runs("data parallel"), runs(way)
    losses = [[row["loss"] for row in RunFolder(folder).read_metrics()] for folder in (expected, run)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    weights = _checkpoint(run)
    assert weights.keys() == _checkpoint(expected).keys()
    for name, weight in _checkpoint(expected).items():
        assert _difference(weights[name], weight) < 1e-4, name
    assert sorted(path.name for path in run.iterdir()) == sorted(path.name for path in expected.iterdir())


@pytest.mark.parametrize("way", _WAYS)
def test_resumed_run_ends_with_the_same_parameters(
    runs: Callable[[str], tuple[TrainConfig, Path]], tmp_path: Path, way: str
) -> None:
    config, expected = runs(way)
    run = tmp_path / "run"
    run_on_ranks(2, _train, config, run, way, "by an error")
    assert RunFolder(run).kept_step() == 2
    # Of four steps, the third is taken again.
    run_on_ranks(2, _train, config, run, way, "", True)
    weights = _checkpoint(run)
    for name, weight in _checkpoint(expected).items():
        assert torch.equal(weights[name], weight), name
    losses = [[row["loss"] for row in RunFolder(folder).read_metrics()] for folder in (expected, run)]
    assert losses[1] == losses[0]


def test_processes_end_together_after_the_step_in_which_a_signal_came_to_one(
    runs: Callable[[str], tuple[TrainConfig, Path]], tmp_path: Path
) -> None:
    config, expected = runs("fully_shard")
    run = tmp_path / "run"
    run_on_ranks(2, _train, config, run, "fully_shard", "by a signal in an evaluation")
    # The evaluation was left between its halves.
    assert not RunFolder(run).is_evaluated(0)
    run_on_ranks(2, _train, config, run, "fully_shard", "by a signal", True)
    # The third step was finished, and its state kept although only every second one is.
    assert [row["step"] for row in RunFolder(run).read_metrics()] == [1, 2, 3]
    assert RunFolder(run).kept_step() == 3
    run_on_ranks(2, _train, config, run, "fully_shard", "", True)
    weights = _checkpoint(run)
    for name, weight in _checkpoint(expected).items():
        assert torch.equal(weights[name], weight), name


def test_norm_of_the_update_is_that_of_one_process(runs: Callable[[str], tuple[TrainConfig, Path]]) -> None:
    norms = [
        [row["update_norm"] for row in RunFolder(runs(way)[1]).read_metrics()]
        for way in ("data parallel", "fully_shard")
    ]
    assert norms[1] == pytest.approx(norms[0], rel=1e-4)


_FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.mark.parametrize(
    ("variables", "settings", "message"),
    [
        (_FSDP, {}, "launched with FSDP2, which Accelerate has not set up on cpu.*--shard"),
        (_FSDP | CPU, {}, "launched with FSDP2, which Accelerate has not set up on cpu.*--shard"),
        (
            _FSDP | {"FSDP_VERSION": "1"},
            {},
            r"launched with FSDP version 1, expected 2 \(accelerate launch --fsdp_version",
        ),
        (_FSDP, {"shard": True}, "--shard was given to a launch with FSDP, expected one of both"),
        (ZERO, {"shard": True}, "--shard was given to a launch with DeepSpeed, expected one of both"),
        (ZERO | CPU, {}, "launched with DeepSpeed, which Accelerate has not set up on cpu"),
        (ZERO | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, {}, "launched with ZeRO stage 1, expected 2 or 3"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, {}, "launched with Megatron-LM, expected data parallelism, FSDP2"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, {}, "launched with a parallelism config, expected"),
        (
            CPU,
            {"shard": True, "optimizer": "adamw8bit", "dtype": "bfloat16"},
            "optimizer is 'adamw8bit', expected 'adamw' for a sharded model",
        ),
    ],
)
def test_launch_that_cannot_be(
    tmp_path: Path, variables: dict[str, str], settings: dict[str, Any], message: str
) -> None:
    for found in run_on_ranks(2, _refusal, TrainConfig(**settings), tmp_path / "run", variables):
        assert re.search(message, found), found
    assert not (tmp_path / "run").exists()


def _refusal(config: TrainConfig, output: Path, variables: dict[str, str]) -> str:
    with launched(**variables), pytest.raises(UsageError) as raised:
        training.train(config, output)
    return str(raised.value)


def test_one_process_shards_nothing(tiny_config: TrainConfig, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--shard was given to one process, expected a launch of several"):
        training.train(dataclasses.replace(tiny_config, shard=True), tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_launch_without_deepspeed(tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "deepspeed" else find_spec(name))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(
        UsageError, match=r"DeepSpeed, which is not installed \(pip install 'em_kernels\[deepspeed\]'\)"
    ):
        training.train(tiny_config, tmp_path / "run")
