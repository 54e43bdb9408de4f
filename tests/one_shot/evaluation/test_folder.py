from pathlib import Path
from typing import Any

import pytest

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.folder import output_folder

_SETTINGS: dict[str, Any] = {"samples": 4, "temperatures": (0.0, 1.0)}


def _fill(path: Path) -> None:
    with output_folder(path, _SETTINGS, {}, resume=False):
        (path / "completions.jsonl").write_text("a line\nhalf a l")


def test_a_folder_is_resumed_after_its_last_whole_line(tmp_path: Path) -> None:
    _fill(tmp_path / "out")
    (tmp_path / "out" / ".unfinished-1-table.md").write_text("")
    with output_folder(tmp_path / "out", _SETTINGS, {}, resume=True):
        assert (tmp_path / "out" / "completions.jsonl").read_text() == "a line\n"
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["completions.jsonl", "config.json"]


@pytest.mark.parametrize(
    ("resume", "settings", "message"),
    [
        (False, _SETTINGS, "out is not empty; --resume goes on with what is in it, --output names"),
        (True, {**_SETTINGS, "samples": 8}, r"made by other settings: samples: 4, not 8$"),
        (True, {"temperatures": (0.0,)}, r"samples: 4, not None; temperatures: \[0.0, 1.0\], not \[0.0\]$"),
    ],
)
def test_a_folder_with_something_in_it(tmp_path: Path, resume: bool, settings: Any, message: str) -> None:
    _fill(tmp_path / "out")
    with pytest.raises(UsageError, match=message), output_folder(tmp_path / "out", settings, {}, resume=resume):
        pass
    assert (tmp_path / "out" / "config.json").exists()


def test_whose_results_are_in_the_way(tmp_path: Path) -> None:
    settings = {"models": {"built-in": None, "a/b": "a/b"}}
    with output_folder(tmp_path / "out", settings, {}, resume=False, kept="measured"):
        (tmp_path / "out" / "measured").mkdir()
    message = r"is not empty \(it holds completions of built-in, a/b\); --resume"
    with pytest.raises(UsageError, match=message), output_folder(tmp_path / "out", settings, {}, resume=False):
        pass


def test_a_folder_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("")
    with pytest.raises(UsageError, match="holds nothing to resume"), output_folder(tmp_path, {}, {}, resume=True):
        pass


def test_one_process_holds_the_folder(tmp_path: Path) -> None:
    with (
        output_folder(tmp_path / "out", _SETTINGS, {}, resume=False),
        pytest.raises(UsageError, match="in use by process"),
        output_folder(tmp_path / "out", _SETTINGS, {}, resume=True),
    ):
        pass


def test_nothing_is_left_of_what_did_not_start(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        with pytest.raises(ZeroDivisionError), output_folder(tmp_path / name, _SETTINGS, {}, resume=False):
            1 / 0  # noqa: B018
    assert list(tmp_path.rglob("*")) == [tmp_path / "empty"]
