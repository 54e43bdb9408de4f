"""token_stats and token_entropy keep their contract, in every implementation, against the float64 reference."""

import itertools

import pytest
import torch
from oracles import assert_entropy, assert_gradient, reference_stats

from em_kernels import TokenStats, token_entropy, token_stats

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One, less than a vector, a little, more than one Triton tile.
VOCABS = [1, 7, 100, 9000]
FIELDS = TokenStats._fields[:4]


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def check(implementation, logits, target=None, mask=None, upstream=(1.0, 1.0, 1.0, 1.0), temperature=1.0):
    """The statistics and the gradient of their mix against the reference; upstream None: the field is not used."""
    shape = logits.shape[:-1]
    device = logits.device
    upstream = [None if g is None else g if isinstance(g, torch.Tensor) else torch.full(shape, g) for g in upstream]
    expected, expected_gradient = reference_stats(logits, target, mask, upstream, temperature)
    leaf = logits.detach().requires_grad_()
    before = logits.detach().clone()
    stats = token_stats(leaf, target, mask=mask, temperature=temperature, backend=implementation.backend)
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    assert all(field is None or (field.dtype == dtype and field.shape == shape) for field in stats[:4])
    assert (stats.logprob is None) == (target is None)

    assert_entropy(stats.entropy, expected[0])
    # The largest exponent of a row bounds what rounds: lse to its own unit in the last place, the target's
    # log-probability and the variance relative to the distances d they are made of.
    z = torch.where(logits.isfinite(), logits.double(), 0.0).cpu()
    spread = (z.amax(-1) - z.amin(-1)) / (temperature.cpu() if isinstance(temperature, torch.Tensor) else temperature)
    torch.testing.assert_close(stats.lse.detach().cpu().double(), expected[1], rtol=3e-7, atol=1e-6, equal_nan=True)
    if target is not None:
        assert_within(stats.logprob, expected[2], 1e-6 + 3e-7 * spread)
    assert_within(stats.varentropy, expected[3], 1e-6 + 4e-7 * spread * (1 + spread))

    used = [
        field * g.to(device)
        for field, g in zip(stats[:4], upstream, strict=True)
        if field is not None and g is not None
    ]
    sum(field.sum() for field in used).backward()
    assert torch.equal(logits.nan_to_num(0.1), before.nan_to_num(0.1)), "the logits were changed"
    # 1 - p of a log-probability cancels, as do the terms of a variance: their rounding is relative to the upstream
    # gradient over the temperature. That of the entropy alone is not.
    only_entropy = all(g is None for g in upstream[1:])
    inv = 1 / temperature
    scale = sum((g.abs() for g in upstream if g is not None), torch.zeros(shape)).to(device) * inv
    scale = torch.zeros(shape) if only_entropy else scale
    assert_gradient(leaf.grad, expected_gradient, logits.dtype, scale=scale)
    return stats, leaf.grad


def assert_within(actual, expected, allowed):
    actual = actual.detach().cpu().double()
    assert torch.equal(actual.isnan(), expected.isnan())
    same_infinity = actual == expected
    error = torch.where(same_infinity, 0.0, (actual - expected).abs().nan_to_num(0.0))
    assert (error <= allowed).all(), f"off by {error.max():.2e}, allowed {allowed.min():.2e}"


def make(implementation, *shape, dtype=torch.float32):
    logits = (torch.randn(shape) * 3).to(dtype).to(implementation.device)
    return logits, torch.randint(0, shape[-1], shape[:-1]).to(implementation.device)


@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_statistics_and_mixed_gradient(implementation, dtype, vocab):
    implementation.skip_dtype(dtype)
    logits, target = make(implementation, 2, 3, vocab, dtype=dtype)
    check(implementation, logits, target, upstream=[torch.randn(2, 3) for _ in FIELDS], temperature=0.7)


@pytest.mark.parametrize(
    "used", itertools.product([False, True], repeat=4), ids=lambda used: "".join("01"[u] for u in used)
)
def test_any_mix_of_fields_may_be_used(implementation, used):
    if not any(used):
        pytest.skip("nothing to differentiate")
    logits, target = make(implementation, 4, 90)
    check(implementation, logits, target, upstream=[torch.randn(4) if u else None for u in used])


@pytest.mark.parametrize("target_dtype", [torch.int64, torch.int32, torch.uint8], ids=names)
def test_targets(implementation, target_dtype):
    logits, target = make(implementation, 4, 90)
    check(implementation, logits, target.to(target_dtype))
    assert check(implementation, logits)[0].logprob is None


@pytest.mark.parametrize("kind", ["bool", "int64", "float32"])
def test_masked_tokens_are_0_and_get_no_gradient(implementation, kind):
    logits, target = make(implementation, 2, 3, 60)
    mask = torch.tensor([[1, 0, 1], [0, 1, 1]]).to(getattr(torch, kind)).to(implementation.device)
    logits[mask == 0] = NAN
    target[mask == 0] = -100
    stats, gradient = check(implementation, logits, target, mask, upstream=[torch.randn(2, 3) for _ in FIELDS])
    assert all((field[mask == 0] == 0).all() for field in stats[:4])
    assert (gradient[mask == 0] == 0).all()


