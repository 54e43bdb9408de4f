"""Liger's installed function and ours on the same tensors, and where the two differ on purpose."""

from typing import Any

import pytest
import reference
import torch
from peer_results import assert_same, parameters, results_and_gradients
from ranks import run_on_ranks
from torch import Tensor, distributed

from em_kernels.integrations import liger as ours

theirs = pytest.importorskip("liger_kernel.ops").LigerFusedLinearScaledCrossEntropyFunction
IGNORED = -7


def operands(tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    hidden, weight = torch.randn(tokens, 33), torch.randn(1031, 33) / 3
    target = torch.randint(1031, (tokens,))
    target[1::4] = IGNORED
    return hidden.to(dtype), weight.to(dtype), target


def test_signatures() -> None:
    functional = pytest.importorskip("liger_kernel.transformers.functional")
    assert parameters(ours.LigerFusedLinearScaledCrossEntropyFunction.apply) == parameters(theirs.apply)
    peer = functional.liger_fused_linear_scaled_cross_entropy_tp
    assert parameters(ours.liger_fused_linear_scaled_cross_entropy_tp) == parameters(peer)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("selected", [None, [3, 1030, 3]], ids=["", "selected tokens"])
@pytest.mark.parametrize("entropy", [False, True], ids=["", "entropy"])
def test_values_and_gradients(entropy: bool, selected: list[int] | None, dtype: torch.dtype, error: float) -> None:
    hidden, weight, target = operands(17, dtype)
    arguments: dict[str, Any] = {"temperature": 0.7, "ignore_index": IGNORED, "return_entropy": entropy}
    if selected is not None:
        arguments["selected_token_ids"] = torch.tensor(selected)
    own_apply = ours.LigerFusedLinearScaledCrossEntropyFunction.apply
    own = results_and_gradients(lambda h, w: own_apply(h, w, target, **arguments), hidden, weight)
    peer = results_and_gradients(lambda h, w: theirs.apply(h, w, target, **arguments), hidden, weight)
    assert len(own[0]) == 1 + entropy + (selected is not None)
    assert_same(own, peer, error)
    assert all((x[target == IGNORED] == 0).all() for x in own[0])
    assert (own[1][0][target == IGNORED] == 0).all()


def test_an_ignored_token_is_not_read() -> None:
    hidden, weight, target = operands(9)
    hidden[target == IGNORED] = torch.nan
    own_apply = ours.LigerFusedLinearScaledCrossEntropyFunction.apply
    outputs, gradients = results_and_gradients(
        lambda h, w: own_apply(h, w, target, 1.0, IGNORED, 1, True, torch.tensor([5])), hidden, weight
    )
    assert all(x.isfinite().all() for x in [*outputs, *gradients])


def test_entropies_are_of_unrounded_logits() -> None:
    hidden, weight, target = operands(64, torch.bfloat16)
    expected = reference.row_statistics(hidden.double() @ weight.double().T, temperature=0.7).entropy[target != IGNORED]
    errors = []
    for apply in (ours.LigerFusedLinearScaledCrossEntropyFunction.apply, theirs.apply):
        entropy = apply(hidden, weight, target, temperature=0.7, ignore_index=IGNORED, return_entropy=True)[1]
        errors.append((entropy[target != IGNORED] - expected).abs().max().item())
    assert errors[0] < 1e-5
    assert errors[1] > 1e-3


def _on_a_rank(hidden: Tensor, weight: Tensor, target: Tensor, cut: int) -> tuple[list[Tensor], list[Tensor]]:
    rank = distributed.get_rank()
    own = (weight[:cut], weight[cut:])[rank]
    # Without a group, the ranks are all.
    group = distributed.group.WORLD if rank == 0 else None
    outputs, gradients = results_and_gradients(
        lambda h, w: ours.liger_fused_linear_scaled_cross_entropy_tp(
            h, w, target, group, temperature=0.7, ignore_index=IGNORED, return_entropy=True
        ),
        hidden,
        own,
    )
    return [x.detach() for x in outputs], gradients


def test_a_vocabulary_of_two_ranks() -> None:
    hidden, weight, target = operands(17)
    outputs, (of_hidden, of_weight) = results_and_gradients(
        lambda h, w: theirs.apply(h, w, target, temperature=0.7, ignore_index=IGNORED, return_entropy=True),
        hidden,
        weight,
    )
    cut = 600
    for rank, own in enumerate(run_on_ranks(2, _on_a_rank, hidden, weight, target, cut)):
        of_rank = (of_weight[:cut], of_weight[cut:])[rank]
        assert_same(own, ([x.detach() for x in outputs], [of_hidden, of_rank]), 1e-5)


def test_without_a_process_group_ranks_are_refused() -> None:
    with pytest.raises(RuntimeError, match=r"torch\.distributed is not initialised"):
        ours.liger_fused_linear_scaled_cross_entropy_tp(*operands(5), None)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"ignore_index": IGNORED, "selected_token_ids": torch.tensor([[1]])},
            r"selected_token_ids has shape \(1, 1\)",
        ),
        ({}, f"target has {IGNORED}"),
    ],
    ids=["selected tokens", "ignored target"],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.LigerFusedLinearScaledCrossEntropyFunction.apply(*operands(5), **options)
