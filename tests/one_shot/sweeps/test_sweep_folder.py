import json
from pathlib import Path
from typing import Any

import pytest

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.sweeps.folder import SweepFolder

_GRID = {"temperature": (0.1, 0.3), "seed": (0, 1)}


def test_a_run_folder_for_each_combination(tmp_path: Path) -> None:
    runs = SweepFolder(tmp_path / "s").open(TrainConfig(seed=9), _GRID, resume=False)
    assert [(run.number, run.name) for run in runs] == [
        (1, "temperature=0.1,seed=0"),
        (2, "temperature=0.1,seed=1"),
        (3, "temperature=0.3,seed=0"),
        (4, "temperature=0.3,seed=1"),
    ]
    assert runs[3].settings == {"temperature": 0.3, "seed": 1}
    assert runs[3].folder.parent == tmp_path / "s" / "runs"
    assert runs[3].log == tmp_path / "s" / "logs" / "temperature=0.3,seed=1.log"
    assert runs[3].log.parent.is_dir()
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert written["grid"] == {"temperature": [0.1, 0.3], "seed": [0, 1]}
    assert written["settings"]["steps"] == 10
    assert "seed" not in written["settings"]


def test_a_resumed_grid_may_grow(tmp_path: Path) -> None:
    prompts = {"prompts": (("one",), ("two",)), "seed": (0,)}
    SweepFolder(tmp_path).open(TrainConfig(), prompts, resume=True)
    runs = SweepFolder(tmp_path).open(TrainConfig(), {"seed": (2,), "prompts": (("two",), ("new",))}, resume=True)
    assert [run.name for run in runs] == [
        "prompts=one,seed=0",
        "prompts=one,seed=2",
        "prompts=two,seed=0",
        "prompts=two,seed=2",
        "prompts=new,seed=0",
        "prompts=new,seed=2",
    ]
    assert len(SweepFolder(tmp_path).open(TrainConfig(), prompts, resume=True)) == 6


@pytest.mark.parametrize(
    ("config", "grid", "resume", "message"),
    [
        (TrainConfig(), _GRID, False, "is not empty; --resume continues the sweep in it"),
        (TrainConfig(steps=4), _GRID, True, "has other settings: steps: 10, not 4"),
        (TrainConfig(), {"seed": (0, 1)}, True, "has a grid of temperature, seed, not seed;"),
        (TrainConfig(), {"temperature": (0.1, -1.0), "seed": (0,)}, True, "temperature is -1.0, expected a finite"),
    ],
    ids=["not to be resumed", "other settings", "other grid", "refused value"],
)
def test_another_sweep_is_refused(
    tmp_path: Path, config: TrainConfig, grid: dict[str, Any], resume: bool, message: str
) -> None:
    SweepFolder(tmp_path).open(TrainConfig(), _GRID, resume=False)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(UsageError) as raised:
        SweepFolder(tmp_path).open(config, grid, resume=resume)
    assert message in str(raised.value)
    assert (tmp_path / "sweep.json").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("notes.txt", "mine", "holds no sweep to resume (no sweep.json)"),
        ("sweep.json", '{"grid": [', "sweep.json is not of a sweep of this version"),
        ("sweep.json", '{"grid": 3, "settings": {}}', "sweep.json is not of a sweep of this version"),
    ],
)
def test_a_folder_of_something_else_is_refused(tmp_path: Path, name: str, text: str, message: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError) as raised:
        SweepFolder(tmp_path).open(TrainConfig(), _GRID, resume=True)
    assert message in str(raised.value)


def test_a_refused_value_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps is 0"):
        SweepFolder(tmp_path / "s").open(TrainConfig(), {"steps": (1, 0)}, resume=False)
    assert not (tmp_path / "s").exists()
