"""verl's installed functions and ours on the same tensors, and where the two differ on purpose."""

import sys
from pathlib import Path
from typing import Any

import pytest
import reference
import torch
from peer_results import assert_same, parameters, results_and_gradients
from ranks import run_on_ranks
from torch import Tensor, distributed

from em_kernels.integrations import verl as ours

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from peers import from_verl

pytest.importorskip("tensordict", reason="verl is not installed")

FUNCTIONAL, KERNEL = "verl.utils.torch_functional", "verl.utils.kernel.linear_cross_entropy"
FUSED = "verl.utils.experimental.torch_functional"
LOGITS_FUNCTIONS = ("entropy_from_logits", "entropy_from_logits_with_chunking")
LABEL_FUNCTIONS = ("logprobs_from_logits", "logprobs_from_logits_v2", "logprobs_from_logits_naive")
PADDED = ("log_probs_from_logits_response",)
UNPADDED = ("log_probs_from_logits_response_rmpad", "log_probs_from_logits_all_rmpad")
# verl's share of the error: in bfloat16 it rounds results, and what its gradients are made of, to 8 bits.
ERRORS = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def theirs(name: str) -> Any:
    return from_verl(FUNCTIONAL, name)


@pytest.mark.parametrize("name", [*LOGITS_FUNCTIONS, *LABEL_FUNCTIONS, *PADDED, *UNPADDED])
def test_signature(name: str) -> None:
    assert parameters(getattr(ours, name)) == parameters(theirs(name))


def test_signatures_of_the_linear_functions() -> None:
    assert parameters(ours.linear_cross_entropy) == parameters(from_verl(KERNEL, "LinearCrossEntropy").forward)
    peer = from_verl(FUSED, "FusedLinearForPPO")
    assert parameters(ours.FusedLinearForPPO.__init__) == parameters(peer.__init__)
    assert parameters(ours.FusedLinearForPPO.forward) == parameters(peer.forward)


@pytest.mark.parametrize("dtype", ERRORS, ids=str)
@pytest.mark.parametrize("shape", [(5, 1031), (2, 7, 300)], ids=str)
@pytest.mark.parametrize("name", ["entropy_from_logits", *LABEL_FUNCTIONS])
def test_logits(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(shape)).to(dtype)
    arguments = (torch.randint(shape[-1], shape[:-1]),) if name in LABEL_FUNCTIONS else ()
    own = results_and_gradients(lambda z: getattr(ours, name)(z, *arguments), logits)
    peer = results_and_gradients(lambda z: theirs(name)(z, *arguments), logits)
    assert_same(own, peer, ERRORS[dtype])
    assert own[1][0].dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_logits_in_chunks(dtype: torch.dtype) -> None:
    logits = (3 * torch.randn(9, 1031)).to(dtype)
    own = results_and_gradients(lambda z: ours.entropy_from_logits_with_chunking(z, 4), logits)
    peer = results_and_gradients(lambda z: theirs("entropy_from_logits_with_chunking")(z, 4), logits)
    # verl's values are made in float32 here, and its gradient is rounded once.
    assert_same(own, peer, 1e-5 if dtype == torch.float32 else 8e-3)


def test_responses_with_and_without_padding() -> None:
    batch, time, response, vocabulary = 3, 9, 4, 50
    input_ids, logits = torch.randint(vocabulary, (batch, time)), torch.randn(batch, time, vocabulary)
    attended = torch.ones(batch, time, dtype=torch.long)
    attended[0, :3] = attended[2, -2:] = 0
    expected = theirs("log_probs_from_logits_response")(input_ids, logits, response)
    torch.testing.assert_close(ours.log_probs_from_logits_response(input_ids, logits, response), expected)
    # A label after the last attended token of its sequence is another sequence's token: callers leave it out.
    counted = attended[:, -response:].bool()
    without_padding = logits[attended.bool()]
    own = ours.log_probs_from_logits_response_rmpad(input_ids, attended, without_padding, response)
    torch.testing.assert_close(own[counted], expected[counted])
    indices = attended.flatten().nonzero().squeeze(-1)
    tokens = input_ids[attended.bool()].unsqueeze(0)
    own = ours.log_probs_from_logits_all_rmpad(tokens, without_padding, indices, batch, time, response)
    torch.testing.assert_close(own[counted], expected[counted])


