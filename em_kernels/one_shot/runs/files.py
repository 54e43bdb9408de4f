"""Files that are either whole or absent: each is written under a temporary name, then renamed.

The rename is atomic: other processes, and the next run after a process is killed at any moment, see the old file or the
new one. Nothing is forced to the disk, so a power cut can still lose a file.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """Yields a temporary path, and renames it to `target` if the block ends without an error.

    The block writes a file or a folder at the temporary path. A file replaces an earlier one of the name; for a folder,
    the name has to be free.
    """
    temporary = unfinished(target, f"{os.getpid()}-")
    with removed_on_failure(temporary):
        yield temporary
        os.replace(temporary, target)


@contextlib.contextmanager
def removed_on_failure(path: Path) -> Iterator[None]:
    """Removes the file or folder at `path` if the block ends with an exception."""
    try:
        yield
    except BaseException:
        _remove(path)
        raise


@contextlib.contextmanager
def failing_as_os_error(target: Path) -> Iterator[None]:
    """Raises any exception of the block as an OSError: a library may raise another type if `target` is unwritable."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{target} cannot be written: {str(error).partition(chr(10))[0]}") from error


def unfinished(target: Path, writer: str = "") -> Path:
    """A temporary path beside `target`, for one writer or, without its name, for all processes together."""
    return target.with_name(f"{_UNFINISHED}{writer}{target.name}")


def write_text(target: Path, text: str) -> None:
    with whole_or_absent(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files and folders that a killed process has left in `folder`."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
