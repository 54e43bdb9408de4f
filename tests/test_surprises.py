"""What users trip over: unusual inputs, modes and ways to call, each of which has one right behaviour."""

import itertools

import numpy as np
import pytest
import reference
import torch
from oracles import assert_entropy, assert_gradient, reference_loss, reference_stats
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_token_entropy,
    linear_token_stats,
    token_entropy,
    token_stats,
)
from em_kernels.ops.types import EXTRA

INF, NAN = float("inf"), float("nan")


def functions_of_logits(backend):
    """Every differentiable function of logits, each as a scalar."""
    return {
        "mean": lambda z: entropy_loss(z, backend=backend),
        "none": lambda z: entropy_loss(z, reduction="none", backend=backend).sum(),
        "token_stats": lambda z: sum(field.sum() for field in token_stats(z, backend=backend)[:4] if field is not None),
    }


def functions_of_hidden(weight, backend):
    return {
        "linear mean": lambda h: linear_entropy_loss(h, weight, backend=backend),
        "linear none": lambda h: linear_entropy_loss(h, weight, reduction="none", backend=backend).sum(),
        "linear_token_stats": lambda h: linear_token_stats(h, weight, backend=backend).lse.sum(),
    }


@pytest.fixture
def calls(implementation):
    """The name of each function with the function and an input of shape (3, 9)."""
    weight = torch.randn(20, 9, device=implementation.device)
    backend = implementation.backend
    x = torch.randn(3, 9, device=implementation.device)
    functions = {**functions_of_logits(backend), **functions_of_hidden(weight, backend)}
    return {name: (function, x) for name, function in functions.items()}


# ------------------------------------------------------------------------------------------------------------- values


@pytest.mark.parametrize("used", [u for u in itertools.product((False, True), repeat=4) if any(u)], ids=str)
def test_banned_tokens_in_rows_of_two_and_of_one_choice(implementation, used):
    logits = torch.tensor([[0.0, 0.0, -INF], [0.0, -INF, -INF]], device=implementation.device)
    target = torch.tensor([1, 0], device=implementation.device)
    leaf = logits.clone().requires_grad_()
    stats = token_stats(leaf, target, backend=implementation.backend)
    assert_entropy(stats.entropy, torch.tensor([2.0, 1.0], dtype=torch.float64).log())
    upstream = [torch.tensor([1.5, -2.0]) if u else None for u in used]
    sum((f * g.to(f.device)).sum() for f, g in zip(stats[:4], upstream, strict=True) if g is not None).backward()
    assert leaf.grad.isfinite().all()
    assert (leaf.grad[logits == -INF] == 0).all()
    _, expected = reference_stats(logits, target, None, upstream)
    assert_gradient(leaf.grad, expected, torch.float32, scale=torch.full((2,), 3.0))
    for reduction in ("mean", "none"):
        leaf = logits.clone().requires_grad_()
        loss = entropy_loss(leaf, reduction=reduction, backend=implementation.backend)
        loss.sum().backward()
        assert_entropy(loss, reference.entropy_loss(logits.cpu(), reduction=reduction))
        assert (leaf.grad == 0).all()


def test_the_largest_distance_of_float16(implementation):
    implementation.skip_dtype(torch.float16)
    leaf = torch.tensor([[65504.0, -65504.0]], dtype=torch.float16, device=implementation.device).requires_grad_()
    loss = entropy_loss(leaf, backend=implementation.backend)
    loss.backward()
    assert loss.item() == 0
    assert (leaf.grad == 0).all()


@pytest.mark.parametrize("vocab", [31, 4097, 129_920, 151_665])
def test_vocabularies_of_real_models_and_odd_ones(implementation, vocab):
    logits = torch.randn(2, vocab, device=implementation.device) * torch.tensor([[6.0], [2.0]]).to(
        implementation.device
    )
    leaf = logits.requires_grad_()
    expected, expected_gradient = reference_loss(logits, temperature=0.5)
    loss = entropy_loss(leaf, temperature=0.5, backend=implementation.backend)
    loss.backward()
    assert_entropy(loss, expected)
    assert_gradient(leaf.grad, expected_gradient, torch.float32)


