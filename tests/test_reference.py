"""The oracle itself, against the formulas it stands for and against autograd."""

import pytest
import reference
import torch
from oracles import entropy_gradient

INF = float("inf")


@pytest.fixture
def logits():
    return torch.randn(4, 13, dtype=torch.float64, requires_grad=True)


def test_statistics_are_their_definitions(logits):
    target = torch.tensor([0, 5, 12, 3])
    stats = reference.row_statistics(logits, target, temperature=0.7)
    p = (logits / 0.7).softmax(-1)
    torch.testing.assert_close(stats.entropy, torch.distributions.Categorical(probs=p).entropy())
    torch.testing.assert_close(stats.lse, (logits / 0.7).logsumexp(-1))
    torch.testing.assert_close(stats.logprob, p[torch.arange(4), target].log())
    torch.testing.assert_close(stats.varentropy, (p * p.log() ** 2).sum(-1) - stats.entropy**2)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.3, 1.0, 2.0, 5.0])], ids=["float", "per row"])
def test_gradients(logits, temperature):
    target = torch.tensor([0, 5, 12, 3])
    assert torch.autograd.gradcheck(lambda z: reference.row_statistics(z, target, temperature=temperature), logits)
    assert torch.autograd.gradgradcheck(lambda z: reference.row_statistics(z, target, temperature=temperature), logits)


def test_entropy_gradient_is_the_closed_form(logits):
    entropy = reference.row_statistics(logits, temperature=0.7).entropy
    (gradient,) = torch.autograd.grad(entropy.sum(), logits)
    logp = (logits / 0.7).log_softmax(-1)
    torch.testing.assert_close(gradient, -logp.exp() * (logp + entropy.unsqueeze(-1)) / 0.7)


@pytest.mark.parametrize("temperature", [0.7, torch.tensor([0.3, 1.0, 2.0, 5.0])], ids=["float", "per row"])
def test_the_gradient_without_cancellation_is_autograds(logits, temperature):
    with torch.no_grad():
        logits[1, 3] = -INF
    (gradient,) = torch.autograd.grad(reference.row_statistics(logits, temperature=temperature).entropy.sum(), logits)
    torch.testing.assert_close(entropy_gradient(logits.detach(), temperature), gradient, rtol=1e-12, atol=1e-14)


def test_the_gradient_without_cancellation_is_exact_in_rows_that_are_all_but_one_hot():
    # Of two tokens x nats apart it is p q x.
    x = torch.tensor([1.0, 20.0, 40.0, 300.0], dtype=torch.float64)
    expected = x.sigmoid() * (-x).sigmoid() * x
    gradient = entropy_gradient(torch.stack((torch.zeros_like(x), -x), dim=-1))
    torch.testing.assert_close(gradient, torch.stack((-expected, expected), dim=-1), rtol=1e-13, atol=0)


def test_banned_tokens_and_rows_without_a_distribution():
    logits = torch.tensor([[0.0, -INF, 0.0], [-INF] * 3, [0.0, INF, 0.0], [0.0, torch.nan, 0.0]], requires_grad=True)
    stats = reference.row_statistics(logits)
    assert stats.entropy[0].item() == pytest.approx(torch.log(torch.tensor(2.0)).item())
    assert all(field[1:].isnan().all() for field in (stats.entropy, stats.lse, stats.varentropy))
    (gradient,) = torch.autograd.grad(stats.entropy[0], logits)
    assert gradient[0, 1] == 0


@pytest.mark.parametrize(
    ("mask", "options", "expected"),
    [
        (None, {}, 2.0),
        (torch.tensor([1, 0]), {}, 1.0),
        (torch.tensor([0.5, 2.0]), {}, (0.5 + 6.0) / 2.5),
        (torch.tensor([0.5, 2.0]), {"reduction": "sum"}, 6.5),
        (torch.tensor([7, 0]), {"num_items_in_batch": 4}, 0.25),
        (torch.tensor([0, 0]), {}, 0.0),
    ],
    ids=["mean", "mask", "weights", "sum", "num items", "nothing"],
)
def test_reductions(monkeypatch, mask, options, expected):
    # Rows whose entropies are 1 and 3 nats.
    two_rows = reference.RowStatistics(torch.tensor([1.0, 3.0], dtype=torch.float64), *[torch.zeros(2)] * 3)
    monkeypatch.setattr(reference, "row_statistics", lambda *_, **__: two_rows)
    assert reference.entropy_loss(torch.zeros(2, 5), mask, **options).item() == pytest.approx(expected)
