"""Files that are either whole or absent: written beside their place, then renamed into it.

A rename is atomic for whoever looks on and for a process killed at any moment. It is not forced to the disk, so it does
not promise to survive a power cut.
"""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = ".unfinished-"


@contextlib.contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """A path to write the file or folder `target` at; it takes the name `target` when the block ends without an error.

    A file replaces an earlier one; a folder needs a free name.
    """
    temporary = target.with_name(f"{_UNFINISHED}{os.getpid()}-{target.name}")
    try:
        yield temporary
        os.replace(temporary, target)
    except BaseException:
        _remove(temporary)
        raise


@contextlib.contextmanager
def failing_as_os_error(target: Path) -> Iterator[None]:
    """Turns what other libraries raise when `target` cannot be written into an OSError, whatever they made of it."""
    try:
        yield
    except OSError:
        raise
    except Exception as error:
        raise OSError(f"{target} cannot be written: {str(error).partition(chr(10))[0]}") from error


def write_text(target: Path, text: str) -> None:
    with whole_or_absent(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def remove_unfinished(folder: Path) -> None:
    """Removes what a killed process left behind."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