def operands(tokens: tuple[int, ...], dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    # Neither the vocabulary nor the hidden size is a multiple of anything.
    hidden, weight = torch.randn(*tokens, 33), torch.randn(1031, 33) / 3
    return hidden.to(dtype), weight.to(dtype), torch.randint(1031, tokens)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("tokens", [(17,), (3, 8)], ids=str)
def test_hidden_states(tokens: tuple[int, ...], dtype: torch.dtype, error: float) -> None:
    hidden, weight, labels = operands(tokens, dtype)
    peer_function = from_verl(FUSED, "FusedLinearForPPO")()
    peer = results_and_gradients(lambda h, w: peer_function(h, w, labels, temperature=0.7), hidden, weight)
    own_function = ours.FusedLinearForPPO()
    assert_same(
        results_and_gradients(lambda h, w: own_function(h, w, labels, temperature=0.7), hidden, weight), peer, error
    )
    own = results_and_gradients(lambda h, w: ours.linear_cross_entropy(h, w, labels, 0.7), hidden, weight)
    # verl's kernel flattens the tokens.
    assert [x.shape for x in own[0]] == [(len(labels.flatten()),)] * 2
    assert_same(own, ([x.flatten() for x in peer[0]], peer[1]), error)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean", "Mean"])
def test_the_reduction_is_of_the_log_probabilities(reduction: str) -> None:
    hidden, weight, labels = operands((2, 9))
    logprob, entropy = ours.linear_cross_entropy(hidden, weight, labels, 1.5, reduction)
    expected = reference.row_statistics((hidden @ weight.T).flatten(0, 1), labels.flatten(), temperature=1.5)
    whole = expected.logprob
    assert whole is not None
    reduced = {"none": whole, "sum": whole.sum(), "mean": whole.mean()}[reduction.lower()]
    torch.testing.assert_close(logprob.double(), reduced, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(entropy.double(), expected.entropy, rtol=1e-5, atol=1e-5)


def test_a_temperature_for_each_token() -> None:
    hidden, weight, labels = operands((2, 3))
    temperature = torch.linspace(0.5, 2.0, 6)
    logprob, entropy = ours.linear_cross_entropy(hidden, weight, labels, temperature)
    fused = ours.FusedLinearForPPO()(hidden, weight, labels, temperature=temperature)
    torch.testing.assert_close((logprob.view(2, 3), entropy.view(2, 3)), fused)
    for token in range(6):
        alone = ours.linear_cross_entropy(
            hidden.flatten(0, 1)[token : token + 1],
            weight,
            labels.flatten()[token : token + 1],
            temperature[token].item(),
        )
        torch.testing.assert_close((logprob[token : token + 1], entropy[token : token + 1]), alone)


def _on_a_rank(hidden: Tensor, weight: Tensor, labels: Tensor, cut: int) -> tuple[list[Tensor], list[Tensor]]:
    rank, group = distributed.get_rank(), distributed.group.WORLD
    own = (weight[:cut], weight[cut:])[rank]
    outputs, (of_hidden, of_weight) = results_and_gradients(
        lambda h, w: ours.linear_cross_entropy(h, w, labels, 0.7, "none", group), hidden, own
    )
    # verl's caller does this.
    distributed.all_reduce(of_hidden, group=group)
    return [x.detach() for x in outputs], [of_hidden, of_weight]


def test_a_vocabulary_of_two_ranks() -> None:
    hidden, weight, labels = operands((2, 9))
    expected, (of_hidden, of_weight) = results_and_gradients(
        lambda h, w: ours.linear_cross_entropy(h, w, labels, 0.7), hidden, weight
    )
    cut = 600
    for rank, (outputs, gradients) in enumerate(run_on_ranks(2, _on_a_rank, hidden, weight, labels, cut)):
        own = (of_weight[:cut], of_weight[cut:])[rank]
        assert_same((outputs, gradients), ([x.detach() for x in expected], [of_hidden, own]), 2e-6)


def test_banned_tokens_are_finite_where_verls_are_not() -> None:
    logits = torch.randn(4, 100)
    logits[:, ::3] = -torch.inf
    assert theirs("entropy_from_logits")(logits).isnan().all()
    (entropy,), (gradient,) = results_and_gradients(ours.entropy_from_logits, logits)
    torch.testing.assert_close(entropy, ours.entropy_from_logits(logits[:, logits[0] > -torch.inf]))
    assert (gradient[:, ::3] == 0).all()
    assert gradient.isfinite().all()


def test_the_entropy_of_a_decided_token_is_not_negative() -> None:
    logits = 1e4 + torch.randn(200, 64)
    logits[:, 0] += 20
    entropy = ours.entropy_from_logits(logits)
    expected = reference.row_statistics(logits).entropy
    assert (theirs("entropy_from_logits")(logits) - expected).abs().max() > 1e-4
    assert (entropy - expected).abs().max() < 1e-6
    assert (entropy >= 0).all()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [((1.0, "median"), ValueError, "reduction is 'median'"), ((1.0, None), TypeError, "reduction is a NoneType")],
)
def test_an_unknown_reduction(arguments: tuple[Any, ...], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ours.linear_cross_entropy(*operands((3,)), *arguments)


def test_a_label_outside_the_vocabulary() -> None:
    with pytest.raises(ValueError, match="target has -100"):
        ours.logprobs_from_logits(torch.randn(2, 5), torch.tensor([1, -100]))
