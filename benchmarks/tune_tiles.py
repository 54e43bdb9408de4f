"""This suite measures the Triton kernels at every tile (threads x unroll); "ours" is the tile that the table chooses.

The kernel "fused" makes loss and gradient with a program for each row. The others stream: "split" does the same for a
few long rows, "statistics" and "gradient" do it in two passes, and "scale" multiplies a gradient. Each result is
checked. On the CPU, where the suite only shows that it works, it needs TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accuracy import Reference, draw_logits
from rows import error_text
from suite import timed
from timing import Call, Timing, slots_beyond_cache
from torch import Tensor

from em_kernels.ops import backend
from em_kernels.ops.types import Divisor, Temperature, Upstream, Wanted

_LOGITS_BYTES = 512 << 20
_VOCABS = (2048, 8192, 32000, 49152, 128256, 151936, 262144)
_SPLIT_VOCAB = 262144
# A gradient must be within one unit in the last place (bfloat16, float16) or 2e-6 of the row's largest entry (float32),
# plus what the float64 value loses on the way to the dtype.
_GRADIENT_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 4e-6}
_LOSS_TOLERANCE = 2e-6


class Kernel(NamedTuple):
    """A kernel whose `run(logits)` writes into `out` and returns the loss, or None where there is none to check."""

    run: Callable[[Tensor], Tensor | None]
    gradient_weights: Tensor | None
    loss_weights: Tensor | None
    streamed: bool


def kernels(logits: Tensor, out: Tensor, names: tuple[str, ...]) -> dict[str, Kernel]:
    """Return the kernels of these names, for logits of shape (1, rows, V)."""
    launch: Any = backend.implementation("triton")

    rows = logits.shape[1]
    ones = torch.ones(rows, device=logits.device)
    _, saved = launch.row_statistics(logits, None, Temperature(), None, Wanted())
    # The factor is -1, because a gradient that is negated again and again neither grows nor vanishes.
    factor = torch.full((), -1.0, device=logits.device)

    def loss(z: Tensor) -> Tensor:
        return launch.entropy_with_gradient(z, None, Divisor(number=rows), Temperature(), out)

    def statistics(z: Tensor) -> Tensor:
        return launch.row_statistics(z, None, Temperature(), None, Wanted())[0].entropy

    def gradient(z: Tensor) -> None:
        launch.row_gradient(z, saved, None, Upstream(entropy=ones), out)

    def scale(z: Tensor) -> None:
        launch.scale_(out, factor)

    found = {
        "fused": Kernel(loss, ones / rows, ones / rows, streamed=False),
        "split": Kernel(loss, ones / rows, ones / rows, streamed=True),
        "statistics": Kernel(statistics, None, None, streamed=True),
        "gradient": Kernel(gradient, ones, None, streamed=True),
        "scale": Kernel(scale, None, None, streamed=True),
    }
    return {name: found[name] for name in names}


@contextmanager
def _tile(tile: tuple[int, int]) -> Iterator[None]:
    launch: Any = backend.implementation("triton")

    table = launch._resident_row, launch._streamed_tile
    chosen = launch._Tile(*tile)
    launch._resident_row = lambda row_bytes, itemsize: chosen
    launch._streamed_tile = lambda logits: chosen
    try:
        yield
    finally:
        launch._resident_row, launch._streamed_tile = table


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    rows: int
    vocab: int
    kernel: str
    budget: float = 1.0


def configurations(size: str, device: str) -> Iterator[Configuration]:
    streamed = ("statistics", "gradient", "scale")
    if size == "tiny":
        for kernel in ("fused", *streamed):
            yield Configuration(device, "float32", 2, 700, kernel, 0.1)
        yield Configuration(device, "float32", 1, 20000, "split", 0.1)
        return
    full = size == "full"
    for dtype in ("bfloat16", "float32", "float16") if full else ("bfloat16", "float32"):
        for vocab in _VOCABS if full else (32000, 151936) if dtype == "bfloat16" else (151936,):
            rows = _LOGITS_BYTES // (vocab * getattr(torch, dtype).itemsize)
            for kernel in ("fused", *(streamed if vocab in (8192, 151936) else ())):
                yield Configuration(device, dtype, rows, vocab, kernel, 1.0 if full else 0.3)
        for rows in (1, 8, 64) if full else (8,):
            for kernel in ("split", "statistics", "gradient") if full else ("split",):
                yield Configuration(device, dtype, rows, _SPLIT_VOCAB, kernel, 1.0 if full else 0.3)


def missing(device: torch.device) -> dict[str, str]:
    return {}


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    device, dtype = torch.device(c.device), getattr(torch, c.dtype)
    reason = backend.unavailable_reason("triton", device)
    if reason is not None:
        raise RuntimeError(reason)
    launch: Any = backend.implementation("triton")

    logits = draw_logits("peaked", c.rows, c.vocab, dtype, device)[None]
    exact = Reference(logits[0], torch.zeros(c.rows, dtype=torch.int64, device=device))
    out = torch.ones_like(logits)
    slots = [logits.clone() for _ in range(slots_beyond_cache(logits.nbytes, device))]
    kernel = kernels(logits, out, (c.kernel,))[c.kernel]
    # Every kernel overwrites `out`, except for "scale", which negates what it finds there.
    out.fill_(1)
    table = launch._streamed_tile(logits) if kernel.streamed else None
    current = tuple(table or launch._resident_row(c.vocab * dtype.itemsize, dtype.itemsize))
    tiny = c.vocab <= 20000 and c.rows <= 2
    tiles = {(t, u) for t in ((128,) if tiny else (128, 256, 512, 1024)) for u in ((1, 2) if tiny else (1, 2, 4, 8))}

    def run(tile: tuple[int, int], slot: int) -> Tensor | None:
        with _tile(tile):
            return kernel.run(slots[slot])

    def check(key: str, loss: Tensor | None) -> None:
        if loss is not None:
            error = exact.loss_error("entropy", loss, kernel.loss_weights)
            if not error <= _LOSS_TOLERANCE:
                raise ArithmeticError(f"the loss is off by {error:.1e}")
        if kernel.gradient_weights is not None:
            error = exact.gradient_error("entropy", out[0], kernel.gradient_weights)
            if not error <= _GRADIENT_TOLERANCE[dtype]:
                raise ArithmeticError(f"the gradient is off by {error:.1e}")
        elif loss is None and not bool((out.abs() == 1).all()):
            raise ArithmeticError("the scaled entries are not all +1 or -1")

    every = sorted(tiles | {current})
    # The names are those of the rows, in which a failure of the table's own choice counts as one of ours.
    names = {tile: f"{'ours' if tile == current else 'another tile'} | {tile[0]} x {tile[1]}" for tile in every}
    calls = {name: Call(partial(run, tile)) for tile, name in names.items()}
    timings = timed("tune_tiles", calls, device, slots=len(slots), budget=c.budget, check=check)
    chosen = timings[names[current]]
    for tile, name in names.items():
        timing, (contender, _, variant) = timings[name], name.partition(" | ")
        row = {
            "benchmark": "tune_tiles",
            **{key: value for key, value in asdict(c).items() if key != "budget"},
            "contender": contender,
            "variant": variant,
            "threads": tile[0],
            "unroll": tile[1],
        }
        if not isinstance(timing, Timing):
            yield row | {"error": error_text(timing)}
            continue
        over = {"over_ours": timing.seconds / chosen.seconds} if isinstance(chosen, Timing) else {}
        yield row | timing._asdict() | over


def header(c: Configuration) -> str:
    return f"{c.kernel} {c.dtype} {c.rows} x {c.vocab}\n{'':56} {'ms':>9} {'p20':>9} {'p80':>9} {'/ ours':>7}"


def line(row: dict[str, Any]) -> str:
    times = " ".join(f"{row[key] * 1e3:9.4f}" for key in ("seconds", "p20", "p80"))
    return f"{times} {row.get('over_ours', float('nan')):7.2f}"
