import json
import math
from pathlib import Path

import pytest
from written_runs import write_run, write_sweep

from em_kernels.one_shot.analysis.built_in import BUILT_IN_NOTE
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.sweeps.folder import SweepFolder
from em_kernels.one_shot.sweeps.results import Result, group_by_settings, read_result
from em_kernels.one_shot.sweeps.table import write_table


@pytest.fixture
def results(tmp_path: Path) -> list[Result]:
    """Two temperatures, of which the second has a run that failed after a step and a run that did not start."""
    runs = write_sweep(tmp_path, {"temperature": (0.1, 0.3), "seed": (0, 1, 2)})
    write_run(runs[0], [0.5, 0.1], {0: 0.25, 1: 0.5, 2: 0.375}, {0: 0.125, 2: 0.25})
    write_run(runs[1], [0.5, 0.2], {0: 0.25, 1: 0.25, 2: 0.375}, {0: 0.125, 2: 0.0})
    write_run(runs[2], [0.5, 0.6], {0: 0.25, 1: 0.625, 2: 0.0}, {0: 0.125, 2: 0.125})
    write_run(runs[3], [0.5, 0.4], {0: 0.25, 2: 0.5}, {0: 0.125, 2: 0.25})
    write_run(runs[4], [9.0], {0: 0.25}, {0: 0.125}, finished=False)
    return [read_result(run, failed=run.number == 5) for run in runs]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_means_and_errors_are_over_the_finished_seeds(results: list[Result]) -> None:
    cold, warm = group_by_settings(results)
    assert (cold.settings, len(cold.finished), cold.failed) == ({"temperature": 0.1}, 3, 0)
    assert (warm.settings, len(warm.finished), warm.failed) == ({"temperature": 0.3}, 1, 1)
    # 0.1, 0.2 and 0.6 have the mean 0.3 and the variance 0.07.
    assert cold.curve("loss")[2].mean == pytest.approx(0.3)
    assert cold.curve("loss")[2].standard_error == pytest.approx(math.sqrt(0.07 / 3))
    assert warm.curve("loss")[2].mean == 0.4
    assert math.isnan(warm.curve("loss")[2].standard_error)
    assert {step: estimate.mean for step, estimate in cold.accuracy("sampled").items()} == {0: 0.125, 2: 0.125}


def test_table_to_read(tmp_path: Path, results: list[Result]) -> None:
    folder = SweepFolder(tmp_path)
    text = write_table(folder, results, group_by_settings(results))
    assert folder.table.read_text() == text
    head, rule, cold, warm, *notes = text.splitlines()
    assert BUILT_IN_NOTE in notes
    assert {len(line) for line in (rule, cold, warm)} == {len(head)}
    assert dict(zip(_cells(head), _cells(cold), strict=True)) == {
        "temperature": "0.1",
        "runs": "3",
        "failed": "0",
        "loss": "0.3000 ± 0.1528",
        "entropy": "0.6000 ± 0.3055",
        "greedy before": "25.0% ± 0.0%",
        "greedy after": "25.0% ± 12.5%",
        # The step whose mean is the highest, not the mean of what is best in each run.
        "greedy best (step)": "45.8% ± 11.0% (1)",
        "sampled before": "12.5% ± 0.0%",
        "sampled after": "12.5% ± 7.2%",
        "sampled best (step)": "12.5% ± 0.0% (0)",
    }
    assert _cells(warm)[:6] == ["0.3", "1", "1", "0.4000", "0.8000", "25.0%"]
    assert any(
        "32 problems" in note and "The best step is chosen on the problems that it is shown on" in note
        for note in notes
    )


def test_settings_of_the_runs_that_began_and_which_have_which(tmp_path: Path, results: list[Result]) -> None:
    text = write_table(SweepFolder(tmp_path), results, group_by_settings(results))
    settings = text.partition("## Settings\n\n")[2].splitlines()
    assert "learning_rate 2e-05, " in settings[0]
    assert settings[1:4] == [
        "- temperature differs: 0.1 in temperature=0.1,seed=0 and temperature=0.1,seed=1 and temperature=0.1,seed=2; "
        "0.3 in temperature=0.3,seed=0 and temperature=0.3,seed=1",
        "- seed differs: 0 in temperature=0.1,seed=0 and temperature=0.3,seed=0; "
        "1 in temperature=0.1,seed=1 and temperature=0.3,seed=1; 2 in temperature=0.1,seed=2",
        "- torch 2.9, device cpu",
    ]


def test_runs_that_a_rule_ended_count_with_their_own_last_steps(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, {"seed": (0, 1)})
    write_run(runs[0], [0.5, 0.2], {0: 0.25, 2: 0.75}, {0: 0.125, 2: 0.5})
    write_run(runs[1], [0.5, 0.4, 0.3], {0: 0.25, 3: 0.5}, {0: 0.125, 3: 0.25})
    results = [read_result(run, failed=False) for run in runs]
    head, _, row, *_ = write_table(SweepFolder(tmp_path), results, group_by_settings(results)).splitlines()
    cells = dict(zip(_cells(head), _cells(row), strict=True))
    assert cells["loss"] == "0.2500 ± 0.0500"
    assert cells["greedy after"] == "62.5% ± 12.5%"
    assert cells["greedy best (step)"] == "25.0% ± 0.0% (0)"


def test_rows_to_compute_with(tmp_path: Path, results: list[Result]) -> None:
    folder = SweepFolder(tmp_path)
    write_table(folder, results, group_by_settings(results))
    rows = [json.loads(line) for line in folder.rows.read_text().splitlines()]
    assert rows[0] == {
        "run": "temperature=0.1,seed=0",
        "temperature": 0.1,
        "seed": 0,
        "state": "finished",
        "steps": 2,
        "loss": 0.1,
        "entropy": 0.2,
        "greedy_before": 0.25,
        "greedy_after": 0.375,
        "greedy_best": 0.5,
        "greedy_best_step": 1,
        "sampled_before": 0.125,
        "sampled_after": 0.25,
        "sampled_best": 0.25,
        "sampled_best_step": 2,
    }
    assert [row["state"] for row in rows] == ["finished"] * 4 + ["failed", "unfinished"]


def test_without_evaluations_or_finished_runs(tmp_path: Path) -> None:
    runs = write_sweep(tmp_path, {"temperature": (0.1, 0.3)})
    write_run(runs[0], [0.6, 0.5], {}, {})
    results = [read_result(run, failed=run.number == 2) for run in runs]
    head, _, cold, warm, *notes = write_table(SweepFolder(tmp_path), results, group_by_settings(results)).splitlines()
    assert _cells(head) == ["temperature", "runs", "failed", "loss", "entropy"]
    assert _cells(cold) == ["0.1", "1", "0", "0.5000", "1.0000"]
    assert _cells(warm) == ["0.3", "0", "1", "-", "-"]
    assert not any(note.startswith("Accuracies") for note in notes)


def test_a_damaged_file_is_named(tmp_path: Path) -> None:
    [run] = write_sweep(tmp_path, {"seed": (0,)})
    write_run(run, [0.5], {}, {})
    run.folder.metrics.write_text('{"step": 1, "lo')
    with pytest.raises(UsageError, match="seed=0 has a damaged file"):
        read_result(run, failed=False)
