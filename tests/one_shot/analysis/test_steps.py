import json
from pathlib import Path

import pytest
from drawn import error_bars, lines
from matplotlib import image
from run_folders import metrics_row, write_run

from em_kernels.cli import main
from em_kernels.one_shot.analysis.built_in import BUILT_IN_NOTE
from em_kernels.one_shot.analysis.runs import read_run
from em_kernels.one_shot.analysis.steps import describe_steps, draw_steps

_RIGHT = {0: [False] * 8, 2: [True] * 6 + [False] * 2, 4: [True] * 4 + [False] * 4}


def test_a_table_has_a_row_a_step_and_an_accuracy_where_it_was_measured(tmp_path: Path) -> None:
    lines = describe_steps(read_run(write_run(tmp_path / "run", verdicts=_RIGHT)))
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][:7]
    assert [row[0] for row in rows] == ["step", "---:", "0", "1", "2", "3", "4"]
    assert rows[0][1:3] == ["loss", "entropy"]
    assert rows[4][1] == "0.2000"
    assert [row[-1] for row in rows[2:]] == ["0.0% ± 0.0%", "", "75.0% ± 16.4%", "", "50.0% ± 18.9%"]


def test_the_best_step_is_said_to_be_chosen_on_what_it_is_shown_on(tmp_path: Path) -> None:
    text = "\n".join(describe_steps(read_run(write_run(tmp_path / "run", verdicts=_RIGHT))))
    assert "8 problems, greedy: accuracy was highest after step 2 (75.0% ± 16.4%); after step 4" in text
    # Two of eight problems fell from right to wrong.
    assert "problem by problem: -25.0 ± 16.4 points, no difference seen." in text
    assert "chosen on the problems that it is shown on" in text


def test_of_several_best_steps_the_earliest_is_named(tmp_path: Path) -> None:
    text = "\n".join(describe_steps(read_run(write_run(tmp_path / "run", verdicts={**_RIGHT, 4: _RIGHT[2]}))))
    assert "highest after step 2 (75.0% ± 16.4%); after step 4, the last step measured, it is 75.0%" in text


def test_accuracy_that_only_fell_was_highest_before_training(tmp_path: Path) -> None:
    text = "\n".join(describe_steps(read_run(write_run(tmp_path / "run", verdicts={0: [True] * 2, 4: [False] * 2}))))
    assert "highest before training (100.0% ± 0.0%)" in text


def test_unfinished_runs_and_unmeasured_accuracies_are_said(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", steps=9, finished=False, rows=[metrics_row(1)])
    text = "\n".join(describe_steps(read_run(folder)))
    assert "unfinished: 1 of 9 steps" in text
    assert "accuracy was not measured" in text
    not_begun = write_run(tmp_path / "other", finished=False, rows=[])
    assert "No step is finished." in describe_steps(read_run(not_begun))


def test_what_each_stopping_rule_would_have_chosen(tmp_path: Path) -> None:
    """The losses are 0.4, 0.2, 0.1333 and 0.1, and 10, 20, 30 and 40 % of the tokens are decided."""
    lines = describe_steps(
        read_run(write_run(tmp_path / "run", verdicts=_RIGHT, stop_when=("decided>0.15", "loss<0.15")))
    )
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    assert ["decided>0.15", "2", "75.0% ± 16.4%", "75.0% ± 16.4%"] in rows
    assert ["loss<0.15", "3", "not measured", "not measured"] in rows
    assert ["decided>0.9", "never", "", ""] in rows
    assert ["agreement-falls", "not measured", "", ""] in rows


def test_the_command_writes_a_table_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, output = write_run(tmp_path / "run", verdicts=_RIGHT), tmp_path / "made" / "output"
    assert main(["analyze", "steps", str(folder), "--output", str(output)]) == 0
    text = (output / "steps.md").read_text()
    assert text in capsys.readouterr().out
    assert BUILT_IN_NOTE in text
    assert "in nats per token, lengths in tokens." in text
    assert image.imread(output / "steps.png").ndim == 3
    assert sorted(path.name for path in output.iterdir()) == ["steps.jsonl", "steps.md", "steps.png"]


def test_settings_and_numbers_are_kept_for_readers_and_scripts(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{seed}", seed=seed, verdicts=_RIGHT, stop_when=("loss<0.15",)) for seed in range(2)]
    output = tmp_path / "output"
    assert main(["analyze", "steps", *map(str, runs), "--output", str(output)]) == 0
    text = (output / "steps.md").read_text()
    assert "\n## Settings\n\n" in text
    assert "- seed differs: 0 in 0; 1 in 1" in text
    assert "- torch 2.9, device cpu" in text
    assert ", temperature 0.5," in text
    rows = [json.loads(line) for line in (output / "steps.jsonl").read_text().splitlines()]
    own = [row for row in rows if row["run"] == "1"]
    assert len(rows) == 2 * len(own)
    assert own[0]["settings"]["seed"] == 1
    steps = [row for row in own if row["what"] == "step"]
    assert [row["loss"] for row in steps] == [0.4 / step for step in (1, 2, 3, 4)]
    assert {row["length_max"] for row in steps} == {64}
    accuracies = [row for row in own if row["what"] == "accuracy" and row["decoding"] == "sampled"]
    assert [(row["step"], row["accuracy"], row["best"]) for row in accuracies] == [
        (0, 0, False),
        (2, 0.75, True),
        (4, 0.5, False),
    ]
    assert {row["rule"]: row["step"] for row in own if row["what"] == "stopping rule"} == {
        "loss<0.15": 3,
        "decided>0.5": None,
        "decided>0.9": None,
        "loss<0.1": None,
        "loss<0.03": None,
        "agreement-falls": None,
    }


def test_the_picture_has_a_line_a_run(tmp_path: Path) -> None:
    runs = [read_run(write_run(tmp_path / name, verdicts=_RIGHT, steps=2 + i)) for i, name in enumerate("ab")]
    losses, accuracy, lengths, shares = draw_steps(runs).axes
    assert lines(losses) == {"a": [(1, 0.4), (2, 0.2)], "b": [(1, 0.4), (2, 0.2), (3, 0.4 / 3)]}
    entropies = [line.get_ydata() for line in losses.lines if line.get_linestyle() == ":"]
    assert [list(values) for values in entropies] == [[0.8, 0.4], [0.8, 0.4, 0.8 / 3]]
    # A run's own bars stand beside those of the others: greedy and sampled ones of a, then those of b.
    greedy, _, beside, _ = (bars for _, bars in error_bars(accuracy))
    assert greedy == [(0, 0, 0), (2, 75, pytest.approx(16.366, abs=1e-3)), (4, 50, pytest.approx(18.898, abs=1e-3))]
    assert [x for x, *_ in beside] == [0.06, 2.06, 4.06]
    assert list(lengths.lines[0].get_ydata()) == [51, 52]
    assert [list(line.get_ydata()) for line in shares.lines[:2]] == [[25, 25], [10, 20]]


def test_a_folder_that_is_no_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["analyze", "steps", str(tmp_path), "--output", str(tmp_path / "output")]) == 2
    assert capsys.readouterr().err == (
        f"em-kernels analyze: error: {tmp_path} is no run folder: expected a folder that train has written, with a "
        "config.json\n"
    )
    assert not (tmp_path / "output").exists()