@pytest.mark.parametrize(
    "view",
    [
        (lambda: torch.randn(2, 6, 32), lambda z: z[:, :-1, :27]),
        (lambda: torch.randn(4, 2, 8), lambda z: z.transpose(0, 1)),
    ],
    ids=["cut", "transposed"],
)
def test_views_are_their_copies(implementation, view):
    base, take = view
    logits = take(base().to(implementation.device))
    assert not logits.is_contiguous()
    results = []
    for z in (logits, logits.contiguous()):
        leaf = z.detach().requires_grad_()
        stats = token_stats(leaf, backend=implementation.backend)
        (entropy_loss(leaf, backend=implementation.backend) + stats.lse.sum()).backward()
        results.append((stats.entropy, leaf.grad))
    if implementation.backend == "triton":
        # Rows that begin elsewhere between two 16-byte boundaries are summed in another order.
        for ours, of_copy in zip(*results, strict=True):
            torch.testing.assert_close(ours, of_copy, rtol=2e-6, atol=1e-6)
    else:
        assert all(map(torch.equal, *results))


def test_a_view_with_the_negative_bit(calls):
    for name, (function, x) in calls.items():
        view = torch._neg_view(x)
        assert view.is_neg()
        results = []
        for z in (view, view.clone()):
            leaf = z.detach().requires_grad_()
            value = function(leaf)
            value.backward()
            results.append((value, leaf.grad))
        torch.testing.assert_close(results[0], results[1], rtol=0, atol=0, msg=name)
    z, mask = torch.randn(3, 9), torch._neg_view(torch.tensor([-1.0, -0.5, -2.0]))
    assert torch.equal(entropy_loss(z, mask), entropy_loss(z, mask.clone()))
    with pytest.raises(ValueError, match="negative bit"):
        entropy_loss(torch._neg_view(torch.randn(3, 9)).requires_grad_(), inplace_backward=True)


@pytest.mark.parametrize("distance", [5.0, 20.0, 30.0])
@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_the_logprob_of_a_confident_token_keeps_its_relative_accuracy(implementation, distance, tau):
    logits = torch.tensor([[0.0, -distance, -distance - 1], [3.0, 3.0 - distance, -INF]]).to(implementation.device)
    target = torch.tensor([0, 0], device=implementation.device)
    rest = ((logits[:, 1:].double() - logits[:, :1].double()) / tau).exp().sum(-1).cpu()
    for function in (
        lambda z: token_stats(z, target, temperature=tau, backend=implementation.backend),
        lambda z: linear_token_stats(
            torch.ones(2, 1, device=z.device), z[0][:, None], target, temperature=tau, backend=implementation.backend
        ),
    ):
        leaf = logits.clone().requires_grad_()
        logprob = function(leaf).logprob
        logprob.sum().backward()
        if len(set(logprob.tolist())) == 1:  # Hidden states of one row of logits, twice.
            torch.testing.assert_close(logprob.cpu().double(), -rest[:1].log1p().expand(2), rtol=1e-5, atol=0)
            torch.testing.assert_close(
                leaf.grad[0, 0].cpu().double(), 2 * rest[0] / (1 + rest[0]) / tau, rtol=1e-5, atol=0
            )
            continue
        torch.testing.assert_close(logprob.detach().cpu().double(), -rest.log1p(), rtol=1e-5, atol=0)
        torch.testing.assert_close(leaf.grad[:, 0].cpu().double(), rest / (1 + rest) / tau, rtol=1e-5, atol=0)


def test_a_confident_token_far_into_a_long_row(implementation):
    logits = torch.full((2, 9001), -30.0, device=implementation.device)
    target = torch.tensor([9000, 4500], device=implementation.device)
    logits[0, 9000] = logits[1, 4500] = 0
    leaf = logits.requires_grad_()
    logprob = token_stats(leaf, target, backend=implementation.backend).logprob
    logprob.sum().backward()
    rest = torch.full((2,), 9000 * np.exp(-30.0))
    torch.testing.assert_close(logprob.detach().cpu(), -rest, rtol=1e-5, atol=0, check_dtype=False)
    at_target = leaf.grad.gather(1, target[:, None])[:, 0]
    torch.testing.assert_close(at_target.cpu(), rest, rtol=1e-5, atol=0, check_dtype=False)


