import pytest

from em_kernels.one_shot.schedule import prompts_for

_PROMPTS = [str(i) for i in range(100)]


def test_every_prompt_is_taken_before_any_is_taken_again() -> None:
    taken = prompts_for(_PROMPTS, range(250), seed=0)
    for turn in (taken[:100], taken[100:200]):
        assert sorted(turn) == sorted(_PROMPTS)
    assert len(set(taken[200:])) == 50


@pytest.mark.parametrize("other", [{"completions": range(100, 200), "seed": 0}, {"completions": range(100), "seed": 1}])
def test_each_turn_and_each_seed_has_an_order_of_its_own(other: dict[str, object]) -> None:
    taken = prompts_for(_PROMPTS, range(100), seed=0)
    assert taken != _PROMPTS
    assert prompts_for(_PROMPTS, **other) != taken


def test_processes_and_steps_take_their_parts_of_one_order() -> None:
    whole = prompts_for(_PROMPTS, range(130), seed=3)
    assert prompts_for(_PROMPTS, range(90), seed=3) + prompts_for(_PROMPTS, range(90, 130), seed=3) == whole
