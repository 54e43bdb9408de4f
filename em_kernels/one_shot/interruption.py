"""Ctrl-C and the termination signal of batch systems: the first asks a command to stop where it can, the next ends it.

A command that has stopped exits with 128 plus the signal's number, 130 or 143, as if the signal had ended it.
"""

import contextlib
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)
# Launchers pass on a signal that the terminal has sent to their processes already; such an echo is no second one.
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
    """A context manager in which the first of the two signals raises `Interrupted`, and the next ends the process.

    In a thread other than the main one, signals are left alone.

    Attributes:
        signum: the signal that has come, or 0.
    """

    def __init__(self) -> None:
        self.signum = 0
        self._came_at = 0.0
        self._held = 0
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
    def held(self) -> Iterator[None]:
        """Has the first signal wait until the block ends."""
        came_before = self.signum
        self._held += 1
        try:
            yield
        finally:
            self._held -= 1
        if self.signum and not came_before and not self._held:
            raise Interrupted(self.signum)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.signum:
            self.signum, self._came_at = signum, now
            if not self._held:
                raise Interrupted(signum)
        elif now - self._came_at > _SECONDS_OF_AN_ECHO:
            signal.signal(signum, signal.SIG_DFL)
            signal.raise_signal(signum)
