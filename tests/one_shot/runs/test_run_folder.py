import shutil
from pathlib import Path
from typing import Any

import pytest

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.runs.folder import RunFolder


def test_a_checkpoint_that_is_half_removed_is_no_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunFolder(tmp_path)
    for folder in (run.checkpoint, run.checkpoint_after(2), run.state(2)):
        folder.mkdir()
        (folder / "model.safetensors").touch()

    def killed(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            run.begin(TrainConfig(steps=3), {"processes": 1})
    assert not run.checkpoint.exists()
    run.begin(TrainConfig(steps=3), {"processes": 1})
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "checkpoint-2",
        "config.json",
        "metrics.jsonl",
        "state-2",
    ]
