from pathlib import Path

import pytest

from em_kernels.one_shot.runs.files import remove_unfinished, whole_or_absent, write_text


def test_file_replaces_the_earlier_one(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")
    write_text(target, "new")
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("error", [OSError("full"), KeyboardInterrupt()], ids=["error", "ctrl-c"])
def test_interrupted_file_leaves_the_earlier_one(tmp_path: Path, error: BaseException) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def interrupted() -> None:
        with whole_or_absent(target) as temporary:
            temporary.write_text("half of the n")
            raise error

    with pytest.raises(type(error)):
        interrupted()
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_interrupted_folder_is_absent(tmp_path: Path) -> None:
    def interrupted() -> None:
        with whole_or_absent(tmp_path / "folder") as temporary:
            temporary.mkdir()
            (temporary / "weights").write_text("half")
            raise OSError("full")

    with pytest.raises(OSError, match="full"):
        interrupted()
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    write_text(tmp_path / "kept", "")
    for target in (tmp_path / "file", tmp_path / "folder"):
        # A killed process never leaves the block.
        temporary = whole_or_absent(target).__enter__()
        temporary.write_text("half") if target.name == "file" else temporary.mkdir()
    assert len(list(tmp_path.iterdir())) == 3
    remove_unfinished(tmp_path)
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]
