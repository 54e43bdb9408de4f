"""This file estimates the time of linear_entropy_loss on a GPU from what it computes and moves: nothing is measured.

python benchmarks/linear_estimate.py                                   the models of linear_entropy, 8192 tokens
python benchmarks/linear_estimate.py --rows 8192 --dim 4096 --vocab 131072

With N tokens, hidden size D, vocabulary V, and C chunks in P parts in all, the bytes that are moved, for bfloat16
operands and float32 logits, are

    the logits' matmul          2 P V D + 2 N D + 4 N V
    the kernel between          4 N V + 2 N V
    hidden's matmul             2 C V D + 2 N V + 4 N D, and 6 N D to round it
    the weight's matmul         2 N V + 2 N D + 4 C V D + 4 (C - 1) V D, and 6 V D to round it

The lower estimate takes of each matmul the longer of its arithmetic and its traffic, as if they overlapped whole. The
higher one adds to the arithmetic all that a plain matmul with 16-bit results does not move. Waves that are not full
and launches are in neither.
"""

import argparse
import math
from dataclasses import dataclass

from em_kernels.ops.hidden.chunks import rows_of_a_chunk, rows_of_a_part, rows_that_fit

# Bytes a second of a copy, and floating-point operations a second of a large bfloat16 matmul, both as measured.
GPUS = {"H100": (3.0e12, 798e12), "H200": (4.3e12, 790e12)}
_SCRATCH_BYTES = 512 << 20
# A sum over tokens or over the vocabulary is float32, and is rounded to the operands' dtype.
_SUM, _NARROW = 4, 2


@dataclass(frozen=True)
class Work:
    """What a call computes and moves.

    Attributes:
        chunks, parts: the number of chunks, and of their parts in all.
        flops: floating-point operations of each matmul.
        matmul_bytes: what each matmul reads and writes.
        plain_bytes: what each would read and write in one call with 16-bit results.
        between_bytes: what everything between the matmuls reads and writes.
    """

    chunks: int
    parts: int
    flops: list[int]
    matmul_bytes: list[int]
    plain_bytes: list[int]
    between_bytes: int

    def seconds(self, gpu: str) -> tuple[float, float]:
        """The estimated time on this GPU: at least, and at most."""
        bandwidth, rate = GPUS[gpu]
        between = self.between_bytes / bandwidth
        overlapped = sum(max(f / rate, b / bandwidth) for f, b in zip(self.flops, self.matmul_bytes, strict=True))
        beyond = sum(max(0, b - p) for b, p in zip(self.matmul_bytes, self.plain_bytes, strict=True))
        return overlapped + between, sum(self.flops) / rate + beyond / bandwidth + between


def work(
    rows: int,
    dim: int,
    vocab: int,
    *,
    logits_bytes: int = 4,
    needs_weight: bool = True,
    logits_twice: bool = False,
    chunk_size: int | None = None,
) -> Work:
    """Return the work of a call on 16-bit operands that need gradients, without a mask.

    Args:
        rows, dim, vocab: N, D, V.
        logits_bytes: of a logit, 4 or 2.
        needs_weight: whether the weight needs a gradient, too.
        logits_twice: whether forward and backward make the logits each, as with reduction "none".
        chunk_size: tokens at a time; None for what the library takes on a GPU.
    """
    most = chunk_size or _largest_chunk(dim, vocab, logits_bytes, needs_weight)
    chunk = rows_of_a_chunk(rows, dim, most)
    part = chunk if logits_bytes == _NARROW else rows_of_a_part(chunk)
    chunks, rest = divmod(rows, chunk)
    parts = chunks * math.ceil(chunk / part) + math.ceil(rest / part)
    chunks += rest > 0
    tokens, logits, weight = rows * dim, rows * vocab, vocab * dim
    moved = [
        _NARROW * (parts * weight + tokens) + logits_bytes * logits,
        _NARROW * (chunks * weight + logits) + _SUM * tokens,
    ]
    plain = [_NARROW * (weight + tokens + logits)] * 2
    between = (logits_bytes + _NARROW) * logits + (_SUM + _NARROW) * tokens
    if needs_weight:
        moved.append(_NARROW * (logits + tokens) + _SUM * (2 * chunks - 1) * weight)
        plain.append(plain[0])
        between += (_SUM + _NARROW) * weight
    if logits_twice:
        moved, plain = [moved[0], *moved], [plain[0], *plain]
        between += logits_bytes * logits
    return Work(chunks, parts, [2 * rows * weight] * len(moved), moved, plain, between)


def estimated(contender: str, rows: int, dim: int, vocab: int, dtype: str, gpu_name: str) -> dict[str, float | str]:
    """Return what a row of the suite linear_entropy says of its estimate; empty where there is none."""
    gpu = next((gpu for gpu in GPUS if gpu in gpu_name), None)
    of_contender = {
        "ours": {},
        "ours, float32 logits": {},
        "ours, frozen weight": {"needs_weight": False},
        "ours, reduction none": {"logits_twice": True},
    }
    if gpu is None or dtype == "float32" or contender not in of_contender:
        return {}
    of_call = work(rows, dim, vocab, **of_contender[contender])
    low, high = of_call.seconds(gpu)
    return {
        "estimated_on": gpu,
        "estimated_seconds_low": low,
        "estimated_seconds_high": high,
        "estimated_bytes": sum(of_call.matmul_bytes) + of_call.between_bytes,
        "estimated_chunks": of_call.chunks,
    }


def _largest_chunk(dim: int, vocab: int, logits_bytes: int, needs_weight: bool) -> int:
    """The most rows of a chunk that the library takes without chunk_size."""
    scratch = max(_SCRATCH_BYTES, _SUM * vocab * dim if needs_weight else 0)
    gradient = _NARROW if logits_bytes > _NARROW else 0
    return rows_that_fit(scratch, vocab, dim, logits=logits_bytes, gradient=gradient, product=_SUM)


def main() -> None:
    from linear_entropy import MODELS

    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, meaning, default in (("rows", "N", 8192), ("dim", "D", None), ("vocab", "V", None)):
        parser.add_argument(f"--{name}", type=int, default=default, help=meaning)
    given = parser.parse_args()
    models = MODELS if given.dim is None or given.vocab is None else {"given": (given.dim, given.vocab)}
    print(f"ESTIMATED, not measured: {given.rows} tokens, bfloat16, float32 logits, mean, all gradients")
    print(
        f"{'':16} {'D':>5} {'V':>7} {'chunks':>6} {'parts':>5} {'TFLOP':>6} {'GB':>6}", *(f"{gpu:>24}" for gpu in GPUS)
    )
    for name, (dim, vocab) in models.items():
        of_call = work(given.rows, dim, vocab)
        flops, moved = sum(of_call.flops), sum(of_call.matmul_bytes) + of_call.between_bytes
        times = []
        for gpu, (_, rate) in GPUS.items():
            low, high = of_call.seconds(gpu)
            over = f"{low * rate / flops:.2f}-{high * rate / flops:.2f}x"
            times.append(f"{low * 1e3:6.1f}-{high * 1e3:.1f} ms {over:>11}")
        sizes = f"{dim:5} {vocab:7} {of_call.chunks:6} {of_call.parts:5} {flops / 1e12:6.2f} {moved / 1e9:6.1f}"
        print(f"{name:16} {sizes}", *(f"{time:>24}" for time in times))


if __name__ == "__main__":
    main()
