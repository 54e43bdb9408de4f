import json
import math
from pathlib import Path
from typing import Any

import pytest
from drawn import bands, error_bars, lines
from matplotlib import image
from run_folders import metrics_row, write_lines, write_run

from em_kernels.cli import main
from em_kernels.one_shot.analysis.built_in import BUILT_IN_NOTE
from em_kernels.one_shot.analysis.groups import Group, band_of, named_groups
from em_kernels.one_shot.analysis.report import write_page
from em_kernels.one_shot.analysis.report_pictures import draw_accuracy, draw_curves
from em_kernels.one_shot.analysis.report_rows import report_rows
from em_kernels.one_shot.analysis.runs import read_run
from em_kernels.one_shot.json_lines import json_line

_WORSE, _BETTER = [True] * 2 + [False] * 10, [True] * 8 + [False] * 4


def _page(*folders: Path) -> str:
    return write_page(named_groups(read_run(folder) for folder in folders))


def _cells(page: str, start: str) -> list[list[str]]:
    """The cells of the rows that begin with a text."""
    lines = [line for line in page.splitlines() if line.startswith(f"| {start}")]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_a_band_is_the_mean_and_the_deviation_over_the_runs_that_got_there() -> None:
    band = band_of([{1: 1.0, 2: 4.0}, {1: 3.0}])
    assert band.steps == [1, 2]
    assert band.mean == [2.0, 4.0]
    assert band.deviation[0] == pytest.approx(math.sqrt(2))
    assert math.isnan(band.deviation[1])


def test_groups_are_named_by_what_differs(tmp_path: Path) -> None:
    one = [write_run(tmp_path / f"one{seed}", seed=seed, prompts=("a",)) for seed in range(2)]
    many = write_run(tmp_path / "many", prompts=("a", "b"), temperature=0.7, learning_rate=1e-4)
    first, second = named_groups(read_run(folder) for folder in (*one, many))
    assert (first.title, len(first.runs)) == ("A: 1 prompt (a), learning_rate 2e-05 and 1 more", 2)
    assert second.title == "B: 2 prompts (a ...), learning_rate 0.0001 and 1 more"
    assert [group.title for group in named_groups(read_run(folder) for folder in one)] == ["all"]


def test_the_names_of_groups_tell_them_apart(tmp_path: Path) -> None:
    settings = [("a", 4, 0.5), ("b", 2, 0.3), ("b", 2, 0.7)]
    runs = [
        write_run(tmp_path / prompt / f"{temperature}", prompts=(prompt,), steps=steps, temperature=temperature)
        for prompt, steps, temperature in settings
    ]
    assert [group.title for group in named_groups(map(read_run, runs))] == [
        "A: 1 prompt (a), temperature 0.5 and 1 more",
        "B: 1 prompt (b), temperature 0.3 and 1 more",
        "C: 1 prompt (b), temperature 0.7 and 1 more",
    ]


def test_accuracies_stand_before_after_and_at_their_best_with_paired_differences(tmp_path: Path) -> None:
    page = _page(write_run(tmp_path / "run", verdicts={0: _WORSE, 2: _BETTER, 4: _WORSE}))
    greedy, sampled, *_ = _cells(page, "all   | run")[1:]
    assert greedy == [
        "all",
        "run",
        "greedy",
        "12",
        "16.7% ± 11.2%",
        "16.7% ± 11.2% (after step 4)",
        "66.7% ± 14.2% (after step 2)",
        "+0.0 ± 0.0 points, no difference seen",
        "+50.0 ± 15.1 points",
    ]
    assert sampled[2] == "sampled"
    assert "chosen on the problems that it is shown on" in page


def test_seeds_have_a_mean_and_groups_a_difference_on_the_same_problems(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / f"one{i}", seed=i, verdicts={0: _WORSE, 4: _BETTER}) for i in range(2)]
    folders.append(write_run(tmp_path / "other", temperature=0.9, verdicts={0: _WORSE, 4: _WORSE}))
    page = _page(*folders)
    (mean,) = [row for row in _cells(page, "A ") if row[1] == "mean of 2 seeds" and row[2] == "greedy"]
    assert mean[4:8] == ["16.7% ± 0.0%", "66.7% ± 0.0%", "66.7% ± 0.0%", "+50.0 ± 0.0 points"]
    assert "- Last step, greedy, B less A, problem by problem over all seeds: -50.0 ± 15.1 points." in page
    assert _cells(page, "temperature ")[0] == ["temperature", "0.5", "0.9"]