# ------------------------------------------------------------------------------------------ the statistics' own options


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
@pytest.mark.parametrize("linear", [False, True], ids=["logits", "hidden"])
def test_extra_statistics(implementation, linear, dtype):
    hidden = torch.randint(-2, 3, (2, 5, 8), device=implementation.device).to(dtype)
    weight = (torch.randint(-2, 3, (400, 8), device=implementation.device) / 2).to(dtype)
    logits = hidden.double() @ weight.double().T
    target = torch.randint(0, 400, (2, 5), device=implementation.device)
    target[0] = logits[0].argmax(-1)
    mask = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 1, 1, 1]], device=implementation.device)
    options = {"mask": mask, "temperature": 0.8, "extra": EXTRA, "backend": implementation.backend}
    if linear:
        implementation.skip_hidden_dtype(dtype)
        leaf = hidden.requires_grad_()
        stats = linear_token_stats(leaf, weight, target, chunk_size=3, **options)
    else:
        implementation.skip_dtype(dtype)
        leaf = logits.to(dtype).requires_grad_()
        stats = token_stats(leaf, target, **options)
    expected = reference.extra_statistics(logits.cpu(), target.cpu(), temperature=0.8)
    for name in EXTRA:
        actual, value = getattr(stats, name), torch.where(mask.cpu() != 0, getattr(expected, name), 0.0)
        assert not actual.requires_grad
        torch.testing.assert_close(actual.cpu().double(), value, rtol=3e-6, atol=2e-6, msg=name)
    # What is asked for beside them stays differentiable, and what is not asked for is not there.
    stats.entropy.sum().backward()
    assert token_stats(logits.float(), target, extra=["top1"], backend=None).max_prob is None


def test_the_extra_statistics_of_banned_tokens_and_of_rows_without_a_distribution(implementation):
    logits = torch.tensor([[1.0, -INF, 0.5], [-INF, -INF, -INF], [0.0, NAN, 1.0]], device=implementation.device)
    target = torch.zeros(3, dtype=torch.int64, device=implementation.device)
    stats = token_stats(logits, target, extra=EXTRA, backend=implementation.backend)
    assert stats.mean_logprob[0] == -INF
    assert stats.top1[0] == 1
    p = logits[0].double().softmax(-1).cpu()
    torch.testing.assert_close(stats.collision[0].cpu().double(), p.square().sum(), rtol=1e-6, atol=0)
    for field in stats:
        assert field[1:].isnan().all()


@pytest.mark.parametrize(
    ("extra", "target", "message"),
    [
        (("entropy",), None, "extra has 'entropy', expected any of 'max_prob', 'top1', 'mean_logprob', 'collision'"),
        (("top1",), None, "extra has 'top1', .* and no target is given"),
        ("collision", None, "extra is the string 'collision', expected a sequence of names"),
    ],
)
def test_extra_that_is_none_of_them(extra, target, message):
    for call in (lambda: token_stats(torch.zeros(2, 3), target, extra=extra),
                 lambda: linear_token_stats(torch.zeros(2, 3), torch.zeros(4, 3), target, extra=extra)):  # fmt: skip
        with pytest.raises((ValueError, TypeError), match=message):
            call()


def test_linear_token_entropy_is_the_entropy_without_a_gradient(implementation):
    hidden = torch.randn(2, 3, 8, device=implementation.device, requires_grad=True)
    weight, bias = (torch.randn(*s, device=implementation.device, requires_grad=True) for s in ((50, 8), (50,)))
    mask = torch.tensor([[1, 0, 1], [1, 1, 1]], device=implementation.device)
    entropy = linear_token_entropy(
        hidden, weight, mask, bias=bias, softcap=4.0, temperature=0.5, chunk_size=2, backend=implementation.backend
    )
    assert not entropy.requires_grad
    z = 4 * torch.tanh((hidden.double() @ weight.double().T + bias.double()) / 4)
    expected = reference.row_statistics(z.detach().cpu(), temperature=0.5).entropy
    torch.testing.assert_close(
        entropy.cpu().double(), torch.where(mask.cpu() != 0, expected, 0.0), rtol=1e-5, atol=1e-6
    )


def test_a_mask_by_position(implementation):
    logits = torch.randn(2, 3, device=implementation.device)
    mask = torch.tensor([True, False], device=implementation.device)
    assert token_entropy(logits, mask, backend=implementation.backend)[1] == 0
    with pytest.raises(TypeError, match=r"target has dtype torch.bool, .* a mask is given as mask="):
        token_stats(logits, mask, backend=implementation.backend)


