import json
import os
from pathlib import Path

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.models import NamedModel, find_models


def _run(path: Path, *checkpoints: str) -> str:
    for name in checkpoints:
        (path / name).mkdir(parents=True)
        (path / name / "config.json").write_text('{"model_type": "llama"}')
    path.mkdir(exist_ok=True)
    (path / "config.json").write_text(json.dumps({"config": {"prompts": []}}))
    return str(path)


def test_names_and_folders(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    found = find_models(["built-in", "owner/model", str(tmp_path / "m"), "owner/model"])
    assert found == [
        NamedModel("built-in", None),
        NamedModel("owner/model", "owner/model"),
        NamedModel("m", str(tmp_path / "m")),
        NamedModel("owner/model-2", "owner/model"),
    ]
    assert find_models([]) == [NamedModel("built-in", None)]


def test_a_run_means_its_last_checkpoint(tmp_path: Path) -> None:
    finished = _run(tmp_path / "a", "checkpoint", "checkpoint-4")
    unfinished = _run(tmp_path / "b", "checkpoint-4", "checkpoint-10", "checkpoint-x")
    assert find_models([finished, unfinished]) == [
        NamedModel("a", str(tmp_path / "a" / "checkpoint")),
        NamedModel("b", str(tmp_path / "b" / "checkpoint-10")),
    ]
    one = str(tmp_path / "b" / "checkpoint-4")
    assert find_models([one]) == [NamedModel("b/checkpoint-4", one)]


def test_a_run_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="has no checkpoint yet; train --resume finishes the run"):
        find_models([_run(tmp_path / "a")])


def test_weights_that_were_put_in_the_place_of_others_are_told_apart(tmp_path: Path) -> None:
    [folder] = find_models([str(tmp_path)])
    assert folder.weights is None
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"first")
    first = folder.weights
    assert first == folder.weights
    file.write_bytes(b"other")
    os.utime(file, ns=(0, 0))
    assert folder.weights != first
    assert find_models(["built-in"])[0].weights is None
