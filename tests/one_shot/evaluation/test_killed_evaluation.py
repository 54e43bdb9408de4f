"""evaluate in a process of its own that is killed in the middle."""

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from em_kernels.cli import main
from em_kernels.one_shot.evaluation.records import Record, read_records

pytestmark = pytest.mark.slow

# The command line, killed when it has written 20 completions.
_KILLED = """
import os, signal, sys
from em_kernels.cli import main
from em_kernels.one_shot.evaluation import measure

append_records, written = measure.append_records, []

def append(path, records):
    append_records(path, records)
    written.append(path)
    if len(written) == 20:
        os.kill(os.getpid(), signal.SIGKILL)

measure.append_records = append
main(sys.argv[1:])
"""


def _arguments(tiny_folder: Path, tasks: Path, output: Path) -> list[str]:
    options = ["--task", str(tasks), "--temperature", "0,0.5", "--samples", "3", "--max-new-tokens", "60"]
    options += ["--concurrency", "4", "--output", str(output), "--quiet"]
    return ["evaluate", str(tiny_folder), *options]


def _by_key(path: Path) -> dict[tuple[Any, ...], Record]:
    records = read_records(path)
    found = {(record.temperature, record.problem, record.sample): record for record in records}
    assert len(found) == len(records)
    return found


def _without_logprob(records: dict[tuple[Any, ...], Record]) -> dict[tuple[Any, ...], Record]:
    return {key: dataclasses.replace(record, logprob=None) for key, record in records.items()}


def test_a_killed_evaluation_goes_on_where_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    problems = [{"question": f"{i} + {i}?", "answer": str(2 * i)} for i in range(15)]
    (tmp_path / "sums.jsonl").write_text("".join(f"{json.dumps(problem)}\n" for problem in problems))
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert main(_arguments(tiny_folder, tmp_path / "sums.jsonl", whole)) == 0

    arguments = _arguments(tiny_folder, tmp_path / "sums.jsonl", killed)
    result = subprocess.run([sys.executable, "-c", _KILLED, *arguments], capture_output=True, text=True)
    assert result.returncode == -signal.SIGKILL, result.stderr
    assert len(read_records(killed / "completions.jsonl")) == 20

    assert main([*arguments, "--resume"]) == 0
    resumed, uninterrupted = (_by_key(folder / "completions.jsonl") for folder in (killed, whole))
    assert _without_logprob(resumed) == _without_logprob(uninterrupted)
    # The company that a completion is drawn in changes the rounding of its log-probabilities.
    for key, record in resumed.items():
        assert record.logprob == pytest.approx(uninterrupted[key].logprob, abs=1e-4)
    tables = [(folder / "table.md").read_text() for folder in (whole, killed)]
    assert tables[0] == tables[1]