# --------------------------------------------------------------------------------------------------- masks and divisors


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8], ids=str)
def test_an_integer_mask_with_a_negative_entry_is_never_counted(implementation, dtype, monkeypatch):
    labels = torch.tensor([5, -100, 7], dtype=dtype, device=implementation.device)
    logits = torch.randn(3, 9, device=implementation.device)
    hidden, weight = torch.randn(3, 4, device=implementation.device), torch.randn(9, 4, device=implementation.device)
    calls = (
        lambda mask: entropy_loss(logits, mask, backend=implementation.backend),
        lambda mask: token_entropy(logits, mask, backend=implementation.backend),
        lambda mask: token_stats(logits, mask=mask, backend=implementation.backend).lse,
        lambda mask: linear_entropy_loss(hidden, weight, mask, backend=implementation.backend),
    )
    if implementation.device == "cpu":
        for call in calls:
            with pytest.raises(ValueError, match=r"mask has -100, .* the mask is labels != -100"):
                call(labels)
    # Where seeing it would be a synchronisation, the result says so.
    monkeypatch.setattr("em_kernels.arguments.tokens.values_visible", lambda _: False)
    for call in calls:
        result = call(labels)
        assert result.isnan().tolist() == (True if result.dim() == 0 else [False, True, False])
        assert call(labels.clamp(min=0)).isfinite().all()


@pytest.mark.parametrize("items", [torch.tensor([7]), torch.tensor([[7.0]]), np.int64(7)], ids=["1-d", "2-d", "numpy"])
def test_one_number_of_items_in_any_form(implementation, items):
    logits = torch.randn(2, 3, device=implementation.device, requires_grad=True)
    items = items.to(implementation.device) if isinstance(items, torch.Tensor) else items
    hidden = torch.randn(2, 4, device=implementation.device, requires_grad=True)
    weight = torch.randn(3, 4, device=implementation.device)
    for call in (
        lambda n: entropy_loss(logits, num_items_in_batch=n, backend=implementation.backend),
        lambda n: linear_entropy_loss(hidden, weight, num_items_in_batch=n, backend=implementation.backend),
    ):
        assert torch.equal(call(items), call(7))


def test_a_temperature_of_numpy(implementation):
    logits = torch.randn(2, 3, device=implementation.device)
    actual = entropy_loss(logits, temperature=np.float32(0.5), backend=implementation.backend)
    assert torch.equal(actual, entropy_loss(logits, temperature=0.5, backend=implementation.backend))


def test_what_is_per_token_may_have_gaps(implementation):
    logits = torch.randn(4, 9, device=implementation.device)
    gappy = {
        "mask": torch.tensor([True, False, True, False, False, True, True, False], device=logits.device)[::2],
        "temperature": torch.rand(8, device=logits.device)[::2] + 0.5,
    }
    target = torch.arange(8, device=logits.device)[::2]
    close = {name: values.clone() for name, values in gappy.items()}
    actual = token_stats(logits, target, backend=implementation.backend, **gappy)
    expected = token_stats(logits, target.clone(), backend=implementation.backend, **close)
    torch.testing.assert_close(actual[:4], expected[:4], rtol=0, atol=0)


@pytest.mark.parametrize("bad", [-1.0, 0.0, INF])
def test_a_temperature_that_the_host_cannot_see_is_checked_by_the_result(implementation, bad, monkeypatch):
    monkeypatch.setattr("em_kernels.arguments.tokens.values_visible", lambda _: False)
    logits = torch.randn(3, 9, device=implementation.device, requires_grad=True)
    temperature = torch.tensor([1.0, bad, 2.0], device=implementation.device)
    stats = token_stats(logits, temperature=temperature, backend=implementation.backend)
    assert stats.entropy.isnan().tolist() == [False, True, False]
    stats.entropy.sum().backward()
    assert logits.grad.isnan().all(-1).tolist() == [False, True, False]
    assert entropy_loss(logits, temperature=temperature, backend=implementation.backend).isnan()


def test_labels_as_targets_without_a_mask():
    with pytest.raises(ValueError, match=r"target has -100 where it is not masked, .* mask=target != -100"):
        token_stats(torch.randn(2, 9), torch.tensor([3, -100]))


# ------------------------------------------------------------------------------------------------ gradients and modes


