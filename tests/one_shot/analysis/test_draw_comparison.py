import pytest
from drawn import bands, error_bars
from run_folders import record

from em_kernels.one_shot.analysis.comparison import draw_comparison
from em_kernels.one_shot.evaluation.scores import score


def test_accuracy_by_temperature_with_a_band_a_panel_for_each_task() -> None:
    """Of 4 problems, "weak" answers 1 and "strong" 2 greedily, and both one more at temperature 1."""
    skill = {"weak": 1, "strong": 2}
    records = [
        record(i, verdict=i < right + temperature, task=task, model=model, temperature=temperature)
        for task in ("sums", "products")
        for model, right in skill.items()
        for temperature in (0.0, 1.0)
        for i in range(4)
    ]
    scores = score(records, tasks=["sums", "products"], models=list(skill), ks=[1], same=str.__eq__)
    figure = draw_comparison(scores)
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["sums (4 problems)", "products (4 problems)"]
    quarter, half = pytest.approx(25.0), pytest.approx(100 * (0.25 / 3) ** 0.5)
    for axes in figure.axes:
        assert error_bars(axes) == [
            ("weak", [(0, 25, quarter), (1, 50, half)]),
            ("strong", [(0, 50, half), (1, 75, quarter)]),
        ]
        assert bands(axes)[0][0] == (0, pytest.approx(0), pytest.approx(50))
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(skill)
