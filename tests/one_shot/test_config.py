import dataclasses
import json

import pytest

from em_kernels.one_shot.config import DEFAULT_PROMPT, PRESETS, TrainConfig
from em_kernels.one_shot.errors import UsageError


def test_paper_preset_is_the_published_setting() -> None:
    paper = PRESETS["paper"]
    assert (paper.steps, paper.learning_rate, paper.temperature) == (10, 2e-5, 0.5)
    assert (paper.batch_size, paper.max_new_tokens, paper.max_grad_norm) == (64, 2048, 1.0)


def test_authors_preset_is_the_published_script() -> None:
    authors = PRESETS["authors"]
    assert (authors.steps, authors.learning_rate, authors.temperature, authors.batch_size) == (10, 2e-5, 0.5, 64)
    assert (authors.top_p, authors.top_k, authors.repetition_penalty) == (0.95, 50, 1.15)
    assert (authors.max_new_tokens, authors.seed) == (512, 15)


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
        ("top_p", 1.5),
        ("top_k", -1),
        ("repetition_penalty", 0),
        ("average", "prompts"),
        ("stop_when", ("decided>", "loss<0.1")),
        ("evaluation_seed", -1),
        ("evaluation_tokens", 0),
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


def test_falling_agreement_needs_evaluations() -> None:
    with pytest.raises(UsageError, match="'agreement-falls', which needs evaluate_every and evaluation_size above 0"):
        TrainConfig(stop_when=("agreement-falls",))
    TrainConfig(stop_when=("agreement-falls",), evaluate_every=1)


def test_differences_name_each_setting_that_must_not_change() -> None:
    other = dataclasses.replace(TrainConfig(), steps=3, micro_batch_size=1, prompts=("x",), seed=2)
    assert TrainConfig().differences(other) == [f"prompts: ('x',), not ({DEFAULT_PROMPT!r},)", "seed: 2, not 0"]
    assert TrainConfig().differences(TrainConfig()) == []


def test_settings_survive_json() -> None:
    config = TrainConfig(prompts=("1", "2"), stop=("x",), stop_when=("loss<1",))
    assert TrainConfig.from_json(json.loads(json.dumps(dataclasses.asdict(config)))) == config
