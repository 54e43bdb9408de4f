import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

pytest.importorskip("trl")
pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "em_then_rl.py"


def test_every_order_of_em_and_rl_is_trained_and_measured(tmp_path: Path) -> None:
    save_tiny_model(tmp_path / "model")
    command = [sys.executable, str(EXAMPLE), "--model", str(tmp_path / "model"), "--output", str(tmp_path / "out")]
    command += ["--em-steps", "2", "--grpo-steps", "2", "--batch-size", "4", "--max-new-tokens", "8", "--problems", "6"]
    command += ["--problem-tokens", "8"]
    command += ["--em-learning-rate", "1e-2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.strip() in result.stdout
    accuracy = r"[\d.]+% ± [\d.]+%(?: \(\d unreadable\))?"
    rows = re.findall(rf"^\| (.+?) \| {accuracy} \| {accuracy} \| (\d\.\d{{3}}) \|$", table, re.MULTILINE)
    assert [name for name, _ in rows] == ["base", "EM", "GRPO", "EM, then GRPO", "GRPO, then EM"]
    entropy = {name: float(value) for name, value in rows}
    # Two runs of GRPO have taken two steps each. Random weights earn no reward, so only EM changes the model.
    assert len(re.findall(r"'rewards/right_answer/mean': '0'", result.stdout)) == 4
    assert entropy["GRPO"] == entropy["base"]
    assert entropy["EM"] < entropy["base"] - 0.1
    assert entropy["EM, then GRPO"] == entropy["EM"]
