import errno
import shutil
from pathlib import Path
from typing import NamedTuple

import pytest

from em_kernels.one_shot.files import failing_as_os_error, remove_unfinished, whole_or_absent, write_text


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


def _fail_behind_a_library() -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        raise RuntimeError("unexpected pos 704 vs 598")  # noqa: B904  (as torch's writer does)


def test_full_disk_is_named_behind_the_error_of_a_library(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No space left on device") as raised, failing_as_os_error(tmp_path / "state-1"):
        _fail_behind_a_library()
    assert (raised.value.errno, raised.value.filename) == (errno.ENOSPC, str(tmp_path / "state-1"))


class _Usage(NamedTuple):
    free: int


@pytest.mark.parametrize(("free", "said"), [(2**30, "state-1 cannot be written: unexpected pos"), (1, "No space left")])
def test_error_of_a_library_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, said: str) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: _Usage(free))
    with pytest.raises(OSError, match=said), failing_as_os_error(tmp_path / "state-1"):
        raise RuntimeError("unexpected pos 704 vs 598\nand more")
