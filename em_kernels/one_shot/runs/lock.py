"""The lock of a folder of results, which one process at a time holds. It ends with the process, however that ends."""

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.files import failing_as_os_error

_NAME = ".lock"


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Holds the lock of an existing folder until the block ends.

    Raises:
        UsageError: another process holds the lock; the message says which one.
    """
    path = folder / _NAME
    with _locked_file(path) as file:
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        holder = json.dumps({"process": os.getpid(), "host": socket.gethostname(), "since": now})
        try:
            # Past the file's buffer, which a full disk would leave to be written at the end.
            with failing_as_os_error(path):
                os.ftruncate(file.fileno(), 0)
                os.write(file.fileno(), holder.encode())
            yield
        finally:
            path.unlink(missing_ok=True)


def is_lock(path: Path) -> bool:
    return path.name == _NAME


def _locked_file(path: Path) -> TextIO:
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                with file:
                    raise UsageError(f"folder {path.parent} is in use by {_holder(file)}") from None
            # Some network file systems have no locks, and a run on them is better than none.
        # The holder before may have removed the file after it was opened here.
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            return file
        file.close()


def _holder(file: TextIO) -> str:
    file.seek(0)
    try:
        holder = json.load(file)
    except ValueError:  # The holder has not written its name yet.
        return "another process"
    return f"process {holder['process']} on {holder['host']} since {holder['since']}"
