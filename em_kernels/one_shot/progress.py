"""The progress of long work, on standard error: a bar on a terminal, a line now and then in a file."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

_SECONDS_BETWEEN_LINES = 30.0
_quiet = False


def be_quiet() -> None:
    """Leaves out the progress of everything that follows in this process."""
    global _quiet
    _quiet = True


def progress(total: int | None, description: str, unit: str, *, show: bool = True) -> "tqdm | _Lines":
    """A context manager whose `update(n)` says that n more of `total` are done.

    Args:
        total: how many there are; None where nobody knows.
        description: what is being done.
        unit: what is counted.
        show: whether to show anything; of several processes, one should.
    """
    if sys.stderr.isatty() or _quiet or not show:
        return tqdm(total=total, desc=description, unit=unit, leave=False, disable=_quiet or not show)
    return _Lines(total, description, unit)


class _Lines:
    """Says how far the work is in a line, when nothing has been said for a while."""

    def __init__(self, total: int | None, description: str, unit: str) -> None:
        self.done = 0
        self._total, self._description, self._unit = total, description, unit
        self._started = self._said = time.monotonic()

    def __enter__(self) -> "_Lines":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """A finished work says itself what came of it."""

    def update(self, n: int = 1) -> None:
        self.done += n
        now = time.monotonic()
        if now - self._said < _SECONDS_BETWEEN_LINES:
            return
        self._said = now
        done = str(self.done) if self._total is None else f"{self.done} of {self._total}"
        print(
            f"{self._description}: {done} ({self._unit}) after {now - self._started:.0f} s", file=sys.stderr, flush=True
        )
