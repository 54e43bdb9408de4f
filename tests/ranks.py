"""Processes that run functions of tests as the ranks of a gloo process group, started once and kept."""

import multiprocessing
import os
import tempfile
import traceback
from collections.abc import Callable
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

# A collective that one rank does not join never ends: no test takes as long.
_SECONDS = 180
_SECONDS_AFTER_A_FAILURE = 5


class Ranks:
    """`world` processes; a function that is run on them finds its rank and group in torch.distributed."""

    def __init__(self, world: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.world, self.stopped = world, False
        self._folder = tempfile.TemporaryDirectory()
        self._ends, self._processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            arguments = (there, rank, world, str(Path(self._folder.name, "rendezvous")))
            process = context.Process(target=_serve, args=arguments, daemon=True)
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """What the function returns on each rank; raises AssertionError with the traceback of the ranks that failed."""
        for end in self._ends:
            end.send((function, arguments))
        results, failures, waiting = [None] * self.world, [], list(self._ends)
        while waiting:
            # Where one rank has failed, the others may wait for it in a collective.
            answered = wait(waiting, _SECONDS_AFTER_A_FAILURE if failures else _SECONDS)
            if not answered:
                self.stop()
                failures.append(f"{len(waiting)} of {self.world} ranks did not answer")
                break
            for end in answered:
                waiting.remove(end)
                succeeded, result = end.recv()
                results[self._ends.index(end)] = result
                if not succeeded:
                    failures.append(f"rank {self._ends.index(end)} of {self.world}:\n{result}")
        if failures:
            raise AssertionError("\n".join(failures))
        return results

    def stop(self) -> None:
        self.stopped = True
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()


def _serve(end: Any, rank: int, world: int, rendezvous: str) -> None:
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=world)
    while True:
        function, arguments = end.recv()
        torch.manual_seed(0)
        try:
            end.send((True, function(*arguments)))
        except BaseException:
            end.send((False, traceback.format_exc()))


class Collectives:
    """Within the context, the names of the collectives that this rank joins."""

    _NAMES = ("all_gather", "all_gather_into_tensor", "all_reduce", "broadcast", "reduce_scatter_tensor", "all_to_all")

    def __enter__(self) -> list[str]:
        self._originals = {name: getattr(dist, name) for name in self._NAMES}
        joined: list[str] = []

        def counted(name: str, original: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                joined.append(name)
                return original(*arguments, **options)

            return call

        for name, original in self._originals.items():
            setattr(dist, name, counted(name, original))
        return joined

    def __exit__(self, *_: object) -> None:
        for name, original in self._originals.items():
            setattr(dist, name, original)


class Worlds:
    """Ranks of any number, each started when it is first asked for, and again after a failure that stopped it."""

    def __init__(self) -> None:
        self._started: dict[int, Ranks] = {}

    def of(self, size: int) -> Ranks:
        if size not in self._started or self._started[size].stopped:
            self._started[size] = Ranks(size)
        return self._started[size]

    def stop(self) -> None:
        for ranks in self._started.values():
            if not ranks.stopped:
                ranks.stop()
