import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "examples" / "tensor_parallel.py"


def test_a_step_with_a_sharded_output_projection_is_the_step_without() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(EXAMPLE)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    entropies = re.search(r"mean entropy (\S+) of the whole vocabulary, (\S+) of 2 shards", result.stdout)
    moves = re.search(r"parameters moved by up to (\S+) and differ by up to (\S+)", result.stdout)
    assert entropies, result.stdout
    assert moves, result.stdout
    whole, sharded = map(float, entropies.groups())
    assert abs(whole - sharded) <= 2e-6 * whole
    moved, difference = map(float, moves.groups())
    assert difference <= 1e-4 * moved
