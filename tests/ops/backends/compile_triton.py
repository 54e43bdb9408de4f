"""Compiles what the Triton launchers launch, for a target named on the command line, without a GPU.

The output is a JSON line a kernel compiled: its name, what it was compiled for, its resources, what its machine code
does for each element of a row, and the calls that launch it.

    python tests/ops/backends/compile_triton.py cuda:90
"""

import itertools
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))
from compiled_launches import TARGETS, compile_launches
from launch_forms import DTYPES, FEW_ROWS, MANY_ROWS, Form, call_forms, empty_logits
from machine_code import describe, plain_form
from row_code import row_pieces

from em_kernels.ops.backends.triton import launch
from em_kernels.ops.types import Divisor, Saved, Temperature, Upstream, Wanted

# The machine code for these is read.
READ = ("cuda:90", "cuda:100")
# Rows with blocks of each size; among them a multiple of 8 that is none of 16, and an odd vocabulary.
ODD_VOCABULARY = 128_257
VOCABULARIES = (4096, 32_000, 50_264, ODD_VOCABULARY, 151_936)
# A batch in which the second sequence starts beyond 32 bits.
FAR_STRIDE = 2**31 + 2**20


def usual_forms() -> Iterator[Form]:
    """Makes every call in every dtype and block, with its optional arguments and without."""
    for dtype in (torch.float32, torch.bfloat16):
        for vocab in VOCABULARIES:
            yield from call_forms(vocab, dtype, MANY_ROWS)
        # Fewer rows have smaller blocks, whatever the length of a row.
        for vocab, rows in itertools.product(VOCABULARIES[-2:], FEW_ROWS):
            yield from call_forms(vocab, dtype, rows)
    # Rows of float16 have the blocks of bfloat16, and three of these show the arithmetic.
    for vocab in (50_264, ODD_VOCABULARY, VOCABULARIES[-1]):
        yield from call_forms(vocab, torch.float16, MANY_ROWS)


def few_forms() -> Iterator[Form]:
    """Makes every call in every dtype, of an even and of an odd vocabulary, and those of hidden states."""
    for vocab, dtype in itertools.product(VOCABULARIES[-2:], DTYPES):
        yield from call_forms(vocab, dtype, MANY_ROWS)
    yield from call_forms(VOCABULARIES[-1], torch.bfloat16, FEW_ROWS[0])
    yield from far_forms(torch.bfloat16, 128 << 10)
    yield from hidden_forms(VOCABULARIES[-1])


def other_forms() -> Iterator[Form]:
    """Makes calls whose machine code differs outside of what goes through a row, and those of hidden states.

    Optional arguments are outside. They do not depend on each other or on the dtype, so all combinations of them are
    compiled in one dtype.
    """
    for rows in (MANY_ROWS, FEW_ROWS[0]):
        yield from combinations(torch.bfloat16, VOCABULARIES[-1], rows)
    for dtype in DTYPES:
        yield from far_forms(dtype, 128 << 10)
    yield from hidden_forms(VOCABULARIES[-1])
    yield from hidden_forms(ODD_VOCABULARY)


def combinations(dtype: torch.dtype, vocab: int, rows: int) -> Iterator[Form]:
    logits = empty_logits((1, rows, vocab), dtype)
    out, per_row = torch.empty_like(logits), torch.ones(rows, device="meta")
    # These are a load each before the loops, and compiled together or not at all.
    together = (
        (Divisor(None, 2), Temperature(None, 1.5)),
        (Divisor(per_row.sum(), 2), Temperature(per_row)),
        (Divisor(of_weights=True), Temperature(per_row)),
    )
    for weight, (divisor, temperature) in itertools.product((None, per_row.bool(), per_row), together):
        launch.entropy_with_gradient(logits, weight, divisor, temperature, out)
        yield Form("loss and gradient", dtype, vocab, rows, False)
    for by_row, target, second_moment, extra in itertools.product((False, True), repeat=4):
        launch.row_statistics(
            logits,
            per_row.bool() if by_row else None,
            Temperature(per_row if by_row else None, 1.5),
            per_row.long() if target else None,
            Wanted(second_moment, extra),
        )
        yield Form("statistics", dtype, vocab, rows, False)
    launch.row_sums(logits, per_row.bool(), Temperature(per_row), per_row.long(), Wanted(True, True))
    yield Form("sums", dtype, vocab, rows, False)
    for upstream in itertools.product((None, per_row), repeat=4):
        launch.row_gradient(logits, Saved.allocate(logits, rows), per_row.long(), Upstream(*upstream), out)
        yield Form("gradient", dtype, vocab, rows, False)


def far_forms(dtype: torch.dtype, vocab: int) -> Iterator[Form]:
    logits = empty_logits((2, 66, vocab), dtype, FAR_STRIDE)
    gradient, weight = torch.empty_like(logits), torch.ones(132, device="meta")
    divisor, temperature = Divisor(torch.ones((), device="meta"), 2), Temperature(weight)
    launch.entropy_with_gradient(logits, weight, divisor, temperature, gradient)
    everything = (logits, weight.bool(), temperature, weight.long(), Wanted(True, True))
    launch.row_sums(*everything)
    _, saved = launch.row_statistics(*everything)
    launch.row_gradient(logits, saved, weight.long(), Upstream(weight, weight, weight, weight), gradient)
    launch.scale_(logits, torch.ones((), device="meta"))
    yield Form("everything, far", dtype, vocab, 132, False)


def hidden_forms(vocab: int) -> Iterator[Form]:
    """Makes the calls of the losses on hidden states: float32 logits in padded rows, a soft cap, 16-bit gradients."""
    rows, padded = 128, -(-vocab // 64) * 64
    logits = empty_logits((1, rows, padded), torch.float32)[..., :vocab]
    out = empty_logits((1, rows, padded), torch.bfloat16)[..., :vocab]
    weight = torch.ones(rows, device="meta")
    for softcap in (None, 30.0):
        launch.entropy_with_gradient(logits, weight, Divisor(weight.sum()), Temperature(None, 0.5), out, softcap)
        everything = (logits, weight.bool(), Temperature(None, 0.5), weight.long(), Wanted(True, True), softcap)
        _, saved = launch.row_statistics(*everything)
        launch.row_gradient(logits, saved, weight.long(), Upstream(*[weight] * 4), out, softcap)
        yield Form("hidden states", torch.float32, vocab, rows, False)


def main(target: str) -> None:
    launches = compile_launches(target)
    kernels, forms, pieces = {}, {}, {}
    # Where the machine code is not read, one size of each kind of block shows that everything compiles.
    for made in (usual_forms, other_forms) if target in READ else (few_forms,):
        for form in made():
            for launched in launches:
                kernels.setdefault(launched.kernel.digest, launched.kernel)
                forms.setdefault(launched.kernel.digest, []).append(plain_form(form))
            launches.clear()
        if made is usual_forms and target in READ:
            pieces = row_pieces(list(kernels.values()), TARGETS[target].gpu.arch)
    for digest, kernel in kernels.items():
        row = describe(kernel, pieces.get(digest, [])) | {"forms": forms[digest]}
        print(json.dumps(row | {"memory": memory_operations(kernel.assembly)}), flush=True)


def memory_operations(ptx: str) -> list[str]:
    """The instructions that the order of memory depends on, in the order of the code, without their operands."""
    found = re.findall(r"^\s*(?:@%p\d+\s+)?((?:ld|st|atom|red|bar)\.[\w.:]+)", ptx, re.MULTILINE)
    return [name for name in found if not name.startswith("ld.param")]


if __name__ == "__main__":
    main(sys.argv[1])
