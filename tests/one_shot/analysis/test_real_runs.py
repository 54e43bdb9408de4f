"""The analyses of runs that the training of a tiny model has left."""

import dataclasses
from pathlib import Path
from statistics import fmean

import pytest

from em_kernels.cli import main
from em_kernels.one_shot.analysis.accuracies import courses, difference
from em_kernels.one_shot.analysis.groups import named_groups
from em_kernels.one_shot.analysis.report import write_page
from em_kernels.one_shot.analysis.runs import read_run
from em_kernels.one_shot.analysis.steps import describe_steps
from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.training import train

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folders(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs that differ in the seed."""
    config = TrainConfig(
        model=str(tiny_folder),
        prompts=("2+2?",),
        steps=2,
        learning_rate=1e-3,
        batch_size=2,
        micro_batch_size=2,
        max_new_tokens=6,
        evaluation_size=3,
        evaluate_every=1,
    )
    parent = tmp_path_factory.mktemp("runs")
    for seed in range(2):
        train(dataclasses.replace(config, seed=seed), parent / f"{seed}")
    return [parent / "0", parent / "1"]


def test_accuracies_are_those_of_the_kept_completions(folders: list[Path]) -> None:
    run = read_run(folders[0])
    assert [course.decoding for course in courses(run)] == ["greedy", "sampled"]
    for course, temperature in zip(courses(run), (0.0, 1.0), strict=True):
        assert sorted(course.by_step) == [0, 1, 2]
        for step, accuracy in course.by_step.items():
            right = [record.verdict == "right" for record in run.records(step) if record.temperature == temperature]
            assert len(right) == course.problems == 3
            assert accuracy.mean == pytest.approx(fmean(right))
        assert difference(run, course.decoding, 0, 2) is not None


def test_every_column_of_the_tables_is_filled(folders: list[Path]) -> None:
    lines = describe_steps(read_run(folders[0]))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    columns = "step loss entropy decided mean-length longest truncated repeated KL greedy sampled"
    assert " ".join(name.replace(" ", "-") for name in rows[0]) == columns
    assert all(rows[4])
    assert not any("unfinished" in line for line in lines)


def test_runs_of_two_seeds_are_a_group_with_bands(folders: list[Path]) -> None:
    (group,) = named_groups(read_run(folder) for folder in folders)
    page = write_page([group])
    assert "The runs differ in nothing but the seed." in page
    assert "mean of 2 seeds" in page
    assert "not measured" not in page
    assert group.band("loss").deviation[0] > 0


def test_calibration_reads_the_completions_of_an_evaluation(folders: list[Path], tmp_path: Path) -> None:
    records = folders[0] / "evaluations" / "step-0.jsonl"
    assert main(["analyze", "calibration", str(records), "--output", str(tmp_path)]) == 0
    assert "built-in, greedy" in (tmp_path / "calibration.md").read_text()


def test_a_run_folder_is_a_model(folders: list[Path], tmp_path: Path) -> None:
    options = ["--prompt", "2+2?", "--max-new-tokens", "4", "--output", str(tmp_path)]
    assert main(["analyze", "logits", *map(str, folders), *options]) == 0
    assert "| 0 " in (tmp_path / "logits.md").read_text()
