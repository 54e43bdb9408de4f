"""The estimate of linear_entropy_loss counts what the library does."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
import linear_entropy
from linear_estimate import _largest_chunk, estimated, work

from em_kernels.arguments.projection import chunking_of, operands_of
from em_kernels.ops.hidden import matmul


@pytest.mark.parametrize("needs_weight", [True, False])
@pytest.mark.parametrize("logits_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("dim", "vocab"), linear_entropy.MODELS.values(), ids=linear_entropy.MODELS)
def test_a_chunk_is_the_librarys(monkeypatch, dim, vocab, logits_dtype, needs_weight):
    # The meta device is not the CPU, and multiplies as a GPU does.
    monkeypatch.setattr(matmul, "_has_float32_output", lambda _: True)
    hidden = torch.empty(8192, dim, dtype=torch.bfloat16, device="meta")
    weight = torch.empty(vocab, dim, dtype=torch.bfloat16, device="meta", requires_grad=needs_weight)
    operands = operands_of(hidden, weight, None, softcap=None, logits_dtype=logits_dtype, process_group=None)
    chunking = chunking_of(operands, None, chunk_size=None, token_count=None)
    assert chunking.chunk_size == _largest_chunk(dim, vocab, logits_dtype.itemsize, needs_weight)


def test_bytes_and_operations_are_counted():
    n, d, v = 8192, 4096, 131072
    of_call = work(n, d, v)
    assert (of_call.chunks, of_call.parts) == (2, 8)
    assert of_call.flops == [2 * n * v * d] * 3
    assert of_call.matmul_bytes == [
        8 * 2 * v * d + 2 * n * d + 4 * n * v,  # the weight once a part, hidden states, logits
        2 * 2 * v * d + 2 * n * v + 4 * n * d,  # the weight once a chunk, the logits' gradient, hidden's
        2 * n * v + 2 * n * d + 4 * 3 * v * d,  # both once; the sum is written, read and written
    ]
    # Logits and their gradient between the matmuls; a float32 number read and a 16-bit one written of each gradient.
    assert of_call.between_bytes == 6 * n * v + 6 * n * d + 6 * v * d
    low, high = of_call.seconds("H200")
    assert 6 * n * v * d / 790e12 < low < high < 1.25 * 6 * n * v * d / 790e12
    frozen, twice = work(n, d, v, needs_weight=False), work(n, d, v, logits_twice=True)
    assert len(frozen.flops) == 2
    assert len(twice.flops) == 4


def test_rows_of_ours_on_a_known_gpu_have_an_estimate():
    shape = (8192, 4096, 131072, "bfloat16")
    row = {"seconds": 0.04, "p20": 0.04, "p80": 0.04, **estimated("ours", *shape, "NVIDIA H200")}
    assert row["estimated_on"] == "H200"
    assert row["estimated_chunks"] == 2
    assert linear_entropy.line(row).endswith(
        f"{row['estimated_seconds_low'] * 1e3:.1f}-{row['estimated_seconds_high'] * 1e3:.1f}"
    )
    for contender, dtype, gpu in (("eager", "bfloat16", "NVIDIA H200"), ("ours", "float32", "NVIDIA H200"),
                                  ("ours", "bfloat16", "NVIDIA A100")):  # fmt: skip
        assert estimated(contender, *shape[:3], dtype, gpu) == {}
    assert linear_entropy.line({"seconds": 0.04, "p20": 0.04, "p80": 0.04}).endswith(" -")
