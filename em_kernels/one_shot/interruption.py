"""Ctrl-C and the termination signal of batch systems: the first asks a command to stop, the second to stop at once.

A third ends the process. Python hears a signal when the operator under way has ended; two that come meanwhile are one
to it. A command that has stopped exits with 128 plus the signal's number, 130 or 143, as if the
signal had ended it.
"""

import contextlib
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers pass on a signal that the terminal has sent to their processes already; such an echo is no further one.
_SECONDS_OF_AN_ECHO = 1.0


class Interrupted(KeyboardInterrupt):
    """The process has been asked to stop.

    Attributes:
        signum: the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signal.Signals(signum).name)
        self.signum = signum


class Interruption:
    """A context manager in which the first two signals raise `Interrupted`, and the third ends the process.

    Blocks inside it may finish their work first: see `finishing` and `held`. In a thread other than the main one,
    signals are left alone.

    Attributes:
        signum: the first signal that has come, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._count = 0
        self._came_at = 0.0
        self._finishing = ""
        self._held = 0
        self._due = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            # What a shell starts in the background ignores Ctrl-C, and goes on ignoring it.
            heard = [signum for signum in _SIGNALS if signal.getsignal(signum) != signal.SIG_IGN]
            self._before = {signum: signal.signal(signum, self._handle) for signum in heard}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    @contextlib.contextmanager
    def finishing(self, what: str) -> Iterator[None]:
        """Has the first signal set `signum` and say `what` will happen, and no more: the block's owner looks for it."""
        before, self._finishing = self._finishing, what
        try:
            yield
        finally:
            self._finishing = before

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Has what a signal would raise wait until the block ends."""
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self._due and not self._held:
            self._due = False
            raise Interrupted(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self._count and now - self._came_at <= _SECONDS_OF_AN_ECHO:
            return
        self._count, self._came_at = self._count + 1, now
        self.signum = self.signum or signum
        if self._count > 2:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
        elif self._count == 1 and self._finishing:
            _say(f"{signal.Signals(signum).name}: {self._finishing}; a second signal leaves at once")
        elif self._held:
            self._due = True
        else:
            raise Interrupted(self.signum)


def _say(line: str) -> None:
    # The signal may have come while Python was writing to the same stream, which it does not do twice at a time.
    with contextlib.suppress(OSError):
        # On a terminal, the line would go on behind a bar.
        start = "\n" if sys.stderr.isatty() else ""
        os.write(2, f"{start}{line}\n".encode())
