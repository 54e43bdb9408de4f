import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from written_runs import changed, write_run

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.sweeps.folder import Run, SweepFolder
from em_kernels.one_shot.sweeps.sweep import sweep

_GRID = {"temperature": (0.1, 0.3), "seed": (0, 1)}


def _open(path: Path, config: TrainConfig, grid: dict[str, Any], *, resume: bool) -> list[Run]:
    config_of = partial(changed, config)
    folder = SweepFolder(path)
    return folder.begin(config_of, folder.check(config_of, grid, resume=resume))


def test_a_run_folder_for_each_combination(tmp_path: Path) -> None:
    runs = _open(tmp_path / "s", TrainConfig(seed=9), _GRID, resume=False)
    assert [(run.number, run.name) for run in runs] == [
        (1, "temperature=0.1,seed=0"),
        (2, "temperature=0.1,seed=1"),
        (3, "temperature=0.3,seed=0"),
        (4, "temperature=0.3,seed=1"),
    ]
    assert runs[3].settings == {"temperature": 0.3, "seed": 1}
    assert runs[3].config == TrainConfig(temperature=0.3, seed=1)
    assert runs[3].folder.path.parent == tmp_path / "s" / "runs"
    assert runs[3].log == tmp_path / "s" / "logs" / "temperature=0.3,seed=1.log"
    assert runs[3].log.parent.is_dir()
    written = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert written["grid"] == {"temperature": [0.1, 0.3], "seed": [0, 1]}
    assert written["settings"]["steps"] == 10
    assert "seed" not in written["settings"]


def test_a_resumed_grid_may_grow(tmp_path: Path) -> None:
    prompts = {"prompts": (("one",), ("two",)), "seed": (0,)}
    first, _ = _open(tmp_path, TrainConfig(), prompts, resume=True)
    write_run(first, [1.0], {}, {})
    runs = _open(tmp_path, TrainConfig(), {"seed": (2,), "prompts": (("two",), ("new",))}, resume=True)
    assert [run.name for run in runs] == [
        "prompts=one,seed=0",
        "prompts=one,seed=2",
        "prompts=two,seed=0",
        "prompts=two,seed=2",
        "prompts=new,seed=0",
        "prompts=new,seed=2",
    ]
    assert len(_open(tmp_path, TrainConfig(), prompts, resume=True)) == 6


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
    [run, *_] = _open(tmp_path, TrainConfig(), _GRID, resume=False)
    write_run(run, [1.0], {}, {}, finished=False)
    before = (tmp_path / "sweep.json").read_bytes()
    with pytest.raises(UsageError) as raised:
        _open(tmp_path, config, grid, resume=resume)
    assert message in str(raised.value)
    assert (tmp_path / "sweep.json").read_bytes() == before


def test_a_sweep_none_of_whose_runs_began_gives_way(tmp_path: Path) -> None:
    _open(tmp_path, TrainConfig(model="mistyped"), _GRID, resume=False)
    assert len(_open(tmp_path, TrainConfig(model="right"), _GRID, resume=False)) == 4
    assert json.loads((tmp_path / "sweep.json").read_text())["settings"]["model"] == "right"


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_of_something_else_is_refused(tmp_path: Path, resume: bool) -> None:
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match=r"is not empty, but holds no sweep \(no sweep.json\)"):
        _open(tmp_path, TrainConfig(), _GRID, resume=resume)


@pytest.mark.parametrize("text", ['{"grid": [', '{"grid": 3, "settings": {}}', "[]"])
def test_a_damaged_description_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "sweep.json").write_text(text)
    (tmp_path / "runs" / "seed=0").mkdir(parents=True)
    with pytest.raises(UsageError, match=r"sweep.json is not of a sweep of this version"):
        _open(tmp_path, TrainConfig(), _GRID, resume=True)


def test_a_refused_value_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="steps is 0"):
        _open(tmp_path / "s", TrainConfig(), {"steps": (1, 0)}, resume=False)
    assert not (tmp_path / "s").exists()


def test_a_run_that_ended_after_its_sweep_was_killed_keeps_no_state(tmp_path: Path) -> None:
    config = TrainConfig(steps=2)
    runs = _open(tmp_path / "s", config, {"seed": (0, 1)}, resume=False)
    write_run(runs[0], [0.2, 0.1], {}, {})
    write_run(runs[1], [0.2], {}, {}, finished=False)
    for run, step in zip(runs, (2, 1), strict=True):
        run.folder.state(step).mkdir()
    sweep(partial(changed, config), {"seed": (0, 1)}, tmp_path / "s", resume=True, launcher=lambda *_, **__: iter(()))
    assert [run.folder.kept_step() for run in runs] == [0, 1]
