from pathlib import Path

import numpy
import pytest
from matplotlib import image

from em_kernels.one_shot.evaluation.evaluation import Completion
from em_kernels.one_shot.runs.pictures import _COLUMNS, _ROWS, _layout, draw_report, write_completions


def _completion(tokens: list[str], entropy: float = 0.5) -> Completion:
    return Completion("2 + 2?", "".join(tokens).removesuffix("<end>"), tokens, [entropy] * len(tokens))


def test_completions_as_text(tmp_path: Path) -> None:
    before, after = _completion(["It", " is", " 5"], 1.5), _completion(["<end>"], 0.25)
    write_completions(tmp_path / "c.txt", [before], [after])
    text = (tmp_path / "c.txt").read_text()
    assert "PROMPT\n2 + 2?\n" in text
    assert "BEFORE (mean entropy 1.500 nats over 3 tokens)\nIt is 5\n" in text
    assert "AFTER (mean entropy 0.250 nats over 1 tokens)\n(nothing)\n" in text


def test_layout_breaks_lines_between_words_and_keeps_the_rest() -> None:
    words = [f" w{i}" for i in range(60)]
    placed = _layout([_completion(["go\n", *words], 1.0), _completion(["x" * 200], 2.0)])
    rows: dict[int, str] = {}
    for row, column, character, _ in placed:
        assert len(rows.get(row, "")) == column < _COLUMNS
        rows[row] = rows.get(row, "") + character
    assert rows[0] == "go↵"
    second = min(row for row in rows if "x" in rows[row])
    assert " ".join(rows[row] for row in range(1, second - 1)).split() == "".join(words).split()
    assert second - 1 not in rows
    assert {entropy for row, _, _, entropy in placed if row >= second} == {2.0}


def test_text_beyond_the_grid_is_cut_off() -> None:
    placed = _layout([_completion(["a\n"] * 100)])
    assert max(row for row, *_ in placed) == _ROWS - 1


@pytest.mark.parametrize("before", [0.0, 1.9], ids=["sure", "unsure"])
def test_picture_shows_entropy_as_colour(tmp_path: Path, before: float) -> None:
    target = tmp_path / "report.png"
    tokens = ["\u4e2d", " $x_1", " and"] * 20
    draw_report(
        target,
        [{"step": step, "loss": 0.25 / step, "decided": 0.125} for step in (1, 2, 3)],
        [_completion(tokens, before)],
        [_completion(tokens, 0.0)],
        temperature=0.5,
        accuracies=("greedy 25.0% ± 7.7%", ""),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    pixels = image.imread(target)[..., :3]
    height, width, _ = pixels.shape
    # The panel of completions before training, without the colour bar at the right.
    panel = pixels[: height // 2, int(width * 0.42) : int(width * 0.9)]
    deep_red = (panel[..., 0] > 0.4) & (panel[..., 1] < 0.2) & (panel[..., 2] < 0.3)
    assert bool(numpy.mean(deep_red) > 0.05) is (before > 1)
