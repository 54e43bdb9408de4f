from pathlib import Path

import matplotlib
from matplotlib import image

from em_kernels.one_shot.evaluation.evaluation import Completion
from em_kernels.one_shot.runs.figures import save_figure
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


def test_picture_shows_losses_and_entropy_as_colour() -> None:
    figure = draw_report(
        [{"step": step, "loss": 0.25 / step, "decided": 0.125 * step} for step in (1, 2)],
        [_completion(["su", "re", "."], 0.0), _completion(["\u4e2d$x_1"], 2.0)],
        [_completion([" and"], 1.0)],
        temperature=0.5,
        accuracies=("greedy 25.0% ± 7.7%", ""),
    )
    (loss, decided), (before, after) = (
        [axes for axes in figure.axes if bool(axes.patches) is drawn and axes.get_label() != "<colorbar>"]
        for drawn in (False, True)
    )
    assert list(loss.lines[0].get_ydata()) == [0.25, 0.125]
    assert list(decided.lines[0].get_ydata()) == [12.5, 25]
    assert all(float(step).is_integer() for axes in (loss, decided) for step in axes.get_xticks())
    assert before.get_title(loc="left") == "Before: mean entropy 0.50 nats\naccuracy greedy 25.0% ± 7.7%"
    assert after.get_title(loc="left") == "After: mean entropy 1.00 nats"
    assert [text.get_text() for text in before.texts] == list("sure.\u4e2d$x_1")
    colours = [patch.get_facecolor() for patch in before.patches]
    scale = matplotlib.colormaps["YlOrRd"]
    assert colours == [scale(0.0)] * 5 + [scale(1.0)] * 5
    assert {patch.get_facecolor() for patch in after.patches} == {scale(0.5)}


def test_a_picture_is_a_file_that_opens_whatever_its_characters(tmp_path: Path) -> None:
    completions = [_completion(["\u4e2d", " $x_1", " and"] * 20)]
    figure = draw_report(
        [{"step": 1, "loss": 0.25, "decided": 0.125}], completions, completions, temperature=0.5, accuracies=("", "")
    )
    save_figure(figure, tmp_path / "report.png")
    assert [path.name for path in tmp_path.iterdir()] == ["report.png"]
    assert image.imread(tmp_path / "report.png").ndim == 3
