"""Times the Triton kernels at every tile (threads, unroll) and prints the best beside the one the table chooses.

Kernels: "fused" (loss and gradient, a program a row), and those that stream: "split" (the same for a few long rows),
"statistics", "gradient" (of these), "scale". Each result is checked. Rows are appended to FOLDER/tune_tiles.jsonl.
On the CPU, which shows only that it works, it needs TRITON_INTERPRET=1.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from accuracy import Reference, draw_logits
from timing import Arguments, Call, Timing, append_row, error_text, machine, measure, slots_beyond_cache
from torch import Tensor

from em_kernels.ops import backends

_LOGITS_BYTES = 512 << 20
_VOCABS = (2048, 8192, 32000, 49152, 128256, 151936, 262144)
_SPLIT_VOCAB = 262144
# Within one unit in the last place (bfloat16, float16) or 2e-6 of the row's largest entry, with what the float64 value
# loses on the way to the dtype.
_GRADIENT_TOLERANCE = {torch.bfloat16: 2**-7, torch.float16: 2**-9, torch.float32: 4e-6}
_LOSS_TOLERANCE = 2e-6


class Kernel(NamedTuple):
    """`run(logits)` writes into `out` and returns the loss, or None where there is none to check."""

    run: Callable[[Tensor], Tensor | None]
    gradient_weights: Tensor | None
    loss_weights: Tensor | None
    streamed: bool


def kernels(logits: Tensor, out: Tensor, names: tuple[str, ...]) -> dict[str, Kernel]:
    """The kernels at these logits of shape (1, rows, V)."""
    from em_kernels.ops import triton_entropy

    rows = logits.shape[1]
    ones = torch.ones(rows, device=logits.device)
    saved = triton_entropy.row_statistics(logits, None, None, 1.0, None, False)[-1]
    # Negated again and again the gradient neither grows nor vanishes.
    factor = torch.full((), -1.0, device=logits.device)
    empty = logits.new_empty(0, dtype=torch.float32)

    def loss(z: Tensor) -> Tensor:
        return triton_entropy.entropy_with_gradient(z, None, None, rows, None, 1.0, out)

    def statistics(z: Tensor) -> Tensor:
        return triton_entropy.row_statistics(z, None, None, 1.0, None, False)[0]

    def gradient(z: Tensor) -> None:
        triton_entropy.row_gradient(z, saved, empty, None, ones, None, None, None, out)

    def scale(z: Tensor) -> None:
        triton_entropy.scale_(out, factor)

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
    from em_kernels.ops import triton_entropy

    table = triton_entropy._resident_row, triton_entropy._streamed_tile
    chosen = triton_entropy._Tile(*tile)
    triton_entropy._resident_row = lambda row_bytes, itemsize: chosen
    triton_entropy._streamed_tile = lambda logits: chosen
    try:
        yield
    finally:
        triton_entropy._resident_row, triton_entropy._streamed_tile = table


def shapes(size: str) -> Iterator[tuple[torch.dtype, int, int, tuple[str, ...]]]:
    """dtype, rows, vocabulary, kernels."""
    streamed = ("statistics", "gradient", "scale")
    if size == "tiny":
        yield torch.float32, 2, 700, ("fused", *streamed)
        yield torch.float32, 1, 20000, ("split",)
        return
    for dtype in (torch.bfloat16, torch.float32, torch.float16) if size == "full" else (torch.bfloat16, torch.float32):
        for vocab in _VOCABS:
            rows = _LOGITS_BYTES // (vocab * dtype.itemsize)
            yield dtype, rows, vocab, ("fused", *(streamed if vocab in (8192, 151936) else ()))
        for rows in (1, 8, 64):
            yield dtype, rows, _SPLIT_VOCAB, ("split", "statistics", "gradient")


def main() -> None:
    arguments = Arguments(__doc__)
    folder, size, device = arguments.read()
    reason = backends.unavailable_reason("triton", device)
    if reason is not None:
        arguments.error(reason)
    from em_kernels.ops import triton_entropy

    where = machine(device)
    tiny = size == "tiny"
    tiles = [(t, u) for t in ((128,) if tiny else (128, 256, 512, 1024)) for u in ((1, 2) if tiny else (1, 2, 4, 8))]
    print(f"{'kernel':>10} {'dtype':<8} {'rows':>6} {'vocab':>6}  {'best':>10} {'ms':>9}  {'current':>10} {'ms':>9}")
    for dtype, rows, vocab, names in shapes(size):
        logits = draw_logits("peaked", rows, vocab, dtype, device)[None]
        exact = Reference(logits[0], torch.zeros(rows, dtype=torch.int64, device=device))
        out = torch.empty_like(logits)
        slots = [logits.clone() for _ in range(slots_beyond_cache(logits.nbytes, device))]
        for name, kernel in kernels(logits, out, names).items():
            table = triton_entropy._streamed_tile(logits) if kernel.streamed else None
            current: tuple[int, int] = table or triton_entropy._resident_row(vocab * dtype.itemsize, dtype.itemsize)
            out.fill_(1)

            def run(tile: tuple[int, int], slot: int, kernel: Kernel = kernel, slots: list[Tensor] = slots):
                with _tile(tile):
                    return kernel.run(slots[slot])

            def check(key: str, loss: Tensor | None, kernel: Kernel = kernel, out=out, exact=exact, dtype=dtype):
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

            timings = measure(
                {str(tile): Call(partial(run, tile)) for tile in {*tiles, current}},
                device,
                slots=len(slots),
                budget=0.1 if tiny else 1.0,
                check=check,
            )
            found: dict[tuple[int, int], float] = {}
            for tile in sorted({*tiles, current}):
                timing = timings[str(tile)]
                row = {
                    "benchmark": "tune_tiles",
                    "kernel": name,
                    "dtype": str(dtype).removeprefix("torch."),
                    "rows": rows,
                    "vocab": vocab,
                    "threads": tile[0],
                    "unroll": tile[1],
                    "current": tile == current,
                    **(timing._asdict() if isinstance(timing, Timing) else {"error": error_text(timing)}),
                    "machine": where,
                }
                append_row(folder / "tune_tiles.jsonl", row)
                if isinstance(timing, Timing):
                    found[tile] = timing.seconds
                else:
                    print(f"{name} {tile}: {error_text(timing)}")
            if found:
                best = min(found, key=lambda tile: found[tile])
                print(
                    f"{name:>10} {row['dtype']:<8} {rows:>6} {vocab:>6}  {tuple(best)!s:>10} "
                    f"{found[best] * 1e3:9.4f}  {tuple(current)!s:>10} {found.get(current, float('nan')) * 1e3:9.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
