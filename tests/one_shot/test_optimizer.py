import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from em_kernels.one_shot import training
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.optimizer import make_optimizer, update_norm

_8_BIT = TrainConfig(dtype="bfloat16", optimizer="adamw8bit", learning_rate=1e-4)


@pytest.fixture
def eager() -> Any:
    """Keeps torchao from compiling its step for each shape."""
    with torch.compiler.set_stance("force_eager"):
        yield


def test_norm_of_the_update_is_that_of_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    # The parameters are larger than a piece, and weights of 30 make the decay count.
    monkeypatch.setattr("em_kernels.one_shot.optimizer._AT_ONCE", 100)
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 3))
    nn.init.constant_(model[0].weight, 30.0)
    optimizer = make_optimizer(model, TrainConfig(learning_rate=1e-2))
    assert update_norm(optimizer) == 0
    for _ in range(3):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
        changes = [new.detach() - old for new, old in zip(model.parameters(), before, strict=True)]
        norm = torch.cat([change.flatten() for change in changes]).double().norm().item()
        assert update_norm(optimizer) == pytest.approx(norm, rel=1e-4)


@pytest.mark.usefixtures("eager")
def test_updates_below_the_resolution_are_there_on_average() -> None:
    pytest.importorskip("torchao")
    model = nn.Linear(256, 256, bias=False, dtype=torch.bfloat16)
    nn.init.ones_(model.weight)
    optimizer = make_optimizer(model, _8_BIT)
    model.weight.grad = torch.ones_like(model.weight)
    torch.manual_seed(0)
    optimizer.step()
    # Below 1, neighbours differ by 2^-8. Adam's first step is the learning rate, and the decay a hundredth of it.
    assert set(model.weight.flatten().tolist()) == {1.0, 1.0 - 2**-8}
    assert 1 - model.weight.double().mean().item() == pytest.approx(1.01e-4, rel=0.1)
    assert update_norm(optimizer) is None
    codes = optimizer.state[model.weight]["exp_avg"].codes
    assert (codes.dtype, codes.shape) == (torch.uint8, model.weight.shape)


def test_frozen_parameters_are_not_the_optimizers() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    [group] = make_optimizer(model, TrainConfig()).param_groups
    assert [id(p) for p in group["params"]] == [id(p) for p in model[1].parameters()]


def test_without_torchao(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(UsageError, match=r"optimizer adamw8bit needs torchao \(pip install 'em_kernels\[8bit\]'\)"):
        make_optimizer(nn.Linear(2, 2), _8_BIT)


@pytest.mark.slow
@pytest.mark.usefixtures("eager")
def test_8_bit_run_resumes_to_the_same_parameters(
    tiny_config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("torchao")
    config = dataclasses.replace(tiny_config, dtype="bfloat16", optimizer="adamw8bit", evaluation_size=0)
    training.train(config, tmp_path / "whole")
    train_on = training.accumulate_gradient
    taken: list[int] = []

    def twice(*given: Any, **named: Any) -> Any:
        taken.append(1)
        return train_on(*given, **named) if len(taken) < 3 else 1 / 0

    with monkeypatch.context() as patched:
        patched.setattr(training, "accumulate_gradient", twice)
        with pytest.raises(ZeroDivisionError):
            training.train(config, tmp_path / "resumed", state_every=1)
    training.train(config, tmp_path / "resumed", resume=True)
    expected, found = (load_file(tmp_path / run / "checkpoint" / "model.safetensors") for run in ("whole", "resumed"))
    assert {weight.dtype for weight in expected.values()} == {torch.bfloat16}
    assert all(torch.equal(found[name], expected[name]) for name in expected)
