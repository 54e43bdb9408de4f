import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from drawn import error_bars
from matplotlib import image
from run_folders import record, write_run

from em_kernels.cli import main
from em_kernels.one_shot.analysis.calibration import Bin, Logprobs, Votes, measure_logprobs, measure_votes
from em_kernels.one_shot.analysis.calibration_page import Calibration, describe_calibration, draw_calibration
from em_kernels.one_shot.evaluation.records import Record, append_records
from em_kernels.one_shot.evaluation.statistics import Estimate


def _different(answer: str, other: str) -> bool:
    return False


def _problem(number: int, answers: Sequence[str | None], gold: str = "1") -> list[Record]:
    """Completions of a problem with these answers; None answers nothing."""
    records = [record(number, sample=i, verdict=answer == gold, answer=answer) for i, answer in enumerate(answers)]
    return [one if one.answer else dataclasses.replace(one, verdict="unreadable") for one in records]


def test_votes_are_binned_by_their_share_of_all_completions() -> None:
    records = [
        *_problem(0, ["1", "1", "2", None]),  # right with a half
        *_problem(1, ["2", "2", "1", "3"]),  # wrong with a half
        *_problem(2, ["1"] * 4),  # right with all
        *_problem(3, [None] * 4),  # no vote
        *_problem(4, ["1"]),  # a single completion is no vote
    ]
    votes = measure_votes(records, _different)
    assert votes is not None
    assert [(one.count, one.confidence, one.accuracy.mean) for one in votes.bins] == [(2, 0.5, 0.5), (1, 1.0, 1.0)]
    assert votes.silent == 1
    assert votes.accuracy.mean == pytest.approx(2 / 3)
    assert votes.confidence == pytest.approx(2 / 3)
    assert votes.error == 0


def test_the_calibration_error_is_the_mean_distance_of_the_bins() -> None:
    records = [
        *(record for i in range(3) for record in _problem(i, ["2", "2", "2", "1"])),  # wrong with three quarters
        *_problem(3, ["1", "1"]),
        *_problem(4, ["2", "2"]),
    ]
    votes = measure_votes(records, _different)
    assert votes is not None
    assert votes.error == pytest.approx((3 * 0.75 + 2 * 0.5) / 5)


def test_answers_that_are_the_same_vote_together() -> None:
    records = _problem(0, ["2", "1/2", "0.5"], gold="1/2")
    records[2] = record(0, sample=2, verdict=True, answer="0.5")
    votes = measure_votes(records, lambda answer, other: True)
    assert votes is not None
    assert (votes.confidence, votes.accuracy.mean) == (pytest.approx(2 / 3), 1.0)


def test_nobody_votes_where_each_problem_has_one_completion() -> None:
    assert measure_votes([record(i, verdict=True) for i in range(3)], _different) is None


def test_accuracy_by_fifths_of_log_probability() -> None:
    random = np.random.default_rng(0)
    logprobs = random.permutation(-np.arange(1.0, 101.0))
    records = [record(i, verdict=bool(value > -41), logprob=float(value)) for i, value in enumerate(logprobs)]
    measured = measure_logprobs([*records, record(100, verdict=True)])
    assert measured is not None
    assert [(one.count, one.confidence, one.accuracy.mean) for one in measured.bins] == [
        (20, -90.5, 0.0),
        (20, -70.5, 0.0),
        (20, -50.5, 0.0),
        (20, -30.5, 1.0),
        (20, -10.5, 1.0),
    ]
    assert measured.order == 1
    assert math.isnan(measured.order_within)


def test_the_order_of_pairs_is_that_of_all_pairs_and_of_those_of_one_problem() -> None:
    values = [(0, True, -1.0), (0, False, -2.0), (0, False, -0.5), (1, True, -3.0), (1, False, -3.0)]
    records = [record(p, verdict=v, sample=i, logprob=x) for i, (p, v, x) in enumerate(values)]
    measured = measure_logprobs(records)
    assert measured is not None
    # Of the pairs of -1 and -3 with the wrong ones, -2, -0.5 and -3: 1 + 0 + 1 and 0 + 0 + 1/2.
    assert measured.order == pytest.approx(2.5 / 6)
    assert measured.order_within == pytest.approx((1 + 0 + 0.5) / 3)


def _write(path: Path, records: Sequence[Record]) -> Path:
    append_records(path, records)
    return path


