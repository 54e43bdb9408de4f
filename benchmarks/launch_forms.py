"""This module calls the Triton launchers in the forms that they can choose, on tensors without memory."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from em_kernels.ops.backends.triton import launch
from em_kernels.ops.types import Divisor, Saved, Temperature, Upstream, Wanted

# The vocabularies of published models, one of 2^18, and one that is a multiple of 8 and not of 16. Those of Gemma,
# Qwen, Llama and SmolLM are multiples of 16; GPT-2's, and these with tokens added, are odd.
VOCABULARIES = (32_000, 49_152, 50_257, 50_264, 128_256, 128_257, 151_665, 151_936, 262_144)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Of these many tokens, each row has a multiprocessor; of the fewer, a row is split; of one, the blocks shrink.
MANY_ROWS = 4096
FEW_ROWS = (64, 1)


class Form(NamedTuple):
    """What is called, and on what; `plain` is without a mask, a temperature for each token and a sum of weights."""

    call: str
    dtype: torch.dtype
    vocab: int
    rows: int
    plain: bool


def call_forms(vocab: int, dtype: torch.dtype, rows: int) -> Iterator[Form]:
    """Make every call on (rows, vocab) logits, plain and not; a form is yielded when its call has returned."""
    logits = empty_logits((1, rows, vocab), dtype)
    out, per_row = torch.empty_like(logits), torch.ones(rows, device="meta")
    target, saved = per_row.long(), Saved.allocate(logits, rows)
    # A mask, a temperature for each token and a divisor on the device are loads before what goes through a row.
    for plain in (True, False):
        kept = None if plain else per_row.bool()
        temperature = Temperature(None if plain else per_row, 1.5)
        divisor = Divisor(number=rows) if plain else Divisor(of_weights=True)
        launch.entropy_with_gradient(logits, kept, divisor, temperature, out)
        yield Form("loss and gradient", dtype, vocab, rows, plain)
        launch.row_statistics(logits, kept, temperature, None, Wanted())
        yield Form("entropy", dtype, vocab, rows, plain)
        launch.row_statistics(logits, kept, temperature, target, Wanted(True, True))
        yield Form("all statistics", dtype, vocab, rows, plain)
    launch.row_gradient(logits, saved, None, Upstream(per_row), out)
    yield Form("gradient of the entropy", dtype, vocab, rows, True)
    launch.row_gradient(logits, saved, target, Upstream(per_row, per_row, per_row, per_row), out)
    yield Form("gradient of all statistics", dtype, vocab, rows, True)
    launch.scale_(out, torch.ones((), device="meta"))
    yield Form("scaling a gradient", dtype, vocab, rows, True)


def empty_logits(shape: tuple[int, int, int], dtype: torch.dtype, outer_stride: int = 0) -> Tensor:
    """Return logits without memory; `outer_stride` is the distance of two sequences, in elements."""
    return torch.empty_strided(shape, (outer_stride, shape[2], 1), dtype=dtype, device="meta")