def test_unlike_versions_unfinished_and_unmeasured_runs_are_said(tmp_path: Path) -> None:
    whole = write_run(tmp_path / "whole", verdicts={0: _WORSE, 4: _BETTER})
    cut = write_run(tmp_path / "cut", finished=False, rows=[metrics_row(1)], versions={"torch": "2.13"})
    empty = write_run(tmp_path / "empty", finished=False, rows=[], seed=7)
    page = _page(whole, cut, empty)
    assert "- torch differs: 2.9 in whole and empty; 2.13 in cut" in page
    assert "- seed differs: 0 in whole and cut; 7 in empty" in page
    assert ", temperature 0.5," in page
    assert "1 of 4 steps, unfinished" in page
    stopped = write_run(tmp_path / "stopped", rows=[metrics_row(1)], stop_when=("loss<0.5",))
    assert "1 of 4 steps, ended by a rule" in _page(stopped)
    assert "- Not measured in: cut, empty." in page
    assert "No run has finished a step" in _page(empty)
    assert "No run has measured its accuracy" in _page(empty)


def test_the_built_in_model_is_said_to_show_the_mechanism_and_not_the_gain(tmp_path: Path) -> None:
    assert BUILT_IN_NOTE in _page(write_run(tmp_path / "built-in"))
    assert BUILT_IN_NOTE not in _page(write_run(tmp_path / "other", model="some/model"))


def test_published_figures_are_marked_and_stand_beside_one_s_own(tmp_path: Path) -> None:
    page = _page(write_run(tmp_path / "run"))
    before, section = page.split("## Published figures")
    assert "arXiv" not in before
    assert _cells(section, "published")[0][0] == "published"
    assert _cells(section, "   1 |")[0] == ["1", "0.0267", "0.4000"]
    assert "31.3" in section
    assert "27.7" in section


def test_the_command_writes_the_page_and_its_pictures(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / f"{i}", seed=i, model="Qwen2.5-Math-7B", verdicts={0: _WORSE}) for i in range(2)]
    output = tmp_path / "report"
    assert main(["report", *map(str, runs), "--output", str(output)]) == 0
    page = (output / "report.md").read_text()
    names = ["accuracy.png", "curves.png", "report.jsonl", "report.md"]
    assert sorted(path.name for path in output.iterdir()) == names
    for name in ("curves.png", "accuracy.png"):
        assert f"({name})" in page
        assert image.imread(output / name).ndim == 3


def _groups(tmp_path: Path) -> list[Group]:
    """Two seeds whose losses are 1 and 3 times 0.4, 0.2, ..., and one run of another temperature."""
    rows = [[metrics_row(step, loss=factor * 0.4 / step) for step in (1, 2)] for factor in (1, 3)]
    verdicts = [{0: _WORSE, 2: _BETTER}, {0: _WORSE, 2: _WORSE}]
    folders = [
        write_run(tmp_path / f"one{i}", seed=i, rows=rows[i], verdicts=verdicts[i], model="Qwen2.5-Math-7B")
        for i in range(2)
    ]
    folders.append(write_run(tmp_path / "other", temperature=0.9, rows=rows[1], verdicts=verdicts[0], model="m"))
    return named_groups(read_run(folder) for folder in folders)


def test_curves_are_means_with_bands_of_the_deviation_over_seeds(tmp_path: Path) -> None:
    groups = _groups(tmp_path)
    losses, _, decided, _, lengths, truncated = draw_curves(groups).axes
    first, second, published = lines(losses).items()
    assert first == (f"{groups[0].title}, 2 seeds", [(1, pytest.approx(0.8)), (2, pytest.approx(0.4))])
    assert second == (f"{groups[1].title}, 1 run", [(1, pytest.approx(1.2)), (2, pytest.approx(0.6))])
    assert published[0].startswith("published: Qwen2.5-Math-7B")
    assert published[1][:2] == [(1, 0.026733), (2, 0.04248)]
    # Two values have a deviation of their distance over the root of 2.
    spread = 0.8 / math.sqrt(2)
    assert bands(losses)[0] == [
        (1, pytest.approx(0.8 - spread), pytest.approx(0.8 + spread)),
        (2, pytest.approx(0.4 - spread / 2), pytest.approx(0.4 + spread / 2)),
    ]
    assert [axes.get_ylabel() for axes in (losses, decided, lengths)] == ["nats per token", "%", "tokens"]
    assert lines(decided)[first[0]] == [(1, 10), (2, 20)]
    assert lines(lengths)[first[0]] == [(1, 51), (2, 52)]
    assert lines(truncated)[first[0]] == [(1, 25), (2, 25)]


