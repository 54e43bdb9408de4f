"""This suite measures the Triton kernels at many choices of their tiles; "ours" is what the table chooses.

The kernel "fused" makes loss and gradient, in blocks of threads x unroll tiles. It has two more choices: the lag, the
rows by which sums run ahead of gradients, and the registers that a thread may have. Where rows are few, no lag is
shorter than all of them. The other kernels stream: "statistics" and "gradient" do the same in two passes, and "scale"
multiplies a gradient. Each result is checked. On the CPU, where the suite only shows that it works, it needs
TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accuracy import Reference, draw_logits
from rows import error_text
from suite import timed
from timing import Call, Timing, slots_beyond_cache
from torch import Tensor

from em_kernels.ops import backend
from em_kernels.ops.types import Divisor, Temperature, Upstream, Wanted

_LOGITS_BYTES = 512 << 20
# The rows of the odd vocabulary begin anywhere between two 16-byte boundaries.
_VOCABS = (2048, 8192, 32000, 49152, 50257, 128256, 151936, 262144)
_FEW_ROWS, _FEW_ROWS_VOCAB = (1, 8, 64), 262144
_STREAMED = ("statistics", "gradient", "scale")
# Threads, tiles and, for the fused kernel, registers: those that programs of a multiprocessor share out are 65,536.
_FUSED_BLOCKS = {
    "tiny": [(128, 1, 64), (128, 2, 64)],
    "small": [(128, 8, 64), (128, 16, 96), (128, 16, 128), (256, 4, 48), (256, 8, 64), (256, 8, 80), (512, 4, 40)],
    "full": list(product((128, 256, 512), (4, 8, 16), (40, 48, 64, 80, 96, 128))),
}
_STREAMED_BLOCKS = {
    "tiny": [(128, 1), (128, 2)],
    "small": [(128, 4), (256, 2), (256, 4), (256, 8), (512, 2), (512, 4)],
    "full": list(product((128, 256, 512, 1024), (1, 2, 4, 8))),
}
# Bytes of logits between a row's two readings. The last stands for all rows.
_LAGS = {
    "tiny": (1, 1 << 60),
    "small": (6 << 20, 12 << 20, 24 << 20, 1 << 60),
    "full": (3 << 20, 6 << 20, 12 << 20, 18 << 20, 24 << 20, 36 << 20, 1 << 60),
}
# A gradient must be within one unit in the last place (bfloat16, float16) or 2e-6 of the row's largest entry (float32),
# plus what the float64 value loses on the way to the dtype.
_GRADIENT_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 4e-6}
_LOSS_TOLERANCE = 2e-6


class Kernel(NamedTuple):
    """A kernel whose `run(logits)` writes into `out` and returns the loss, or None where there is none to check."""

    run: Callable[[Tensor], Tensor | None]
    gradient_weights: Tensor | None
    loss_weights: Tensor | None


class Choice(NamedTuple):
    """What a launch can choose; the lag, in rows, and the registers are None where the kernel has no such choice."""

    threads: int
    unroll: int
    lag: int | None = None
    registers: int | None = None

    def text(self, rows: int) -> str:
        """The choice in words, for logits of that many rows."""
        lag = "all sums first" if self.lag == rows else f"lag {self.lag}"
        parts = [
            f"{self.threads} x {self.unroll}",
            None if self.lag is None else lag,
            None if self.registers is None else f"{self.registers} registers",
        ]
        return ", ".join(part for part in parts if part is not None)


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    rows: int
    vocab: int
    kernel: str
    size: str
    budget: float = 1.0


def configurations(size: str, device: str) -> Iterator[Configuration]:
    if size == "tiny":
        for kernel in ("fused", *_STREAMED):
            yield Configuration(device, "float32", 3, 700, kernel, size, 0.1)
        yield Configuration(device, "float32", 1, 20000, "fused", size, 0.1)
        return
    full = size == "full"
    budget = 1.0 if full else 0.3
    for dtype in ("bfloat16", "float32", "float16") if full else ("bfloat16", "float32"):
        for vocab in _VOCABS if full else (151936, 32000) if dtype == "bfloat16" else (151936,):
            rows = _LOGITS_BYTES // (vocab * getattr(torch, dtype).itemsize)
            streamed = _STREAMED if vocab == 151936 and (full or dtype == "bfloat16") else ()
            for kernel in ("fused", *streamed):
                yield Configuration(device, dtype, rows, vocab, kernel, size, budget)
        for rows in _FEW_ROWS if full else (8,):
            for kernel in ("fused", "statistics", "gradient") if full else ("fused",):
                yield Configuration(device, dtype, rows, _FEW_ROWS_VOCAB, kernel, size, budget)


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
        "fused": Kernel(loss, ones / rows, ones / rows),
        "statistics": Kernel(statistics, None, None),
        "gradient": Kernel(gradient, ones, None),
        "scale": Kernel(scale, None, None),
    }
    return {name: found[name] for name in names}


def table_choice(kernel: str, logits: Tensor) -> Choice:
    """Return what the launchers choose for logits of shape (1, rows, V)."""
    from em_kernels.ops.backends.triton import blocks, launch

    if kernel != "fused":
        return Choice(blocks.THREADS, blocks.block_of(logits, blocks.LARGEST_STREAMED).unroll)
    block, registers = blocks.fused_block(logits, logits, None)
    return Choice(blocks.THREADS, block.unroll, _lag(logits, launch._LAG_BYTES), registers)


def choices(c: Configuration, logits: Tensor, current: Choice) -> list[Choice]:
    """Return the choices to compare, the current one among them.

    Blocks and registers vary at the current lag, and lags with the current block.
    """
    if c.kernel != "fused":
        return sorted({current, *(Choice(*block) for block in _STREAMED_BLOCKS[c.size])})
    blocks = {Choice(threads, unroll, current.lag, registers) for threads, unroll, registers in _FUSED_BLOCKS[c.size]}
    lags = {current._replace(lag=_lag(logits, lag_bytes)) for lag_bytes in _LAGS[c.size]}
    return sorted({current} | blocks | lags, key=str)


def _lag(logits: Tensor, lag_bytes: int) -> int:
    return min(logits.shape[1], -(-lag_bytes // _row_bytes(logits)))


def _row_bytes(logits: Tensor) -> int:
    return logits.shape[2] * logits.element_size()


def _chosen(choice: Choice, logits: Tensor) -> Any:
    """Return a context in which every launch makes this choice."""
    from em_kernels.ops.backends.triton import blocks, launch

    def chosen(logits: Tensor, *_: Any) -> Any:
        return blocks.Block(choice.unroll, logits.element_size(), blocks.width_of(logits))

    values = {"THREADS": choice.threads, "block_of": chosen}
    context = ExitStack()
    if choice.lag is not None:
        values["fused_block"] = lambda logits, *_: (chosen(logits), choice.registers)
        context.enter_context(patch.object(launch, "_LAG_BYTES", choice.lag * _row_bytes(logits)))
    context.enter_context(patch.multiple(blocks, **values))
    return context


def missing(device: torch.device) -> dict[str, str]:
    return {}


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    device, dtype = torch.device(c.device), getattr(torch, c.dtype)
    reason = backend.unavailable_reason("triton", device)
    if reason is not None:
        raise RuntimeError(reason)
    logits = draw_logits("peaked", c.rows, c.vocab, dtype, device)[None]
    exact = Reference(logits[0], torch.zeros(c.rows, dtype=torch.int64, device=device))
    out = torch.ones_like(logits)
    slots = [logits.clone() for _ in range(slots_beyond_cache(logits.nbytes, device))]
    kernel = kernels(logits, out, (c.kernel,))[c.kernel]
    # Every kernel overwrites `out`, except for "scale", which negates what it finds there.
    out.fill_(1)
    current = table_choice(c.kernel, logits)

    def run(choice: Choice, slot: int) -> Tensor | None:
        with _chosen(choice, logits):
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

    # The names are those of the rows, in which a failure of the table's own choice counts as one of ours.
    names = {
        choice: f"{'ours' if choice == current else 'another'} | {choice.text(c.rows)}"
        for choice in choices(c, logits, current)
    }
    calls = {name: Call(partial(run, choice)) for choice, name in names.items()}
    timings = timed("tune_tiles", calls, device, slots=len(slots), budget=c.budget, check=check)
    chosen = timings[names[current]]
    for choice, name in names.items():
        timing, (contender, _, variant) = timings[name], name.partition(" | ")
        row = {
            "benchmark": "tune_tiles",
            **{key: value for key, value in asdict(c).items() if key != "budget"},
            "contender": contender,
            "variant": variant,
            **choice._asdict(),
        }
        if not isinstance(timing, Timing):
            yield row | {"error": error_text(timing)}
            continue
        over = {"over_ours": timing.seconds / chosen.seconds} if isinstance(chosen, Timing) else {}
        yield row | timing._asdict() | over


def header(c: Configuration) -> str:
    return f"{c.kernel} {c.dtype} {c.rows} x {c.vocab}\n{'':77} {'ms':>9} {'p20':>9} {'p80':>9} {'/ ours':>7}"


def line(row: dict[str, Any]) -> str:
    times = " ".join(f"{row[key] * 1e3:9.4f}" for key in ("seconds", "p20", "p80"))
    # The text of a choice takes up to 38 characters, of which the table has room for 17.
    room = 38 - max(17, len(row["variant"]))
    return f"{'':{room}}{times} {row.get('over_ours', float('nan')):7.2f}"