def test_masked_tokens_get_no_gradient_even_from_an_infinite_upstream(implementation):
    logits, target = make(implementation, 3, 60)
    logits.requires_grad_()
    mask = torch.tensor([True, False, True], device=implementation.device)
    stats = token_stats(logits, target, mask=mask, backend=implementation.backend)
    upstream = torch.tensor([1.0, INF, 1.0], device=implementation.device)
    torch.autograd.backward(list(stats[:4]), [upstream] * 4)
    assert (logits.grad[1] == 0).all()
    assert logits.grad.isfinite().all()


def test_a_banned_target_has_log_probability_minus_infinity(implementation):
    logits, target = make(implementation, 2, 60)
    logits[0, 5], target[0] = -INF, 5
    stats, _ = check(implementation, logits, target, upstream=(1.0, 1.0, None, 1.0))
    assert stats.logprob[0] == -INF


def test_temperature_per_token(implementation):
    logits, target = make(implementation, 3, 4, 60)
    check(implementation, logits, target, temperature=(torch.rand(3, 1) + 0.3).to(implementation.device).expand(3, 4))


@pytest.mark.parametrize("view", ["shifted", "transposed", "expanded"])
def test_strides(implementation, view):
    logits, target = make(implementation, 3, 4, 60)
    if view == "shifted":
        check(implementation, logits[:, :-1], target[:, 1:])
    elif view == "transposed":
        check(implementation, logits.transpose(0, 1), target.T)
    else:
        check(implementation, logits[:1].expand(3, -1, -1), target)


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (10,)], ids=str)
def test_few_tokens(implementation, shape):
    logits, target = make(implementation, *shape)
    logits.requires_grad_()
    stats = token_stats(logits, target, backend=implementation.backend)
    assert all(field.shape == shape[:-1] for field in stats[:4])
    sum(field.sum() for field in stats[:4]).backward()
    assert logits.grad.shape == shape


@pytest.mark.parametrize("bad", [NAN, INF, "all -inf"])
def test_rows_without_a_distribution_are_nan_and_spare_the_others(implementation, bad):
    logits, target = make(implementation, 3, 60)
    logits[1] = -INF if bad == "all -inf" else logits[1]
    if bad != "all -inf":
        logits[1, 7] = bad
    stats = token_stats(logits, target, backend=implementation.backend)
    for field in stats[:4]:
        assert field.isnan().tolist() == [False, True, False]


def test_uniform_rows_have_no_varentropy(implementation):
    logits = torch.full((2, 300), 2.0, device=implementation.device)
    assert (token_stats(logits, backend=implementation.backend).varentropy == 0).all()


def test_two_runs_agree_bit_for_bit(implementation):
    logits, target = make(implementation, 5, 9000)
    first, second = (check(implementation, logits, target) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first[0][:4], second[0][:4], strict=True))
    assert torch.equal(first[1], second[1])


def test_gradcheck_of_every_field():
    logits = torch.randn(3, 20, dtype=torch.float64, requires_grad=True)
    target, mask = torch.randint(0, 20, (3,)), torch.tensor([1, 0, 1])
    assert torch.autograd.gradcheck(lambda z: token_stats(z, target, mask=mask, temperature=0.7)[:4], logits)


def test_token_entropy_is_the_entropy_without_a_gradient(implementation):
    logits, _ = make(implementation, 2, 3, 60)
    logits.requires_grad_()
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=implementation.device)
    entropy = token_entropy(logits, mask=mask, temperature=0.5, backend=implementation.backend)
    assert not entropy.requires_grad
    expected = token_stats(logits, mask=mask, temperature=0.5, backend=implementation.backend).entropy
    assert torch.equal(entropy, expected.detach())


@pytest.mark.parametrize("rows", [1, 3])
def test_few_long_rows(implementation, rows):
    # Monitoring at decode time: a row is split over programs where there are too few to go round.
    logits, target = make(implementation, rows, 70_001, dtype=torch.float32)
    check(implementation, logits, target)


@pytest.mark.parametrize("short", range(1, 8))
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_extra_statistics_of_rows_that_end_just_before_a_block_does(implementation, dtype, short):
    # A row that begins at a boundary may have a block less than one of the same length that does not.
    implementation.skip_dtype(dtype)
    vocab = 2048 - short
    logits = torch.randn(2, vocab).to(dtype)
    found = token_stats(logits.to(implementation.device), extra=("mean_logprob",), backend=implementation.backend)
    expected = logits.double().log_softmax(-1).mean(-1)
    torch.testing.assert_close(found.mean_logprob.cpu().double(), expected, rtol=1e-5, atol=1e-5)