def test_accuracies_that_are_higher_where_sampled_are_in_the_picture(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", verdicts={0: _WORSE, 2: _WORSE})
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    write_lines(run / "evaluations.jsonl", [row | {"accuracy": 0.9} if row["temperature"] else row for row in rows])
    for axes in draw_accuracy(named_groups([read_run(run)])).axes:
        assert axes.get_ylim()[1] > 90


def test_accuracies_have_the_deviation_over_seeds_or_the_error_over_problems(tmp_path: Path) -> None:
    groups = _groups(tmp_path)
    figure = draw_accuracy(groups)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["accuracy, greedy", "accuracy, sampled"]
    error = 100 * math.sqrt(2 / 12 * 10 / 12 / 11), 100 * math.sqrt(8 / 12 * 4 / 12 / 11)
    deviation = 100 * (8 - 2) / 12 / math.sqrt(2)
    for axes in figure.axes:
        assert error_bars(axes) == [
            (
                f"{groups[0].title}, deviation over seeds",
                [(0, pytest.approx(100 / 6), 0), (2, pytest.approx(500 / 12), pytest.approx(deviation))],
            ),
            (
                f"{groups[1].title}, standard error over problems",
                [
                    (0.08, pytest.approx(100 / 6), pytest.approx(error[0])),
                    (2.08, pytest.approx(800 / 12), pytest.approx(error[1])),
                ],
            ),
        ]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == [label for label, _ in error_bars(axes)]


def test_every_number_of_the_page_is_in_a_row(tmp_path: Path) -> None:
    verdicts = {0: _WORSE, 2: _BETTER, 4: _WORSE}
    folders = [write_run(tmp_path / f"one{i}", seed=i, verdicts=verdicts) for i in range(2)]
    folders.append(write_run(tmp_path / "other", temperature=0.9, verdicts={0: _WORSE, 4: _BETTER}))
    groups = named_groups(read_run(folder) for folder in folders)
    rows = [json.loads(json_line(row)) for row in report_rows(groups)]

    def one(**wanted: Any) -> dict[str, Any]:
        (found,) = [row for row in rows if wanted.items() <= row.items()]
        return found

    run = one(what="run", run="one1")
    assert (run["group"], run["settings"]["seed"], run["versions"], run["processes"]) == ("A", 1, {"torch": "2.9"}, 1)
    accuracy = one(what="accuracy", run="one0", decoding="greedy", step=2)
    assert (accuracy["problems"], accuracy["best"], accuracy["last"]) == (12, True, False)
    assert accuracy["accuracy"] == pytest.approx(8 / 12)
    # Six of twelve problems changed from wrong to right: their variance is 12/11 of 1/4.
    change = one(what="change of accuracy", run="one0", decoding="sampled", **{"from": 0, "to": 2})
    assert (change["change"], change["standard_error"]) == pytest.approx((0.5, math.sqrt(0.25 / 11)))
    assert one(what="completions", run="one0", decoding="greedy", step=4)["length_mean"] == 6
    loss = one(what="curve", group="A", metric="loss", step=3)
    assert (loss["mean"], loss["deviation"]) == (pytest.approx(0.4 / 3), pytest.approx(0))
    assert one(what="curve", group="B", metric="loss", step=3)["deviation"] is None
    course = one(what="curve", group="B", metric="accuracy, greedy", step=0)
    assert (course["mean"], course["deviation_over"]) == (pytest.approx(2 / 12), "problems")
    assert course["deviation"] == pytest.approx(math.sqrt(2 / 12 * 10 / 12 / 11))
    means = one(what="means over seeds", group="A", decoding="greedy")
    assert (means["runs"], means["accuracy"]["best"]["mean"]) == (2, pytest.approx(8 / 12))
    assert (means["change"]["last"]["mean"], means["change"]["last"]["standard_error"]) == (0, 0)
    between = one(what="difference of groups", decoding="greedy", group="B", less="A")
    assert between["change"] == pytest.approx(0.5)
    assert one(what="published loss", step=1)["loss"] == 0.026733
    assert one(what="published accuracies", model="Qwen2.5-Math-7B")["percent"]["math500"] == 53.0


def test_runs_that_were_not_evaluated_have_no_picture_of_it(tmp_path: Path) -> None:
    assert main(["report", str(write_run(tmp_path / "run")), "--output", str(tmp_path / "report")]) == 0
    assert sorted(path.name for path in (tmp_path / "report").iterdir()) == ["curves.png", "report.jsonl", "report.md"]
