"""The host's time for a call where the arithmetic does not count, beside cross_entropy's, and that of the first call.

On a GPU at 64 tokens of a vocabulary of 32000: seconds until the call returns, its kernels enqueued and the device not
waited for. On the CPU at one token of a vocabulary of 8. The first call, which loads and compiles, is timed in a fresh
process with an empty Triton cache. Rows are appended to FOLDER/host_overhead.jsonl.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from typing import Any

import torch
from accuracy import draw_logits
from timing import Arguments, Call, Timing, append_row, error_text, machine, measure, synchronize
from torch import Tensor
from torch.nn.functional import cross_entropy

from em_kernels import entropy_loss

_SHAPES = {"cuda": (64, 32000), "cpu": (1, 8)}
_ROUNDS_BUDGET = {"tiny": 0.2, "default": 5.0, "full": 20.0}


def calls(logits: Tensor) -> dict[tuple[str, str], Callable[[], Any]]:
    target = torch.zeros(len(logits), dtype=torch.int64, device=logits.device)
    losses: dict[str, Callable[[], Tensor]] = {
        "cross_entropy": lambda: cross_entropy(logits, target),
        "ours": lambda: entropy_loss(logits),
    }

    def forward(loss: Callable[[], Tensor]) -> Tensor:
        with torch.no_grad():
            return loss()

    def both(loss: Callable[[], Tensor]) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), logits)

    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, loss in losses.items():
        found[name, "forward"] = partial(forward, loss)
        found[name, "forward+backward"] = partial(both, loss)
    return found


def first_call(device: str, name: tuple[str, str]) -> float:
    """Seconds of the first call of a process, until its result is there."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        call = calls(_logits(torch.device(device)))[name]
        synchronize(torch.device(device))
        start = time.perf_counter()
        call()
        synchronize(torch.device(device))
        return time.perf_counter() - start


def _ignoring_slot(call: Callable[[], Any], slot: int) -> Any:
    return call()


def _logits(device: torch.device) -> Tensor:
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return draw_logits("peaked", *_SHAPES[device.type], dtype, device).requires_grad_()


def main() -> None:
    folder, size, device = Arguments(__doc__).read()
    where = machine(device)
    logits = _logits(device)

    def keep(name: tuple[str, str], what: str, result: dict[str, Any]) -> None:
        row = {
            "benchmark": "host_overhead",
            "device": device.type,
            "dtype": str(logits.dtype).removeprefix("torch."),
            "rows": logits.shape[0],
            "vocab": logits.shape[1],
            "contender": name[0],
            "variant": name[1],
            "what": what,
            **result,
            "machine": where,
        }
        append_row(folder / "host_overhead.jsonl", row)
        numbers = (f"{key} {value:.4g}" for key, value in result.items() if isinstance(value, float))
        print(f"{name[0]:>14} {name[1]:<17} {what:<11} {result.get('error') or ', '.join(numbers)}", flush=True)

    every = {f"{name} {variant}": ((name, variant), call) for (name, variant), call in calls(logits).items()}
    timings = measure(
        {key: Call(partial(_ignoring_slot, call)) for key, (_, call) in every.items()},
        device,
        budget=_ROUNDS_BUDGET[size],
        most_rounds=2000,
        enqueue=True,
    )
    for key, (name, _) in every.items():
        timing, peer = timings[key], timings[f"cross_entropy {name[1]}"]
        if isinstance(timing, Timing):
            over = {"over_cross_entropy": timing.seconds / peer.seconds} if isinstance(peer, Timing) else {}
            keep(name, "host time", timing._asdict() | over)
        else:
            keep(name, "host time", {"error": error_text(timing)})

    for name in calls(logits):
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                keep(name, "first call", {"seconds": process.submit(first_call, device.type, name).result()})
        except Exception as error:  # Recorded; the other contenders go on.
            keep(name, "first call", {"error": error_text(error)})


if __name__ == "__main__":
    main()
