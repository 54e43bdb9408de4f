"""Processes that run functions together, as the ranks of a gloo process group.

A process that imports torch takes seconds to start, so the processes of a size are started once and kept until the
tests end. Functions are sent by name and must be importable; they and their arguments and results are pickled.
"""

import atexit
import functools
import multiprocessing
import pickle
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

# A rank that fails leaves the others waiting in a collective.
_SECONDS_FOR_THE_OTHERS = 3
_SECONDS_AT_MOST = 300


def run_on_ranks(size: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """What `function(*arguments)` returns on each rank of a process group of that size, in rank order.

    Raises RuntimeError with the traceback of every rank that raised.
    """
    try:
        return _processes(size).run(function, arguments)
    except Exception:
        # Their collectives may be out of step.
        _processes(size).stop(seconds=0.0)
        _processes.cache_clear()
        raise


def collectives_so_far() -> int:
    """How many collectives this rank's default process group has run, whichever functions asked for them."""
    from torch import distributed

    return distributed.group.WORLD._get_sequence_number_for_group()


class _Processes:
    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("forkserver")
        # Every process is a copy of one that has imported them.
        context.set_forkserver_preload(["torch", "torch.distributed.tensor"])
        self.folder = tempfile.TemporaryDirectory()
        self.connections, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            store = str(Path(self.folder.name) / "store")
            process = context.Process(target=_serve, args=(theirs, rank, size, store), daemon=True)
            process.start()
            theirs.close()
            self.connections.append(ours)
            self.processes.append(process)
        atexit.register(self.stop)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> list[Any]:
        # The module of the function may lie in a folder that was not on the path when the processes started.
        call = pickle.dumps((function, arguments))
        for connection in self.connections:
            connection.send(sys.path)
            connection.send_bytes(call)
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + _SECONDS_AT_MOST
        while len(answers) < len(self.connections):
            waiting = [c for rank, c in enumerate(self.connections) if rank not in answers]
            ready = wait(waiting, max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for connection in ready:
                rank = self.connections.index(connection)
                try:
                    answers[rank] = pickle.loads(connection.recv_bytes())
                except EOFError:
                    answers[rank] = False, "the process has ended"
                if not answers[rank][0]:
                    deadline = min(deadline, time.monotonic() + _SECONDS_FOR_THE_OTHERS)
        raised = [f"rank {rank}: {answer}" for rank, (succeeded, answer) in sorted(answers.items()) if not succeeded]
        missing = [f"rank {rank} does not answer" for rank in range(len(self.connections)) if rank not in answers]
        if raised or missing:
            raise RuntimeError("\n".join([*raised, *missing]))
        return [answers[rank][1] for rank in range(len(self.connections))]

    def stop(self, seconds: float = 5.0) -> None:
        """Ends the processes, by force where they do not end by themselves in that time."""
        for connection in self.connections:
            connection.close()
        for process in self.processes:
            process.join(seconds)
            process.kill()
        self.folder.cleanup()


_processes = functools.cache(_Processes)


def _serve(connection: Connection, rank: int, size: int, store: str) -> None:
    import torch
    from torch import distributed

    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=size, timeout=timedelta(seconds=_SECONDS_AT_MOST)
    )
    while True:
        try:
            sys.path[:] = connection.recv()
        except EOFError:
            return
        try:
            function, arguments = pickle.loads(connection.recv_bytes())
            answer = True, function(*arguments)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))
