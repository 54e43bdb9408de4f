"""This suite measures the host's time for a call on a tiny input, beside cross_entropy's, and that of the first call.

On a GPU the input is 64 tokens of a vocabulary of 32000, and the time ends when the call returns: its kernels are
enqueued, and nothing waits for the device. On the CPU the input is one token of a vocabulary of 8. The first call,
which loads and compiles, is timed in a fresh process with an empty Triton cache.
"""

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from accuracy import draw_logits, draw_operands
from rows import error_text
from suite import Prepared, timed
from timing import Call, Timing, synchronize
from torch.nn.functional import cross_entropy

from em_kernels import entropy_loss, linear_entropy_loss, token_stats


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    rows: int
    vocab: int
    budget: float


def configurations(size: str, device: str) -> Iterator[Configuration]:
    shape = ("bfloat16", 64, 32000) if device == "cuda" else ("float32", 1, 8)
    yield Configuration(device, *shape, {"tiny": 0.2, "full": 20.0}.get(size, 5.0))


def calls(c: Configuration) -> dict[tuple[str, str], Callable[[], Any]]:
    """Return the calls by contender and variant."""
    device, dtype = torch.device(c.device), getattr(torch, c.dtype)
    logits = draw_logits("peaked", c.rows, c.vocab, dtype, device).requires_grad_()
    hidden, weight = draw_operands(c.rows, 64, c.vocab, dtype, device)
    target = torch.zeros(c.rows, dtype=torch.int64, device=device)
    losses: dict[str, tuple[Callable[[], Any], tuple[Any, ...]]] = {
        "cross_entropy": (lambda: cross_entropy(logits, target), (logits,)),
        "linear, cross_entropy": (lambda: cross_entropy(hidden @ weight.T, target), (hidden, weight)),
        "ours": (lambda: entropy_loss(logits), (logits,)),
        "ours, token_stats": (lambda: token_stats(logits, target).entropy.sum(), (logits,)),
        "ours, linear_entropy_loss": (lambda: linear_entropy_loss(hidden, weight), (hidden, weight)),
    }

    def forward(loss: Callable[[], Any]) -> Any:
        with torch.no_grad():
            return loss()

    def both(loss: Callable[[], Any], inputs: tuple[Any, ...]) -> Any:
        return torch.autograd.grad(loss(), inputs)

    found: dict[tuple[str, str], Callable[[], Any]] = {}
    for name, (loss, inputs) in losses.items():
        found[name, "forward"] = partial(forward, loss)
        found[name, "forward+backward"] = partial(both, loss, inputs)
    return found


def missing(device: torch.device) -> dict[str, str]:
    return {}


def names(c: Configuration) -> list[str]:
    return list(prepare(c).calls)


def prepare(c: Configuration) -> Prepared:
    found = {f"{name} | {variant}": Call(lambda slot, call=call: call()) for (name, variant), call in calls(c).items()}
    # The other suites check the same results on larger inputs.
    return Prepared(found, 1, lambda name, result: {}, {}, "cross_entropy | forward")


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    device = torch.device(c.device)
    timings = timed("host_overhead", prepare(c).calls, device, budget=c.budget, most_rounds=2000, enqueue=True)
    for name, timing in timings.items():
        contender, _, variant = name.partition(" | ")
        row = _row(c, contender, variant, "host time")
        peer = timings[f"{'linear, ' if 'linear' in contender else ''}cross_entropy | {variant}"]
        if not isinstance(timing, Timing):
            yield row | {"error": error_text(timing)}
            continue
        over = {"over_cross_entropy": timing.seconds / peer.seconds} if isinstance(peer, Timing) else {}
        yield row | timing._asdict() | over
    for name in timings:
        contender, _, variant = name.partition(" | ")
        if variant == "forward":
            continue
        row = _row(c, contender, variant, "first call")
        try:
            with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
                yield row | {"seconds": process.submit(first_call, c, (contender, variant)).result()}
        except Exception as error:
            yield row | {"error": error_text(error)}


def first_call(c: Configuration, name: tuple[str, str]) -> float:
    """Return the seconds that the first call of a process takes, until its result exists."""
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        call = calls(c)[name]
        synchronize(torch.device(c.device))
        start = time.perf_counter()
        call()
        synchronize(torch.device(c.device))
        return time.perf_counter() - start


def _row(c: Configuration, contender: str, variant: str, what: str) -> dict[str, Any]:
    shape = {key: value for key, value in asdict(c).items() if key != "budget"}
    return {"benchmark": "host_overhead", **shape, "contender": contender, "variant": variant, "what": what}


def header(c: Configuration) -> str:
    return f"{c.dtype} {c.rows} x {c.vocab}\n{'':56} {'us':>10} {'p20':>10} {'p80':>10} {'/ cross_entropy':>15}"


def line(row: dict[str, Any]) -> str:
    if row["what"] == "first call":
        return f"{row['seconds'] * 1e6:10.0f} first call of a process"
    times = " ".join(f"{row[key] * 1e6:10.1f}" for key in ("seconds", "p20", "p80"))
    return f"{times} {row.get('over_cross_entropy', float('nan')):15.2f}"
