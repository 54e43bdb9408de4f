import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_one_shot_em(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    command = [sys.executable, str(EXAMPLES / "one_shot_em.py"), "--model", str(tmp_path), "--steps", "5"]
    command += ["--prompt", "2+2?", "--batch-size", "8", "--max-new-tokens", "16", "--learning-rate", "3e-3"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = re.findall(r"^step (\d): mean entropy (\d\.\d{4}) over (\d+) tokens$", result.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in said] == [1, 2, 3, 4, 5]
    assert float(said[-1][1]) < 0.9 * float(said[0][1])
    assert all(8 <= int(tokens) <= 128 for *_, tokens in said)


def test_transformers_trainer(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    command = [sys.executable, str(EXAMPLES / "transformers_trainer.py"), "--model", str(tmp_path / "model")]
    command += ["--prompt", "2+2?", "--steps", "4", "--batch-size", "8", "--max-new-tokens", "16"]
    command += ["--learning-rate", "3e-3", "--output", str(tmp_path / "run")]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = re.findall(r"^step (\d): loss (\S+)  entropy (\S+)  decided (\S+)%$", result.stdout, re.MULTILINE)
    assert [int(step) for step, *_ in said] == [1, 2, 3, 4]
    assert float(said[-1][1]) < 0.9 * float(said[0][1])
    assert float(said[-1][2]) < 0.9 * float(said[0][2])
    [(before, after)] = re.findall(r"^mean entropy at temperature 1: (\S+) before, (\S+) after$", result.stdout, re.M)
    assert float(before) == float(said[0][2])
    assert float(after) < float(said[-1][2])
