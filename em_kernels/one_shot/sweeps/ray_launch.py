"""The runs of a sweep as tasks on a Ray cluster.

A task runs `train` in a process of its own. If a worker or its node dies, Ray repeats the task elsewhere, and the run
goes on after the last step that its folder, on a shared file system, has the state of.
"""

import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.sweeps.folder import Run
from em_kernels.one_shot.sweeps.launch import ENDING, Outcome, end, start_train, train_arguments

# How often the running tasks are looked at, in seconds.
_PAUSE = 0.5
_SECONDS_TO_ANSWER = 10
# How often a run is repeated whose worker has died.
_RETRIES = 3
# Runs leave their results in files, so that Ray's memory for objects, in bytes, may be about as small as Ray allows.
_OBJECT_STORE = 100_000_000


def connect(address: str) -> Any:
    """Joins a Ray cluster and returns the module `ray`.

    Args:
        address: HOST:PORT, ray://HOST:PORT, "auto" for the cluster that this machine is part of, or "local" for a new
            one on this machine.

    Raises:
        UsageError: Ray is not installed, or no cluster answers at the address.
    """
    # Ray sends notes on its use to its makers unless it is told not to.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
    except ImportError:
        raise UsageError("ray is not installed; --ray needs pip install 'em_kernels[ray]'") from None
    options: dict[str, Any] = {} if "://" in address else {"log_to_driver": False, "logging_level": "error"}
    if address == "local":
        options |= {"include_dashboard": False, "object_store_memory": _OBJECT_STORE}
    handler = signal.getsignal(signal.SIGTERM)
    try:
        # Ray itself gives up after minutes.
        host, _, port = address.rpartition("//")[2].rpartition(":")
        if port.isdigit():
            socket.create_connection((host, int(port)), timeout=_SECONDS_TO_ANSWER).close()
        ray.init(address, **options)
    except (ImportError, OSError, RuntimeError, ValueError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"--ray is {address!r}, where no Ray cluster can be joined ({reason}); expected local, auto, HOST:PORT or "
            "ray://HOST:PORT"
        ) from None
    finally:
        signal.signal(signal.SIGTERM, handler)
    return ray


def launch_on_ray(
    runs: Sequence[Run],
    *,
    options: Sequence[str],
    ray: Any,
    cpus: float,
    gpus: float | None,
    started: Callable[[Run], None],
) -> Iterator[Outcome]:
    """Runs `em-kernels train` for each of the runs on a Ray cluster, and yields each as it ends.

    If the caller leaves the loop or is interrupted, the processes are told to end: each finishes its step under way
    and keeps it, unless the caller is interrupted again.

    Args:
        runs: the runs; one that was started before goes on.
        options: the options of `train` that all runs share.
        ray: what `connect` has returned.
        cpus: the CPUs of a run.
        gpus: the GPUs of a run; None is one if the cluster has GPUs, and otherwise none.
        started: called with each run when it starts.
    """
    if gpus is None:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
    if not any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in _nodes(ray)):
        print(f"no node has {cpus:g} CPUs and {gpus:g} GPUs for a run; waiting for one to join", file=sys.stderr)
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(_train)
    tasks = {task.remote(train_arguments(run, options), run.log, os.getcwd()): run for run in runs}
    begun: dict[str, float] = {}
    try:
        while tasks:
            done, _ = ray.wait(list(tasks), timeout=_PAUSE)
            # A task tells nothing before it ends, but a run that starts has a log.
            logs = {entry.name for entry in os.scandir(next(iter(tasks.values())).log.parent)}
            for run in tasks.values():
                if run.name not in begun and run.log.name in logs:
                    begun[run.name] = time.monotonic()
                    started(run)
            for reference in done:
                run = tasks.pop(reference)
                status = _status(ray, reference, run)
                yield Outcome(run, status, time.monotonic() - begun.get(run.name, time.monotonic()))
    except KeyboardInterrupt:
        print(ENDING.format(len(tasks)), file=sys.stderr)
        raise
    finally:
        _cancel(ray, list(tasks))


def _nodes(ray: Any) -> list[dict[str, float]]:
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _train(arguments: Sequence[str], log: Path, directory: str) -> int:
    """The task: what `train` returned. Ray has set the threads and the GPUs of the worker's environment."""
    # Ray cancels a task by what Ctrl-C does, which workers ignore whose cluster was started in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    process = start_train(arguments, log, os.environ, directory)
    try:
        # The interrupt has to wait for the end of a call into C.
        while process.poll() is None:
            time.sleep(_PAUSE)
        return process.returncode
    finally:
        end([process])


def _status(ray: Any, reference: Any, run: Run) -> int:
    try:
        return ray.get(reference)
    except ray.exceptions.RayError as error:
        # The message of a task's own error ends with it, after a traceback; those of Ray begin with what happened.
        lines = str(error).strip().splitlines()
        with run.log.open("a", encoding="utf-8") as log:
            log.write(f"{lines[-1] if isinstance(error, ray.exceptions.RayTaskError) else lines[0]}\n")
        return 1


def _cancel(ray: Any, references: list[Any]) -> None:
    """Has what still runs end after its step under way, and leaves the cluster; if interrupted, it leaves at once.

    Ray then kills the runs, which leaves the states that they had kept: it cancels a task only once.
    """
    try:
        for reference in references:
            ray.cancel(reference)
        if references:
            ray.wait(references, num_returns=len(references))
    finally:
        ray.shutdown()
