"""Two processes that share a model's parameters, against one process that has all of them."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from ranks import run_on_ranks
from torch import Tensor
from torch import distributed as dist
from transformers import AutoModelForCausalLM

from em_kernels.models.head import find_head
from em_kernels.one_shot import sharding
from em_kernels.one_shot.config import LOSSES
from em_kernels.one_shot.metrics import StepStats
from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout

TAU = 0.5


def _part(rollout: dict[str, Tensor], rank: int, size: int) -> Rollout:
    return Rollout(**{name: tensor[rank::size] for name, tensor in rollout.items()})


def _policy(model: Any, loss: str) -> Policy:
    return Policy(model, None, find_head(model) if loss == "linear" else None)


@contextlib.contextmanager
def _launched(**variables: str) -> Iterator[None]:
    """The environment of a process that a launcher has started, with these variables besides."""
    rank, size = str(dist.get_rank()), str(dist.get_world_size())
    own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "OMP_NUM_THREADS": "1"}
    AcceleratorState._reset_state(reset_partial_state=True)
    with pytest.MonkeyPatch.context() as patched:
        for name, value in (own | variables).items():
            patched.setenv(name, value)
        yield
    AcceleratorState._reset_state(reset_partial_state=True)


def _on_a_rank(folder: Path, rollout: dict[str, Tensor], loss: str, tied: bool) -> tuple[StepStats, dict[str, Tensor]]:
    """One process's share of a step of the sharded model: the statistics, and the whole gradient of each parameter."""
    with _launched(ACCELERATE_USE_CPU="true"):
        accelerator = Accelerator(mixed_precision="no")
        model = _load(folder, tied)
        policy = _policy(model, loss)
        sharding.shard(model)
        assert sharding.is_sharded(model)
        part = _part(rollout, accelerator.process_index, accelerator.num_processes)
        stats = accumulate_gradient(accelerator, policy, part, temperature=TAU, micro_batch_size=3)
        return stats, {name: p.grad.full_tensor() for name, p in model.named_parameters()}


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
