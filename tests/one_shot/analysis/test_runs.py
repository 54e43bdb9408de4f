import json
from pathlib import Path

import pytest
from run_folders import metrics_row, write_lines, write_run

from em_kernels.one_shot.analysis.groups import named_groups
from em_kernels.one_shot.analysis.runs import differing, group_runs, read_run, read_runs
from em_kernels.one_shot.errors import UsageError


def test_what_a_folder_says(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "run", steps=2, verdicts={0: [True, False], 2: [True, True]}))
    assert run.values("loss") == {1: 0.4, 2: 0.2}
    assert run.values("never measured") == {}
    assert {step: row["accuracy"] for step, row in run.accuracies("greedy").items()} == {0: 0.5, 2: 1.0}
    assert [record.verdict for record in run.records(0)] == ["right", "wrong"] * 2
    assert run.records(1) == []
    assert run.finished


def test_decodings_are_kept_apart(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    row = {"step": 0, "standard_error": 0.1, "problems": 9}
    greedy, sampled = ({**row, "decoding": name, "accuracy": x} for name, x in (("greedy", 0.5), ("sampled", 0.25)))
    write_lines(folder / "evaluations.jsonl", [greedy, sampled])
    run = read_run(folder)
    assert (run.accuracies("greedy"), run.accuracies("sampled")) == ({0: greedy}, {0: sampled})


def test_names_of_runs_tell_them_apart(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / name) for name in ("a/demo", "b/demo", "b/other")]
    names = [run.name for run in read_runs([*folders, tmp_path / "a" / ".." / "b" / "other"])]
    assert names == [str(folders[0]), str(folders[1]), "other"]


def test_runs_that_differ_in_the_seed_are_a_group(tmp_path: Path) -> None:
    settings = [{"seed": 0}, {"seed": 0, "temperature": 0.7}, {"seed": 1}, {"seed": 1, "report_to": "none"}]
    runs = [read_run(write_run(tmp_path / f"{i}", **values)) for i, values in enumerate(settings)]
    assert [[run.name for run in group] for group in group_runs(runs)] == [["0", "2", "3"], ["1"]]
    assert differing([run.config for run in runs[:2]]) == ["temperature"]


def test_runs_of_other_numbers_of_processes_are_no_seeds_of_each_other(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / f"{i}", seed=i, processes=1 + i // 2)) for i in range(4)]
    assert [[run.name for run in group] for group in group_runs(runs)] == [["0", "1"], ["2", "3"]]
    assert [group.title for group in named_groups(runs)] == ["A: processes 1", "B: processes 2"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("config.json", "{}", "config.json: expected the settings of a training run"),
        ("config.json", "[]", "config.json: expected the settings of a training run"),
        ("metrics.jsonl", '{"step": 1}\n', "metrics.jsonl, line 1: loss is None, expected a number"),
        ("metrics.jsonl", json.dumps(metrics_row(1)) + "\n{", "metrics.jsonl, line 2: not a JSON object"),
        ("evaluations.jsonl", '{"step": 0, "decoding": 3}\n', "evaluations.jsonl, line 1: accuracy is None"),
    ],
)
def test_a_file_that_train_did_not_write_is_named_with_its_line(
    tmp_path: Path, name: str, text: str, message: str
) -> None:
    folder = write_run(tmp_path / "run")
    (folder / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        read_run(folder)


def test_a_folder_without_settings_is_no_run(tmp_path: Path) -> None:
    write_lines(tmp_path / "metrics.jsonl", [metrics_row(1)])
    with pytest.raises(UsageError, match="no run folder: expected a folder that train has written"):
        read_run(tmp_path)
