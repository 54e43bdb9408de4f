"""The process in which answers are read and compared: a question a line, and its end if one takes too long.

A question has a text, to be graded, or two answers, to be compared.

SymPy cannot be interrupted while it counts in C, and an exception from a signal handler may leave its caches broken.
The limit is therefore an alarm that nothing in the process handles: the system ends it. The alarm counts the time that
the process computes, so that a busy machine changes no verdict.

The script is started by its path, with the seconds and the bytes that one question may take.
"""

import contextlib
import json
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Any


def serve(seconds: float, memory: int) -> None:
    """Answers each line of the standard input with a line on the standard output, until the input ends."""
    # Ctrl-C and the end of a batch job reach this process too; it ends when the one that asks does.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logging.disable(logging.CRITICAL)
    replies = sys.stdout
    with contextlib.redirect_stdout(sys.stderr):
        # The package by its own name: importing em_kernels would import torch.
        sys.path.append(str(Path(__file__).parents[1]))
        from answers.comparison import compare  # type: ignore[import-not-found]
        from answers.grading import grade_answer  # type: ignore[import-not-found]

        resource.setrlimit(resource.RLIMIT_AS, (memory, resource.getrlimit(resource.RLIMIT_AS)[1]))
        _reply(replies, "ready")
        # From here on nobody reads what a library says.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())
        for line in sys.stdin:
            signal.setitimer(signal.ITIMER_PROF, seconds)
            try:
                question = json.loads(line)
                reply = grade_answer(**question) if "text" in question else compare(**question)
            except Exception:  # Whatever the libraries raise says that they cannot read the answer.
                reply = None
            signal.setitimer(signal.ITIMER_PROF, 0)
            _reply(replies, reply)


def _reply(stream: Any, value: Any) -> None:
    print(json.dumps(value), file=stream, flush=True)


if __name__ == "__main__":
    serve(float(sys.argv[1]), int(sys.argv[2]))
