"""TRL's installed functions and ours on the same tensors, and where the two differ on purpose."""

from typing import Any

import pytest
import torch
from peer_results import assert_same, parameters, results_and_gradients

from em_kernels.integrations import trl_helpers as ours

theirs = pytest.importorskip("trl.trainer.utils")

NAMES = ("entropy_from_logits", "selective_log_softmax", "selective_log_softmax_and_entropy")
CASES = [
    ("entropy_from_logits", "plain"),
    *[(name, how) for name in NAMES[1:] for how in ("plain", "temperature", "row mask")],
    *[("selective_log_softmax", how) for how in ("several tokens", "several tokens, masked")],
]
# TRL's share of the error: in bfloat16 it rounds results, and what its gradients are made of, to 8 bits.
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


@pytest.mark.parametrize("name", NAMES)
def test_signature(name: str) -> None:
    assert parameters(getattr(ours, name)) == parameters(getattr(theirs, name))


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", [(5, 1031), (2, 7, 300)], ids=str)
@pytest.mark.parametrize(("name", "how"), CASES)
def test_values_and_gradients(name: str, how: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    several = how.startswith("several")
    logits = (3 * torch.randn(shape)).to(dtype)
    arguments: dict[str, Any] = {}
    if name != "entropy_from_logits":
        arguments["index"] = torch.randint(shape[-1], (*shape[:-1], 4) if several else shape[:-1])
    if how != "plain":
        arguments["temperature"] = 0.7
    if "mask" in how:
        arguments["row_mask"] = torch.rand(arguments["index"].shape) < 0.6
        arguments["row_mask"].flatten(0, arguments["index"].dim() - 2)[1] = False
    own = results_and_gradients(lambda z: getattr(ours, name)(z, **arguments), logits)
    peer = results_and_gradients(lambda z: getattr(theirs, name)(z, **arguments), logits)
    assert_same(own, peer, ERRORS[dtype])
    assert own[1][0].dtype == dtype


def test_an_entropy_without_a_gradient() -> None:
    logits, index = torch.randn(3, 9, requires_grad=True), torch.tensor([1, 2, 3])
    logprob, entropy = ours.selective_log_softmax_and_entropy(logits, index, entropy_requires_grad=False)
    assert logprob.requires_grad
    assert not entropy.requires_grad


@pytest.mark.parametrize("several", [False, True])
def test_a_masked_row_is_not_read(several: bool) -> None:
    logits = torch.randn(3, 9)
    logits[1] = torch.nan
    index = torch.full((3, 2) if several else (3,), 4)
    index[1] = -100
    mask = index >= 0
    (logprob,), (gradient,) = results_and_gradients(
        lambda z: ours.selective_log_softmax(z, index, row_mask=mask), logits
    )
    assert (logprob[1] == 0).all()
    assert (gradient[1] == 0).all()
    assert (logprob[[0, 2]] < 0).all()
    assert gradient.isfinite().all()


def test_banned_tokens_are_finite_where_trls_are_not() -> None:
    logits = torch.randn(4, 100)
    logits[:, ::3] = -torch.inf
    index = torch.full((4,), 1)
    assert theirs.selective_log_softmax_and_entropy(logits, index)[1].isnan().all()
    outputs, (gradient,) = results_and_gradients(lambda z: ours.selective_log_softmax_and_entropy(z, index), logits)
    kept = logits[:, logits[0] > -torch.inf]
    expected = ours.selective_log_softmax_and_entropy(kept, torch.zeros_like(index))
    torch.testing.assert_close(outputs, list(expected))
    assert (gradient[:, ::3] == 0).all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0"),
        ({"row_mask": torch.ones(2)}, r"row_mask has shape \(2,\), expected that of index, \(2, 2\)"),
    ],
    ids=["temperature", "row_mask"],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ours.selective_log_softmax(torch.randn(2, 5), torch.tensor([[1, 2], [3, 4]]), **options)


def test_a_target_out_of_range_is_refused() -> None:
    with pytest.raises(ValueError, match="target has 7"):
        ours.selective_log_softmax_and_entropy(torch.randn(2, 5), torch.tensor([1, 7]))
