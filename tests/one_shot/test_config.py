import dataclasses

import pytest

from em_kernels.one_shot.config import DEFAULT_PROMPT, PRESETS, TrainConfig
from em_kernels.one_shot.errors import UsageError


def test_paper_preset_is_the_published_setting() -> None:
    paper = PRESETS["paper"]
    assert (paper.steps, paper.learning_rate, paper.temperature) == (10, 2e-5, 0.5)
    assert (paper.batch_size, paper.max_new_tokens, paper.max_grad_norm) == (64, 2048, 1.0)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("steps", 0),
        ("steps", 2.5),
        ("steps", True),
        ("batch_size", -1),
        ("micro_batch_size", 0),
        ("max_new_tokens", 0),
        ("seed", -1),
        ("evaluation_size", -1),
        ("learning_rate", 0.0),
        ("temperature", float("nan")),
        ("temperature", "hot"),
        ("max_grad_norm", float("inf")),
        ("dtype", "float16"),
        ("report_to", "paper"),
        ("prompts", ()),
        ("prompts", ("",)),
    ],
)
def test_bad_setting_is_named(name: str, value: object) -> None:
    with pytest.raises(UsageError, match=f"^{name} is .*, expected "):
        TrainConfig(**{name: value})  # pyright: ignore[reportArgumentType]


def test_missing_tracker_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UsageError, match="the package wandb is not installed"):
        TrainConfig(report_to="wandb")


def test_differences_name_each_setting() -> None:
    other = dataclasses.replace(TrainConfig(), steps=3, prompts=("x",))
    assert TrainConfig().differences(other) == [f"prompts: ('x',), not ({DEFAULT_PROMPT!r},)", "steps: 3, not 10"]
    assert TrainConfig().differences(TrainConfig()) == []
