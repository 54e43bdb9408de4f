"""What a GPU alone can show of training: FSDP2 as `accelerate launch` sets it up, and 8-bit Adam's compiled step."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.gpu

_OPTIONS = "--prompt 2+2? --steps 3 --learning-rate 1e-3 --batch-size 4 --micro-batch-size 2 --max-new-tokens 8"
_FSDP2 = ["--use_fsdp", "--fsdp_version", "2", "--fsdp_auto_wrap_policy", "TRANSFORMER_BASED_WRAP"]


def _run(model: Path, output: Path, launch: list[str], *options: str) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "accelerate.commands.launch", *launch, "--num_processes", "1"]
    command += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    command += ["-m", "em_kernels.cli", "train", "--model", str(model), *_OPTIONS.split(), "--evaluation-size", "2"]
    result = subprocess.run([*command, *options, "--output", str(output)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def test_fsdp2_of_one_process_ends_as_one_process_does(tiny_folder: Path, tmp_path: Path) -> None:
    plain, sharded = (_run(tiny_folder, tmp_path / way, launch) for way, launch in (("plain", []), ("fsdp2", _FSDP2)))
    assert [row["loss"] for row in sharded] == pytest.approx([row["loss"] for row in plain], rel=1e-3)
    expected, found = (load_file(tmp_path / way / "checkpoint" / "model.safetensors") for way in ("plain", "fsdp2"))
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        assert (found[name] - weight).norm() < 1e-3 * weight.norm(), name


def test_8_bit_adam_and_adapters_lower_the_entropy(tiny_folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("torchao")
    pytest.importorskip("peft")
    for way, options in (("8 bits", ["--optimizer", "adamw8bit"]), ("adapters", ["--lora-rank", "8"])):
        rows = _run(tiny_folder, tmp_path / way, [], "--dtype", "bfloat16", *options)
        assert rows[-1]["loss"] < rows[0]["loss"]
