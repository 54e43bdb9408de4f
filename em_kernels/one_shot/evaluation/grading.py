"""The verdicts on completions, each reached within a time limit."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from em_kernels.one_shot.answers.final import boxed_answer
from em_kernels.one_shot.data.problems import Problem

_WORKER = Path(__file__).parents[1] / "answers" / "worker.py"
_MEMORY_BYTES = 4 * 2**30
# The time by the clock that an answer may take, as a multiple of the computing time: no busy machine changes a verdict,
# and no process that was stopped, or waits for memory, holds up the others for ever.
_PATIENCE = 30


class Verdict(Enum):
    r"""What is known of a completion's answer.

    It is unreadable where there is none, or where no answer could be read from it, or none from the accepted ones,
    within the limits of time and memory. It is unfinished where the completion was cut off at its longest length before
    it concluded: a number on the way is no answer, and a text that goes on in circles has none. The one conclusion
    that a cut-off text can have reached is a closed \boxed{}, which is how a model is asked to mark its final answer.
    It is ungraded where the problem has no accepted answer.
    """

    RIGHT = "right"
    WRONG = "wrong"
    UNREADABLE = "unreadable"
    UNFINISHED = "unfinished"
    UNGRADED = "ungraded"


class Grade(NamedTuple):
    """The verdict on a completion, and the answer that was found in it, as it is written there."""

    verdict: Verdict
    answer: str | None


class Grader:
    """Grades completions, in a process of its own that is ended when an answer takes longer than the limit.

    Args:
        seconds: the computing time that one completion may take; by the clock, it may take 30 times as long.

    The grader is a context manager, and its process ends with the block. It has to be used by one thread at a time.
    """

    def __init__(self, *, seconds: float = 10.0) -> None:
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> "Grader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def grade(self, text: str, problem: Problem, *, truncated: bool = False) -> Grade:
        """The verdict on a completion of a problem.

        Args:
            text: the completion.
            problem: what was asked, and the accepted answers.
            truncated: whether the completion was cut off at its longest length.

        Raises:
            RuntimeError: the process that grades cannot be started; the message ends with what it said.
        """
        if truncated and boxed_answer(text) is None:
            return Grade(Verdict.UNFINISHED, None)
        question = {
            "text": text,
            "answers": problem.answers,
            "unit": problem.unit,
            "tolerance": problem.tolerance,
            "relative_tolerance": problem.relative_tolerance,
        }
        right, answer = self._ask(question) or (None, None)
        verdict = {True: Verdict.RIGHT, False: Verdict.WRONG, None: Verdict.UNREADABLE}[right]
        return Grade(verdict if problem.answers or answer is None else Verdict.UNGRADED, answer)

    def same(self, answer: str, other: str) -> bool:
        """Whether two answers are the same, as far as they can be read.

        Raises:
            RuntimeError: as `grade`.
        """
        return self._ask({"accepted": answer, "answer": other}) is True

    def _ask(self, question: dict[str, Any]) -> Any:
        """The reply to a question, or None where the process ended without one."""
        # A process that something else has ended, such as a lack of memory on the machine, is asked once more.
        for _ in range(2):
            process = self._process or self._start()
            assert process.stdin is not None
            assert process.stdout is not None
            try:
                with _killed_after(self._seconds * _PATIENCE, process) as late:
                    process.stdin.write(json.dumps(question) + "\n")
                    process.stdin.flush()
                    line = process.stdout.readline()
            except BrokenPipeError:
                line = ""
            except BaseException:
                # An interruption may have left a reply that nobody has read.
                self._end()
                raise
            if line.endswith("\n"):
                return json.loads(line)
            status = process.wait()
            self._end()
            if status == -signal.SIGPROF or late.is_set():
                break
        return None

    def _start(self) -> subprocess.Popen[str]:
        # -P keeps the script's folder off the module path, where its files would hide others of their names.
        command = [sys.executable, "-P", str(_WORKER), str(self._seconds), str(_MEMORY_BYTES)]
        environment = {**os.environ, "PYTHONWARNINGS": "ignore"}
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        assert process.stdout is not None
        self._process = process
        limit = self._seconds * _PATIENCE
        try:
            with _killed_after(limit, process) as late:
                # Python itself may be set up to say something first.
                ready = any(line.strip() == '"ready"' for line in iter(process.stdout.readline, ""))
        except BaseException:
            self._end()
            raise
        if not ready:
            self._process = None
            said = process.communicate()[1].strip().rpartition("\n")[2] or f"it ended with status {process.returncode}"
            reason = f"not ready within {limit:g} s" if late.is_set() else said
            raise RuntimeError(f"the process that grades answers cannot be started: {reason}")
        return process

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            # What is left in the pipe to a process that has ended cannot be written.
            with contextlib.suppress(BrokenPipeError):
                process.communicate()


@contextlib.contextmanager
def _killed_after(seconds: float, process: "subprocess.Popen[str]") -> Iterator[threading.Event]:
    """Kills the process if the block takes longer, and yields what is set then."""
    late = threading.Event()

    def kill() -> None:
        late.set()
        process.kill()

    timer = threading.Timer(seconds, kill)
    timer.daemon = True
    timer.start()
    try:
        yield late
    finally:
        timer.cancel()
