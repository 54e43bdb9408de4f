"""These tests check that drawn operands are as peaked as their documentation says."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from accuracy import LinearReference, Operands, demand, draw_linear_targets, draw_logits, draw_operands, draw_targets

from em_kernels import token_entropy

CPU = torch.device("cpu")


def test_drawn_logits_have_the_stated_mean_entropy():
    peaked = token_entropy(draw_logits("peaked", 512, 32000, torch.float32, CPU))
    assert peaked.mean().item() == pytest.approx(0.5, abs=0.1)
    flat = token_entropy(draw_logits("flat", 4, 32000, torch.float32, CPU))
    assert torch.allclose(flat, torch.tensor(32000.0).log() - 0.005, atol=2e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drawn_operands_are_about_as_peaked_as_a_models(dtype):
    operands = draw_operands(512, 576, 8192, dtype, CPU)
    logits = operands.hidden.float() @ operands.weight.float().T
    assert token_entropy(logits, temperature=0.5).mean().item() == pytest.approx(0.4, abs=0.15)
    reference = LinearReference(operands, draw_linear_targets(operands, 0.5), 0.5)
    assert reference.loss("entropy").item() == pytest.approx(0.4, abs=0.15)
    assert 0.85 < reference.sparsity["rows_kept"] < 1
    # The same number of columns is a larger share of a smaller vocabulary.
    assert 0.02 < reference.sparsity["columns_kept"] < 0.3


@pytest.mark.parametrize(("dim", "vocab"), [(64, 8), (2, 100), (1, 1)])
def test_operands_of_any_shape_can_be_drawn(dim, vocab):
    operands = draw_operands(3, dim, vocab, torch.float32, CPU)
    assert [tuple(x.shape) for x in operands] == [(3, dim), (vocab, dim)]
    assert all(x.isfinite().all() and x.requires_grad for x in operands)


def test_targets_are_drawn_from_the_rows_own_distributions():
    logits = torch.zeros(4000, 3)
    logits[:, 1], logits[:, 2] = 1.0, -torch.inf
    share = (draw_targets(logits, temperature=0.5) == 1).float().mean().item()
    assert share == pytest.approx(torch.tensor(2.0).sigmoid().item(), abs=0.03)
    operands = Operands(torch.eye(3), torch.eye(3) * 100)
    assert draw_linear_targets(operands).tolist() == [0, 1, 2]


def test_a_wrong_result_of_ours_is_a_failure_and_one_of_a_peer_is_shown():
    assert demand("a peer | forward", {"loss_error": 3.0}, {"loss_error": 1e-6}) == {"loss_error": 3.0}
    assert demand("ours | forward", {"loss_error": 1e-7, "gradient_error": None}, {"loss_error": 1e-6})
    with pytest.raises(ArithmeticError, match="loss_error"):
        demand("ours | forward", {"loss_error": float("nan")}, {"loss_error": 1e-6})
