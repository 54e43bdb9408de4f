"""linear_token_stats is token_stats of the logits it never makes, in every implementation."""

import pytest
import torch
from oracles import assert_entropy, reference_stats
from test_linear_entropy import DTYPES, ROUNDING, logits_of, make, names

from em_kernels import linear_token_entropy, linear_token_stats, token_stats
from em_kernels.arguments import projection
from em_kernels.ops import types

NAN = float("nan")


def check(implementation, hidden, weight, target=None, mask=None, bias=None, upstream=None, temperature=1.0, **options):
    """Values and gradients against the reference."""
    z = logits_of(hidden, weight, bias)
    upstream = [torch.rand(hidden.shape[:-1]) for _ in range(4)] if upstream is None else upstream
    expected, g = reference_stats(z, target, mask, upstream, temperature)
    leaves = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    stats = linear_token_stats(
        *leaves[:2],
        target,
        mask=mask,
        bias=leaves[2],
        temperature=temperature,
        backend=implementation.backend,
        **options,
    )
    assert (stats.logprob is None) == (target is None)
    assert_entropy(stats.entropy, expected[0])
    for field, value in zip(stats[1:4], expected[1:], strict=True):
        if field is not None:
            torch.testing.assert_close(field.detach().cpu().double(), value, rtol=2e-6, atol=2e-5)
    on_device = [u.to(hidden.device) for u in upstream]
    sum((f * u).sum() for f, u in zip(stats[:4], on_device, strict=True) if f is not None).backward()

    dim, vocab = hidden.shape[-1], weight.shape[0]
    h, w = hidden.detach().cpu().double().reshape(-1, dim), weight.detach().cpu().double()
    g = g.reshape(-1, vocab)
    h = torch.where((g != 0).any(-1, keepdim=True), h, 0.0)
    # Of a mix of upstream gradients some cancel; rounding is relative to what did.
    size = (g.abs().amax(-1) + sum(u.double() for u in upstream).reshape(-1)).unsqueeze(-1).expand_as(g)
    size = torch.where((g != 0).any(-1, keepdim=True), size, 0.0)
    share = max(2 * ROUNDING[hidden.dtype], 4e-6)
    for leaf, value, scale in zip(
        leaves, (g @ w, g.T @ h, g.sum(0)), (size @ w.abs(), size.T @ h.abs(), size.sum(0)), strict=True
    ):
        if leaf is not None:
            error = (leaf.grad.cpu().double().reshape(value.shape) - value).abs()
            assert (error <= share * scale + 2 * ROUNDING[hidden.dtype] * value.abs() + 1e-30).all()
    return stats


