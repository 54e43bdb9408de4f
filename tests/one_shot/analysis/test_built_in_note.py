from pathlib import Path
from typing import Any

import pytest
from run_folders import record, write_run

from em_kernels.one_shot.analysis.built_in import BUILT_IN_NOTE, built_in_lines
from em_kernels.one_shot.analysis.calibration_page import calibrate, describe_calibration
from em_kernels.one_shot.analysis.comparison import describe_comparison
from em_kernels.one_shot.analysis.selection import describe_selection
from em_kernels.one_shot.data.selection import Candidate
from em_kernels.one_shot.evaluation.scores import score


def _measured(*models: str | None) -> dict[str, Any]:
    settings = {"models": {str(model): model for model in models}, "tasks": {"sums": "1 problems"}}
    return {"settings": settings, "versions": {}, "device": "cpu"}


def test_what_was_trained_from_the_built_in_model_is_told_from_other_models(tmp_path: Path) -> None:
    first = write_run(tmp_path / "first") / "checkpoint"
    second = write_run(tmp_path / "second", model=str(first)) / "checkpoint-2"
    other = write_run(tmp_path / "other", model="owner/model") / "checkpoint"
    for models in ([None], [str(first)], [str(second)], [str(other), str(second)]):
        assert built_in_lines([_measured(*models)]) == [BUILT_IN_NOTE]
        assert built_in_lines([{"settings": {"model": model}} for model in models]) == [BUILT_IN_NOTE]
    for model in (str(other), "owner/model", str(tmp_path / "none" / "checkpoint")):
        assert built_in_lines([_measured(model), {"settings": {"model": model}}]) == []


@pytest.mark.parametrize("built_in", [True, False])
def test_tables_of_a_trained_model_have_the_note(built_in: bool, tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", model=None if built_in else "owner/model", verdicts={0: [True, False]})
    config = _measured(str(run / "checkpoint"))
    records = [record(i, verdict=i == 0, task="sums", model="m") for i in range(2)]
    scores = score(records, tasks=["sums"], models=["m"], ks=[1], same=str.__eq__)
    file = run / "evaluations" / "step-0.jsonl"
    for lines in (
        describe_comparison(scores, config),
        describe_selection([Candidate("sums", 0, "1 + 1?", (), [True, False])], "variance", config),
        describe_calibration(calibrate([file], str.__eq__), [file]),
    ):
        assert (BUILT_IN_NOTE in lines) is built_in
