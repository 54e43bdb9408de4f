"""Two processes, launched as a user would launch them, against one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from em_kernels.one_shot.objective import accumulate_gradient
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout

pytestmark = pytest.mark.slow

_LAUNCH = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
_LAUNCH += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
_OPTIONS = "--steps 2 --learning-rate 1e-3 --batch-size 6 --micro-batch-size 2 --max-new-tokens 8 --evaluation-size 3"

# The program runs the command line; each process also saves its completions, gradients and parameters at each step.
_OBSERVED = """
import sys, torch
from em_kernels import cli
from em_kernels.one_shot import training

accumulate_gradient = training.accumulate_gradient

def observed(accelerator, policy, rollout, **named):
    kept = sys.argv[1] + f"/{accelerator.process_index}-{len(steps)}.pt"
    stats = accumulate_gradient(accelerator, policy, rollout, **named)
    gradients = {name: p.grad.clone() for name, p in policy.model.named_parameters()}
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters()}
    torch.save({"rollout": vars(rollout), "loss": stats.loss, "gradients": gradients, "start": start}, kept)
    steps.append(1)
    return stats

steps = []
training.accumulate_gradient = observed
sys.exit(cli.main(sys.argv[2:]))
"""


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    # Without ACCELERATE_USE_CPU, Accelerate may expect no more than one process on a machine without GPUs.
    environment = {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True)


@pytest.fixture(scope="module")
def ending_folder(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, made likely to end its completions, so that the processes have different numbers of tokens."""
    folder = tmp_path_factory.mktemp("ending")
    shutil.copytree(tiny_folder, folder, dirs_exist_ok=True)
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_folder)
    with torch.no_grad():
        model.lm_head.weight[0] *= 2
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def kept(ending_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("distributed")
    (folder / "observed.py").write_text(_OBSERVED)
    command = [*_LAUNCH, str(folder / "observed.py"), str(folder)]
    command += ["train", "--model", str(ending_folder), "--prompt", "2+2?", *_OPTIONS.split()]
    command += ["--output", str(folder / "run")]
    result = _run(command)
    assert result.returncode == 0, result.stderr
    # Only one of the processes prints.
    assert result.stdout.count("step 1/2") == 1
    return folder


def _load(kept: Path, rank: int, step: int) -> dict[str, Any]:
    return torch.load(kept / f"{rank}-{step}.pt", weights_only=True)


def _rollouts(kept: Path, step: int) -> list[Rollout]:
    return [Rollout(**_load(kept, rank, step)["rollout"]) for rank in range(2)]


@pytest.mark.parametrize("step", [0, 1])
def test_processes_draw_different_completions(kept: Path, step: int) -> None:
    first, second = ({tuple(ids.tolist()) for ids in rollout.completion_ids()} for rollout in _rollouts(kept, step))
    assert len(first) == len(second) == 3
    assert not first & second


def test_processes_keep_the_same_parameters(kept: Path) -> None:
    for step in range(2):
        first, second = (_load(kept, rank, step) for rank in range(2))
        for what in ("start", "gradients"):
            assert all(torch.equal(first[what][name], second[what][name]) for name in first[what])
    assert not torch.equal(_load(kept, 0, 0)["start"]["lm_head.weight"], _load(kept, 0, 1)["start"]["lm_head.weight"])
    assert set(load_file(kept / "run" / "checkpoint" / "model.safetensors")) == set(_load(kept, 0, 0)["start"])


@pytest.mark.parametrize("step", [0, 1])
def test_one_process_with_the_same_completions_agrees(kept: Path, ending_folder: Path, step: int) -> None:
    model: Any = AutoModelForCausalLM.from_pretrained(ending_folder)
    model.load_state_dict(_load(kept, 0, step)["start"])
    parts = _rollouts(kept, step)
    assert parts[0].completion_mask.sum() != parts[1].completion_mask.sum()
    # Both are padded on the right to the longer of the two; their prompts have the same width.
    width = max(part.completion_mask.shape[1] for part in parts)
    padded = {
        name: torch.cat(
            [torch.nn.functional.pad(getattr(part, name), (0, width - part.completion_mask.shape[1])) for part in parts]
        )
        for name in ("input_ids", "attention_mask", "completion_mask")
    }
    joined = Rollout(**padded, truncated=torch.cat([part.truncated for part in parts]))
    stats = accumulate_gradient(
        Accelerator(mixed_precision="no"), Policy(model, None), joined, temperature=0.5, micro_batch_size=6
    )
    observed = _load(kept, 0, step)
    assert stats.loss == pytest.approx(observed["loss"], rel=1e-5)
    for name, parameter in model.named_parameters():
        expected = observed["gradients"][name]
        torch.testing.assert_close(parameter.grad, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_batch_that_does_not_split_evenly(tiny_folder: Path, tmp_path: Path) -> None:
    command = [*_LAUNCH, "-m", "em_kernels.cli", "train", "--model", str(tiny_folder), "--batch-size", "3"]
    result = _run([*command, "--output", str(tmp_path / "run")])
    assert result.returncode != 0
    assert "batch_size is 3, expected a multiple of the number of processes, 2" in result.stderr
    assert not (tmp_path / "run").exists()