def test_inplace_backward_of_logits_that_autograd_needs(implementation):
    x = torch.randn(3, 9, device=implementation.device, requires_grad=True)
    for reduction in ("mean", "none"):
        loss = entropy_loss(torch.tanh(x), reduction=reduction, inplace_backward=True, backend=implementation.backend)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.sum().backward()


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_without_gradients(calls, mode):
    for name, (function, x) in calls.items():
        expected = function(x.clone().requires_grad_())
        with mode():
            value = function(x.clone().requires_grad_())
            torch.testing.assert_close(value, expected.detach(), msg=name)
        assert not value.requires_grad
        with torch.inference_mode():
            inputs = x.clone()
        torch.testing.assert_close(function(inputs), expected.detach(), msg=name)


def test_an_upstream_gradient_of_stride_0(implementation):
    logits = torch.randn(4, 30, device=implementation.device)
    a, b = (logits.clone().requires_grad_() for _ in range(2))
    entropy_loss(a, reduction="none", backend=implementation.backend).sum().backward()
    entropy_loss(b, reduction="sum", backend=implementation.backend).backward()
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_no_tokens_have_gradients_of_zero(implementation, reduction):
    shapes = ((0, 8), (20, 8), (20,))
    hidden, weight, bias = (torch.randn(s, device=implementation.device, requires_grad=True) for s in shapes)
    linear_entropy_loss(hidden, weight, bias=bias, reduction=reduction, backend=implementation.backend).sum().backward()
    assert all((leaf.grad == 0).all() and leaf.grad.shape == leaf.shape for leaf in (hidden, weight, bias))


def test_a_penalty_on_the_gradient_is_an_error(calls):
    for name, (function, x) in calls.items():
        for differentiate in (lambda total, z: total.backward(), torch.autograd.grad):
            leaf = x.clone().requires_grad_()
            loss = function(leaf)
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            with pytest.raises(RuntimeError, match="no derivative of its gradients"):
                differentiate(loss + gradient.square().sum(), leaf)
            assert gradient.shape == leaf.shape, name


def test_dual_tensors_are_an_error(calls):
    for function, x in calls.values():
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x, torch.ones_like(x))
            with pytest.raises(RuntimeError, match="no forward-mode derivative"):
                function(dual)
            function(x)  # Without a tangent nothing is lost.


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
def test_traces_hold_the_operator_and_give_its_value(calls):
    for name, (function, x) in calls.items():
        other = torch.randn_like(x)
        for traced in (torch.jit.trace(function, (x,)), make_fx(function)(x)):
            torch.testing.assert_close(traced(other), function(other), msg=name)
            assert "em_kernels" in str(traced.graph), name


def test_a_dispatch_mode_sees_the_operators(calls):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    for name, (function, x) in calls.items():
        names = []
        leaf = x.clone().requires_grad_()
        with Seen():
            value = function(leaf)
            forward = [n for n in names if n.startswith("em_kernels")]
            value.backward()
        assert len(forward) == 1, name
        expected = x.clone().requires_grad_()
        function(expected).backward()
        torch.testing.assert_close(leaf.grad, expected.grad)


def test_hidden_states_on_the_meta_device():
    hidden, weight = torch.randn(2, 3, 8, device="meta", requires_grad=True), torch.randn(50, 8, device="meta")
    assert linear_entropy_loss(hidden, weight).shape == ()
    linear_entropy_loss(hidden, weight).backward()
    assert hidden.grad.shape == hidden.shape
    assert linear_token_stats(hidden, weight).varentropy.shape == (2, 3)
    assert linear_token_entropy(hidden, weight).shape == (2, 3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("rounded", [False, True], ids=["unrounded", "rounded"])
def test_a_16_bit_bias_is_rounded_once(implementation, dtype, rounded):
    implementation.skip_dtype(dtype) if rounded else implementation.skip_hidden_dtype(dtype)
    hidden, weight = (torch.randn(n, 64, device=implementation.device).to(dtype) for n in (32, 300))
    bias = (torch.randn(300, device=implementation.device) * 4).to(dtype)
    z = hidden.double() @ weight.double().T + bias.double()
    # Once: as the entropy of the exact logits, rounded where that was asked for.
    expected = reference.row_statistics((z.to(dtype) if rounded else z).cpu()).entropy
    actual = linear_token_entropy(
        hidden, weight, bias=bias, logits_dtype=dtype if rounded else None, backend=implementation.backend
    )
    twice = reference.row_statistics(((hidden.double() @ weight.double().T).to(dtype) + bias).cpu()).entropy
    error, error_of_two = ((x.cpu().double() - expected).abs().mean() for x in (actual, twice))
    assert error < 0.1 * error_of_two