def test_the_command_tells_models_and_files_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    records = [
        record(i, verdict=i % 3 == j, sample=j, model=model, temperature=0.7, answer=r"\frac12", logprob=-0.1 * i - j)
        for model in ("base", "trained")
        for i in range(12)
        for j in range(3)
    ]
    first = _write(tmp_path / "completions.jsonl", records)
    greedy = _write(tmp_path / "greedy.jsonl", [record(i, verdict=True, temperature=0.0) for i in range(3)])
    output = tmp_path / "output"
    assert main(["analyze", "calibration", str(first), str(greedy), "--output", str(output)]) == 0
    rows = [json.loads(line) for line in (output / "calibration.jsonl").read_text().splitlines()]
    names = [row["of"].rpartition(", ")[0] for row in rows]
    assert names == ["base, built-in, temperature 0.7", "trained, built-in, temperature 0.7", "built-in, greedy"]
    # A right and a wrong answer that are written alike are different votes.
    assert rows[0]["votes"]["confidence"] == pytest.approx(2 / 3)
    assert sum(one["count"] for one in rows[1]["logprobs"]["bins"]) == 36
    assert (rows[2]["votes"], rows[2]["logprobs"]) == (None, None)
    text = (output / "calibration.md").read_text()
    assert text in capsys.readouterr().out
    assert f"- {first}: not known, as no config.json lies beside it" in text
    assert "No votes" in text
    assert "No log-probabilities" in text
    assert image.imread(output / "calibration.png").ndim == 3


def test_the_picture_has_the_bins_of_each_cell() -> None:
    accuracy = Estimate(0.25, 0.125)
    votes = Votes([Bin(3, 0.5, accuracy), Bin(1, 0.75, Estimate(1.0, math.nan))], 0, 0.5, accuracy, 0.1)
    figure = draw_calibration(
        {"a": Calibration(votes, None), "b": Calibration(None, Logprobs([Bin(2, -0.5, accuracy)], 0.5, 0.5))}
    )
    by_votes, by_logprob = figure.axes
    assert {text.get_text() for text in figure.legends[0].get_texts()} == {"a", "b"}
    assert error_bars(by_votes) == [("a", [(50, 25, 12.5), (75, 100, 0)])]
    assert error_bars(by_logprob) == [("b", [(-0.5, 25, 12.5)])]


@pytest.mark.parametrize(
    ("order", "within", "said"),
    [
        (0.5, 0.25, "log-probability in 50.0% of all pairs (50 % is chance); in 25.0% of the pairs of one problem, in"),
        (
            0.5,
            math.nan,
            "log-probability in 50.0% of all pairs (50 % is chance); there is no such pair of one problem.",
        ),
        (math.nan, math.nan, "All completions are right, or all are wrong, so"),
    ],
)
def test_the_page_says_what_the_order_of_pairs_is(order: float, within: float, said: str) -> None:
    bins = [Bin(2, -0.5, Estimate(0.25, 0.125))]
    page = "\n".join(describe_calibration({"a": Calibration(None, Logprobs(bins, order, within))}, []))
    assert said in page
    assert "nan" not in page


def test_the_settings_of_each_file_are_named(tmp_path: Path) -> None:
    """Those of evaluate lie beside the completions, and those of train beside the evaluations."""
    run = write_run(tmp_path / "run", verdicts={0: [True, False]}, versions={"torch": "2.13"}, seed=4)
    drawn = tmp_path / "drawn"
    drawn.mkdir()
    settings = {"settings": {"models": {"m": "a/b"}, "seed": 5}, "versions": {"torch": "2.9"}, "device": "cpu"}
    (drawn / "config.json").write_text(json.dumps(settings))
    files = [run / "evaluations" / "step-0.jsonl", _write(drawn / "completions.jsonl", [record(0, verdict=True)])]
    assert main(["analyze", "calibration", *map(str, files), "--output", str(tmp_path / "output")]) == 0
    text = (tmp_path / "output" / "calibration.md").read_text()
    assert f"- seed differs: 4 in {files[0]}; 5 in {files[1]}" in text
    assert f"- torch differs: 2.13 in {files[0]}; 2.9 in {files[1]}" in text
    assert "not known" not in text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"task": "x"}\n', "{path}, line 1: expected a graded completion as evaluate, select and train write it"),
        ("", "{path} has no graded completions, expected the completions.jsonl of evaluate"),
    ],
)
def test_a_file_of_something_else_is_one_line(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "completions.jsonl"
    path.write_text(text)
    assert main(["analyze", "calibration", str(path), "--output", str(tmp_path / "output")]) == 2
    assert capsys.readouterr().err == f"em-kernels analyze: error: {message.format(path=path)}\n"
    assert not (tmp_path / "output").exists()
