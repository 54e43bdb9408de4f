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
    command += ["--problems", "6", "--max-new-tokens", "8", "--learning-rate", "1e-2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    accuracy, entropy = r"0\.0% ± 0\.0%", r"(\d\.\d{3}) ± \d\.\d{3}"
    rows = re.findall(rf"^\| (.+?) \| {accuracy} \| (.*?) \| {entropy} \| (.*?) \|$", result.stdout, re.MULTILINE)
    assert [name for name, *_ in rows] == ["base", "EM", "GRPO", "EM, then GRPO", "GRPO, then EM"]
    assert {of_accuracy for _, of_accuracy, _, _ in rows[1:]} == {"no difference seen"}
    mean = {name: float(value) for name, _, value, _ in rows}
    change = {name: of_entropy for name, _, _, of_entropy in rows}
    # Random weights earn no reward in two steps of GRPO, so only EM changes the model.
    assert result.stdout.count("of 4 completions of a problem, 0, 0 were right") == 2
    assert (mean["GRPO"], change["GRPO"]) == (mean["base"], "no difference seen")
    assert mean["EM"] < mean["base"] - 0.1
    assert re.fullmatch(r"-\d\.\d{3} ± \d\.\d{3}", change["EM"])
    assert mean["EM, then GRPO"] == mean["EM"] == mean["GRPO, then EM"]
