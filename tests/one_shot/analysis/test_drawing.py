from em_kernels.one_shot.analysis.drawing import begin_at_zero, new_axes


def test_dots_at_both_ends_of_the_axis_are_whole() -> None:
    _, [axes] = new_axes(1, 1)
    axes.plot([1, 2, 3], [42, 46, 0], marker="o")
    axes.set_ylim(40, 46)
    begin_at_zero(axes)
    low, high = axes.get_ylim()
    assert low < -1
    assert high > 47
