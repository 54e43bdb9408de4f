import json
import math
from pathlib import Path
from typing import Any

from em_kernels.cli import main
from em_kernels.one_shot.analysis.runs import read_run
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.evaluation.records import Record, append_records
from em_kernels.one_shot.json_lines import json_line
from em_kernels.one_shot.runs.folder import RunFolder


def _strict(line: str) -> Any:
    def refused(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refused)


def test_nan_is_null_at_any_depth() -> None:
    assert _strict(json_line({"a": [math.nan, 1.5], "b": {"c": (math.nan, "é")}})) == {
        "a": [None, 1.5],
        "b": {"c": [None, "é"]},
    }


def test_the_calibration_of_one_problem_is_json(tmp_path: Path) -> None:
    path = tmp_path / "completions.jsonl"
    one = {"task": "t", "problem": 0, "temperature": 1.0, "question": "q", "answers": ("1",), "completion": "1"}
    graded = {"answer": "1", "verdict": "right", "tokens": 1, "truncated": False, "logprob": -0.5}
    append_records(path, [Record(sample=i, **one, **graded) for i in range(2)])
    assert main(["analyze", "calibration", str(path), "--output", str(tmp_path / "output")]) == 0
    [cell] = map(_strict, (tmp_path / "output" / "calibration.jsonl").read_text().splitlines())
    assert cell["votes"]["bins"][0]["accuracy"]["standard_error"] is None
    assert cell["logprobs"]["order"] is None


def test_an_evaluation_of_one_problem_is_json_and_is_read_again(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.begin(TrainConfig(), {"processes": 1})
    row = {"step": 0, "decoding": "greedy", "accuracy": 1.0, "standard_error": math.nan, "problems": 1}
    record = Record("t", 0, 0, 0.0, "q", ("1",), "1", "1", "right", 1, False)
    run.write_evaluation(0, [row], [record], [])
    assert _strict(run.evaluations.read_text())["standard_error"] is None
    for rows in (run.read_evaluations(), read_run(tmp_path).evaluations):
        assert math.isnan(rows[0]["standard_error"])
