"""Files that are either whole or absent: each is written under a temporary name, then renamed.

The rename is atomic: other processes, and the next run after a process is killed at any moment, see the old file or the
new one. Nothing is forced to the disk, so a power cut can still lose a file.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

_UNFINISHED = ".unfinished-"
# A disk with less room than this, in bytes, is taken to be why a file could not be written.
_FULL = 2**20


@contextlib.contextmanager
def whole_or_absent(target: Path) -> Iterator[Path]:
    """Yields a temporary path, and renames it to `target` if the block ends without an error.

    The block writes a file or a folder at the temporary path. A file replaces an earlier one of the name; for a folder,
    the name has to be free.
    """
    temporary = unfinished(target, f"{os.getpid()}-")
    with removed_on_failure(temporary):
        try:
            yield temporary
            os.replace(temporary, target)
        except OSError as error:
            raise _naming(error, target) from error


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
    """Raises any exception of the block as an OSError that names `target` and says what the system had against it.

    A library may raise another type if a file cannot be written, and the system names no file if the disk is full.
    """
    try:
        yield
    except Exception as error:
        known = _system_error(error)
        if known is None and shutil.disk_usage(_existing(target)).free < _FULL:
            known = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if known is None:
            raise OSError(f"{target} cannot be written: {str(error).partition(chr(10))[0]}") from error
        raise _naming(known, target) from error


def _naming(error: OSError, target: Path) -> OSError:
    """The error itself if it names a file or is none of the system's, otherwise the same with the name of `target`."""
    if error.filename is not None or error.errno is None:
        return error
    return OSError(error.errno, error.strerror, str(target))


def _system_error(error: BaseException | None) -> OSError | None:
    """The error of the system that led to an error, if one did."""
    while error is not None and not (isinstance(error, OSError) and error.errno is not None):
        error = error.__cause__ or error.__context__
    return error


def _existing(path: Path) -> Path:
    return next(folder for folder in (path, *path.absolute().parents) if folder.exists())


def unfinished(target: Path, writer: str = "") -> Path:
    """A temporary path beside `target`, for one writer or, without its name, for all processes together."""
    return target.with_name(f"{_UNFINISHED}{writer}{target.name}")


def write_text(target: Path, text: str) -> None:
    with whole_or_absent(target) as temporary:
        temporary.write_text(text, encoding="utf-8")


def is_unfinished(path: Path) -> bool:
    """Whether the path is that of a temporary file or folder, which a process writes or has left when it was killed."""
    return path.name.startswith(_UNFINISHED)


def remove_unfinished(folder: Path) -> None:
    """Removes the temporary files and folders that a killed process has left in `folder`."""
    for path in folder.glob(f"{_UNFINISHED}*"):
        _remove(path)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
