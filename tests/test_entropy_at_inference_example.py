import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_model import save_tiny_model

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "entropy_at_inference.py"


def test_both_processors_change_what_is_drawn(tmp_path: Path) -> None:
    save_tiny_model(tmp_path)
    result = subprocess.run(
        [sys.executable, str(EXAMPLE), "--model", str(tmp_path)], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    said = re.findall(r"^entropies (.+): mean (\S+), highest (\S+)$", result.stdout, re.MULTILINE)
    means = {name: (float(mean), float(highest)) for name, mean, highest in said}
    assert list(means) == ["as they are", "minimised to 0.3", "0.5 wanted"]
    assert means["minimised to 0.3"][0] < means["as they are"][0] - 0.1
    # Where two logits are almost the same, no temperature of the processor's range gives 0.5.
    assert means["0.5 wanted"][0] == pytest.approx(0.5, abs=0.02)
