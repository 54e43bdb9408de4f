import dataclasses
import itertools

import pytest

from em_kernels.cli.sweep import _read_options
from em_kernels.cli.train import read_config
from em_kernels.one_shot.config import PRESETS, TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.sweeps.grid import combinations, read_grid, run_name, train_options


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("temperature=0.1,0.3,1", (0.1, 0.3, 1.0)),
        ("temperature=0.1:0.4:0.1", (0.1, 0.2, 0.3)),
        ("temperature=0.1:0.45:0.1", (0.1, 0.2, 0.3, 0.4)),
        ("learning_rate=1e-5:4e-5:1e-5", (1e-5, 2e-5, 3e-5)),
        ("seed=0:3", (0, 1, 2)),
        ("seed=9,0:6:2,7:4:-2", (9, 0, 2, 4, 7, 5)),
        ("gradient_checkpointing=true,false", (True, False)),
        ("model=none,a/b", (None, "a/b")),
        ('prompts="one, two",three', (("one, two",), ("three",))),
    ],
)
def test_values_have_the_type_of_their_setting(text: str, values: tuple[object, ...]) -> None:
    [(name, read)] = read_grid([text]).items()
    assert name == text.partition("=")[0]
    assert list(map(repr, read)) == list(map(repr, values))


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (
            ["tempo=1"],
            "--grid is 'tempo=1', expected SETTING=VALUES with a setting of model, trust_remote_code, prompts",
        ),
        (["MAY_CHANGE=seed"], "--grid is 'MAY_CHANGE=seed', expected SETTING=VALUES"),
        (["seed"], "--grid is 'seed', expected SETTING=VALUES"),
        (["seed=1", "seed=2"], "--grid seed is given twice"),
        (["seed="], "--grid seed= has no values"),
        (["seed=1,,2"], "--grid seed has the value '', expected an integer or a range"),
        (["model=a,,b"], "--grid model has the value '', expected text"),
        (["seed=3,0:4"], "--grid seed has the value 3 twice"),
        (["seed=3:3"], "--grid seed has the range 3:3, which is empty"),
        (["seed=0:4:0"], "--grid seed has the value '0:4:0', expected an integer or a range"),
        (["seed=0:2:0.5"], "--grid seed has the value '0:2:0.5'"),
        (["seed=1:2:3:4"], "--grid seed has the value '1:2:3:4'"),
        (["temperature=0:inf"], "--grid temperature has the value '0:inf', expected a number or a range"),
        (["shard=yes"], "--grid shard has the value 'yes', expected true or false"),
        (['prompts="one'], "cannot be read"),
    ],
)
def test_bad_grids(texts: list[str], message: str) -> None:
    with pytest.raises(UsageError) as raised:
        read_grid(texts)
    assert message in str(raised.value)


def test_combinations_and_their_names() -> None:
    grid = read_grid(["temperature=0.1,1", "seed=3,4"])
    assert [run_name(settings) for settings in combinations(grid)] == [
        "temperature=0.1,seed=3",
        "temperature=0.1,seed=4",
        "temperature=1,seed=3",
        "temperature=1,seed=4",
    ]


def test_names_tell_apart_what_no_file_can_be_called() -> None:
    models = ["a/b", "a-b", "a b", "none/", "x" * 40 + "1", "x" * 40 + "2"]
    names = [run_name({"model": model}) for model in models]
    assert names[1] == "model=a-b"
    assert len(set(names)) == len(models)
    assert not any("/" in name or len(name) > 50 for name in names)


# Another value than the presets' of each setting that is no number or switch there.
_OTHER: dict[str, object] = {
    "prompts": ("-1, or two?",),
    "model": "m",
    "dtype": "bfloat16",
    "optimizer": "adamw8bit",
    "loss": "logits",
    "report_to": "tensorboard",
    "system": "Think.",
    "chat_template": "plain",
    "stop": ("\n\n",),
    "stop_when": ("loss<0.1",),
    "average": "sequences",
    "top_p": 0.5,
    "evaluation_file": "problems.jsonl",
    "evaluation_tokens": 5,
}


@pytest.mark.parametrize(
    ("preset", "name"), [*itertools.product(PRESETS, (field.name for field in dataclasses.fields(TrainConfig)))]
)
def test_train_reads_what_the_grid_sets(preset: str, name: str) -> None:
    before = getattr(PRESETS[preset], name)
    value = _OTHER[name] if name in _OTHER else not before if isinstance(before, bool) else before + 1
    settings = {name: value, **({"dtype": "bfloat16"} if name == "optimizer" else {})}
    options = _read_options(["--preset", preset, *train_options(settings)])
    assert read_config(**options) == dataclasses.replace(PRESETS[preset], **settings)