@pytest.mark.parametrize("chunk_size", [2, None], ids=["chunks of 2", "one chunk"])
@pytest.mark.parametrize("target", [False, True], ids=["no target", "target"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_statistics_and_gradients(implementation, dtype, target, chunk_size):
    implementation.skip_hidden_dtype(dtype)
    hidden, weight, bias = make(implementation, 2, 3, dtype=dtype, bias=True)
    target = torch.randint(0, 70, (2, 3)).to(implementation.device) if target else None
    check(implementation, hidden, weight, target, bias=bias, temperature=2.0, chunk_size=chunk_size)


def test_masked_tokens_are_0_and_get_no_gradient(implementation):
    hidden, weight, _ = make(implementation, 2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=implementation.device)
    hidden[mask == 0] = NAN
    target = torch.randint(0, 70, (2, 3)).to(implementation.device)
    target[mask == 0] = -100
    clean = torch.where((mask == 0).unsqueeze(-1), 0.0, hidden)
    check(implementation, clean, weight, target, mask, chunk_size=2)
    hidden.requires_grad_()
    weight.requires_grad_()
    stats = linear_token_stats(hidden, weight, target, mask=mask, backend=implementation.backend)
    assert all((field[mask == 0] == 0).all() for field in stats[:4])
    sum(field.sum() for field in stats[:4]).backward()
    assert (hidden.grad[mask == 0] == 0).all()
    assert weight.grad.isfinite().all()


def test_token_count(implementation):
    hidden, weight, _ = make(implementation, 2, 3)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]], device=implementation.device)
    target = torch.randint(0, 70, (2, 3)).to(implementation.device)
    hidden[mask == 0], target[mask == 0] = NAN, -100
    clean = torch.where((mask == 0).unsqueeze(-1), 0.0, hidden)
    check(implementation, clean, weight, target.clamp(min=0), mask, chunk_size=3, token_count=4)
    options = {"mask": mask, "backend": implementation.backend}
    extra = ("max_prob", "top1", "mean_logprob", "collision")
    expected = linear_token_stats(hidden, weight, target, extra=extra, **options)
    counted = linear_token_stats(hidden, weight, target, extra=extra, token_count=4, **options)
    entropy = linear_token_entropy(hidden, weight, token_count=4, **options)
    for actual, value in zip((*counted, entropy), (*expected, expected.entropy), strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("count", [0, 2, 5])
def test_a_wrong_token_count_that_cannot_be_seen_makes_nan_of_every_field(monkeypatch, count):
    monkeypatch.setattr(types, "host_sees", lambda _: False)
    monkeypatch.setattr(projection, "values_visible", lambda _: False)
    hidden, weight, mask = torch.randn(6, 8), torch.randn(20, 8), torch.tensor([1, 0, 1, 1, 0, 1])
    options = {"mask": mask, "token_count": count}
    stats = linear_token_stats(hidden, weight, mask, extra=("max_prob", "collision"), **options)
    for field in (*stats[:5], stats.collision, linear_token_entropy(hidden, weight, **options)):
        assert field.isnan().all()


def test_temperature_per_token(implementation):
    hidden, weight, _ = make(implementation, 3, 4)
    temperature = (torch.rand(3, 1) + 0.5).to(implementation.device)
    check(implementation, hidden, weight, temperature=temperature.expand(3, 4), chunk_size=5)


def test_softcap(implementation):
    hidden, weight, _ = make(implementation, 4)
    stats = linear_token_stats(hidden, weight, softcap=5.0, backend=implementation.backend)
    expected = token_stats(logits_of(hidden, weight, softcap=5.0), backend="torch")
    for field, value in zip(stats[:4], expected[:4], strict=True):
        if field is not None:
            torch.testing.assert_close(field.cpu().double(), value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", [(0,), (2, 0), ()], ids=str)
def test_few_tokens(implementation, shape):
    hidden, weight, _ = make(implementation, *shape)
    stats = linear_token_stats(hidden.requires_grad_(), weight, backend=implementation.backend)
    assert stats.entropy.shape == shape
    stats.entropy.sum().backward()
    assert hidden.grad.shape == hidden.shape


def test_a_banned_token_has_a_bias_of_minus_infinity(implementation):
    hidden, weight, bias = make(implementation, 4, bias=True)
    bias[7] = -float("inf")
    target = torch.full((4,), 7, device=implementation.device)
    leaf = weight.requires_grad_()
    stats = linear_token_stats(hidden, leaf, target, bias=bias, backend=implementation.backend)
    assert (stats.logprob == -float("inf")).all()
    stats.entropy.sum().backward()
    assert (leaf.grad[7] == 0).all()


def test_gradcheck_of_every_field():
    hidden, weight, bias = (torch.randn(*s, dtype=torch.float64, requires_grad=True) for s in ((3, 5), (20, 5), (20,)))
    target, mask = torch.randint(0, 20, (3,)), torch.tensor([1, 0, 1])

    def stats(h, w, b):
        stats = linear_token_stats(h, w, target, mask=mask, bias=b, softcap=4.0, temperature=0.7, chunk_size=1)
        return stats[:4]

    assert torch.autograd.gradcheck(stats, (hidden, weight, bias))
