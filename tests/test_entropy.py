"""entropy_loss keeps its contract, in every implementation, against the float64 reference."""

import math

import pytest
import torch
from oracles import assert_entropy, assert_gradient, reference_loss

from em_kernels import EntropyLoss, entropy_loss
from em_kernels.ops import backend

INF, NAN = float("inf"), float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# One, two, less than a vector, a little, a prime above a compiled block of 4096, and more than one Triton tile.
VOCABS = [1, 2, 7, 100, 4099, 9000]


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make_logits(implementation, *shape, dtype=torch.float32, scale=3.0, offset=0.0):
    return (torch.randn(shape) * scale + offset).to(dtype).to(implementation.device)


def check(implementation, logits, mask=None, upstream=1.0, inplace_backward=False, **options):
    """Loss and gradient against the reference; returns both."""
    expected, expected_gradient = reference_loss(logits, mask, upstream, **options)
    before = logits.detach().clone()
    logits = logits.detach().requires_grad_()
    loss = entropy_loss(logits, mask, backend=implementation.backend, inplace_backward=inplace_backward, **options)
    assert loss.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    (loss * upstream).sum().backward()
    if not inplace_backward:
        assert torch.equal(logits.detach().nan_to_num(0.1), before.nan_to_num(0.1)), "the logits were changed"
    assert_entropy(loss, expected)
    # Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds, and an upstream gradient makes it cut twice.
    truncated_twice = implementation.interpreted and logits.dtype == torch.bfloat16
    assert_gradient(logits.grad, expected_gradient, logits.dtype, ulps=2 if truncated_twice else 1)
    return loss.detach(), logits.grad


@pytest.fixture(params=["sums first", "a row ahead"])
def lag(request, monkeypatch, implementation):
    """How far the Triton kernel's sums run ahead of its gradients: all rows, or one."""
    if request.param == "a row ahead":
        if implementation.name != "triton":
            pytest.skip("only the Triton kernel has a lag")
        monkeypatch.setattr(backend.implementation("triton"), "_LAG_BYTES", 1)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_loss_and_gradient(implementation, lag, dtype, vocab, reduction):
    implementation.skip_dtype(dtype)
    logits = make_logits(implementation, 2, 3, vocab, dtype=dtype)
    upstream = torch.randn(2, 3).to(implementation.device) if reduction == "none" else 1.0
    check(implementation, logits, reduction=reduction, temperature=0.7, upstream=upstream)


@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(8, 40_000), (2, 40_000)],
    ids=["a row is many of the largest tiles", "a split is many tiles"],
)
def test_long_rows(implementation, rows, vocab):
    # More than 128 KB of float32: 5 tiles of 8192 where a program has the row, and where programs share it (8 of them
    # a row, of the 8 multiprocessors that the interpreter is said to have) two of 4096 for some and one for others.
    logits = make_logits(implementation, rows, vocab)
    logits[0, 8192:] = -INF
    logits[1, :8192] = -INF
    check(implementation, logits, reduction="mean", temperature=0.7)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1, 3.0, 100.0, "0-d", "per token", "broadcast"])
def test_temperatures(implementation, temperature):
    if isinstance(temperature, str):
        shape = {"0-d": (), "per token": (3, 4), "broadcast": (3, 1)}[temperature]
        temperature = (torch.rand(shape) * 3 + 0.1).to(implementation.device)
    for reduction in ("mean", "none"):
        logits = make_logits(implementation, 3, 4, 300)
        check(implementation, logits, temperature=temperature, reduction=reduction)


@pytest.mark.parametrize("offset", [-1e4, 1e4])
def test_a_constant_added_to_a_row_changes_nothing_but_rounding(implementation, offset):
    check(implementation, make_logits(implementation, 4, 500, offset=offset), temperature=0.5)


@pytest.mark.parametrize("kind", ["bool", "int64", "uint8", "float32", "float64", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 3e38])
def test_masked_tokens_are_not_read(implementation, lag, kind, reduction, garbage):
    keep = torch.tensor([[1, 0, 1], [0, 1, 1]])
    mask = keep * torch.rand(2, 3) * 5 if kind == "weights" else keep.to(getattr(torch, kind))
    mask = mask.to(implementation.device)
    logits = make_logits(implementation, 2, 3, 70)
    logits[mask == 0] = garbage
    loss, gradient = check(implementation, logits, mask, reduction=reduction)
    assert (gradient[mask == 0] == 0).all()
    if reduction == "none":
        assert (loss[mask == 0] == 0).all()


def test_an_integer_mask_counts_any_positive_number_once(implementation):
    logits = make_logits(implementation, 3, 20)
    mask = torch.tensor([7, 0, 1]).to(implementation.device)
    assert torch.equal(
        entropy_loss(logits, mask, backend=implementation.backend),
        entropy_loss(logits, mask != 0, backend=implementation.backend),
    )


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_every_token_masked(implementation, reduction, requires_grad):
    logits = make_logits(implementation, 2, 3, 50).fill_(NAN).requires_grad_(requires_grad)
    mask = torch.zeros(2, 3, dtype=torch.bool, device=implementation.device)
    loss = entropy_loss(logits, mask, reduction=reduction, backend=implementation.backend)
    assert loss.item() == 0
    if requires_grad:
        loss.backward()
        assert (logits.grad == 0).all()


@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("masked", [False, True])
def test_num_items_in_batch_replaces_the_divisor(implementation, as_tensor, masked):
    logits = make_logits(implementation, 2, 3, 50)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=implementation.device) if masked else None
    items = torch.tensor(11, device=implementation.device) if as_tensor else 11
    check(implementation, logits, mask, num_items_in_batch=items)


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("as_tensor", [False, True], ids=["int", "tensor"])
@pytest.mark.parametrize("kind", ["no mask", "some", "nothing"])
def test_a_divisor_of_0_leaves_the_sum(implementation, lag, kind, as_tensor, requires_grad):
    # A micro-batch of a batch without tokens: its count arrives on the device, where it cannot be looked at.
    logits = make_logits(implementation, 2, 3, 50)
    keep = {"no mask": None, "some": torch.tensor([[1, 0, 1], [1, 1, 0]]), "nothing": torch.zeros(2, 3)}[kind]
    mask = None if keep is None else keep.to(implementation.device)
    items = torch.tensor(0, device=implementation.device) if as_tensor else 0
    expected, _ = reference_loss(logits, mask, num_items_in_batch=items)
    leaf = logits.requires_grad_(requires_grad)
    assert_entropy(entropy_loss(leaf, mask, num_items_in_batch=items, backend=implementation.backend), expected)
    if requires_grad:
        check(implementation, logits, mask, num_items_in_batch=items)


def test_micro_batches_add_up_to_the_batch(implementation):
    logits = make_logits(implementation, 6, 80)
    mask = torch.tensor([1, 1, 0, 1, 0, 1], device=implementation.device)
    whole = entropy_loss(logits, mask, backend=implementation.backend)
    parts = sum(
        entropy_loss(logits[i : i + 2], mask[i : i + 2], num_items_in_batch=4, backend=implementation.backend)
        for i in (0, 2, 4)
    )
    torch.testing.assert_close(parts, whole, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("name", "view"),
    [
        ("shifted", lambda z: z[:, :-1]),
        ("transposed", lambda z: z.transpose(0, 1)),
        ("strided rows", lambda z: z[:, ::2]),
        ("strided columns", lambda z: z[..., ::2]),
        ("columns first", lambda z: z[..., :9].permute(2, 1, 0)),
        ("expanded", lambda z: z[:1].expand(3, -1, -1)),
        ("expanded columns", lambda z: z[..., :1].expand(-1, -1, 40)),
        ("one row", lambda z: z[0, 0]),
        ("four dimensions", lambda z: z.unsqueeze(1).expand(-1, 2, -1, -1)),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_strides(implementation, lag, name, view, reduction):
    check(implementation, view(make_logits(implementation, 3, 4, 120)), reduction=reduction)


@pytest.mark.parametrize("shape", [(0, 10), (2, 0, 10), (1, 10), (10,)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_tokens(implementation, shape, reduction):
    logits = make_logits(implementation, *shape).requires_grad_()
    loss = entropy_loss(logits, reduction=reduction, backend=implementation.backend)
    assert loss.shape == (shape[:-1] if reduction == "none" else ())
    loss.sum().backward()
    assert logits.grad.shape == shape
    if 0 in shape:
        assert loss.sum().item() == 0
    else:
        check(implementation, logits, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_banned_tokens_contribute_nothing(implementation, lag, reduction):
    logits = make_logits(implementation, 4, 9000)
    logits[0, :8999] = -INF  # all but the last
    logits[1, ::2] = -INF
    logits[2, :4500] = -INF  # whole blocks
    _, gradient = check(implementation, logits, reduction=reduction)
    assert (gradient[logits == -INF] == 0).all()


@pytest.mark.parametrize("bad", [NAN, INF, "all -inf"])
def test_rows_without_a_distribution_are_nan_and_spare_the_others(implementation, lag, bad):
    logits = make_logits(implementation, 3, 9000)
    if bad == "all -inf":
        logits[1] = -INF
    else:
        logits[1, 8500] = bad
    logits.requires_grad_()
    loss = entropy_loss(logits, reduction="none", backend=implementation.backend)
    assert loss.isnan().tolist() == [False, True, False]
    loss.sum().backward()
    assert logits.grad[1].isnan().all()
    assert not logits.grad[[0, 2]].isnan().any()
    fused = entropy_loss(logits, backend=implementation.backend)
    logits.grad = None
    fused.backward()
    assert fused.isnan()
    assert logits.grad[1].isnan().all()
    assert not logits.grad[[0, 2]].isnan().any()


@pytest.mark.parametrize("scale", [50.0, 1000.0, -INF], ids=str)
def test_one_hot_rows(implementation, scale):
    logits = torch.full((2, 4099), -scale if scale != -INF else scale, device=implementation.device)
    logits[0, 5] = logits[1, 4098] = 0.0
    loss, gradient = check(implementation, logits, reduction="none")
    assert (loss >= 0).all()
    if scale != 50.0:
        assert (loss == 0).all()
        assert (gradient == 0).all()


def test_almost_one_hot_rows_keep_the_relative_accuracy_of_their_gradient(implementation, lag):
    # log s is 2e-9 there, which float32 cannot tell from 0; the gradient is of the order of the entropy, 4e-8.
    logits = torch.full((2, 50), -24.0, device=implementation.device)
    logits[:, 7] = 0.0
    check(implementation, logits)
    check(implementation, logits, reduction="none")


@pytest.mark.parametrize("vocab", [1, 7, 9000])
def test_uniform_rows(implementation, vocab):
    loss, gradient = check(implementation, torch.full((2, vocab), 3.0, device=implementation.device), reduction="none")
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(vocab)), rtol=2e-6, atol=3e-7)
    assert gradient.abs().max() < 1e-6


def test_gradient_rows_sum_to_0(implementation):
    _, gradient = check(implementation, make_logits(implementation, 5, 9000), reduction="sum")
    assert (gradient.double().sum(-1).abs() < 1e-6 * gradient.double().abs().sum(-1)).all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_two_runs_agree_bit_for_bit(implementation, lag, reduction):
    logits = make_logits(implementation, 5, 9000)
    first, second = (check(implementation, logits, reduction=reduction) for _ in range(2))
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("upstream", [0.0, -3.0, 65536.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_upstream_gradient_of_the_mean(implementation, lag, dtype, upstream):
    implementation.skip_dtype(dtype)
    check(implementation, make_logits(implementation, 2, 3, 500, dtype=dtype), upstream=upstream)


def test_float16_mean_does_not_underflow_before_the_loss_scale(implementation):
    implementation.skip_dtype(torch.float16)
    # Entries of 1e-8, which float16 cannot hold, until a gradient scaler has multiplied them.
    logits = torch.full((4, 100), -24.0, dtype=torch.float16, device=implementation.device)
    logits[:, 3] = 0.0
    _, gradient = check(implementation, logits, upstream=65536.0)
    assert (gradient != 0).all()


@pytest.mark.parametrize("upstream", ["expanded", "strided", "random"])
def test_per_token_upstream_gradients(implementation, upstream):
    logits = make_logits(implementation, 4, 6, 100)
    values = {
        "expanded": torch.ones(()).expand(4, 6),
        "strided": torch.randn(4, 12)[:, ::2],
        "random": torch.randn(4, 6),
    }[upstream]
    check(implementation, logits, upstream=values.to(implementation.device), reduction="none")


@pytest.mark.parametrize("per_row", [False, True], ids=["one temperature", "a temperature a row"])
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize(("temperature", "top"), [(0.3, 0.0), (1.0, -30.3), (7.0, 1000.1)])
def test_two_tokens_have_the_gradient_of_the_logistic_function(
    implementation, lag, temperature, top, reduction, per_row
):
    # From a toss-up to where the second token is e^-80: it is p q x / tau, in which nothing cancels, and whose relative
    # error is the absolute one of x; above 64 that of the rounded difference of the logits alone is up to 4e-6.
    x = torch.cat((torch.linspace(0.01, 64.0, 16), torch.linspace(65.0, 80.0, 16)))
    logits = torch.full((32, 2), top)
    logits[:, 1] -= x * temperature
    if per_row:
        temperature = torch.full((32,), temperature)
    x = (logits[:, 0].double() - logits[:, 1].double()) / temperature
    expected = x.sigmoid() * (-x).sigmoid() * x / temperature
    leaf = logits.to(implementation.device).requires_grad_()
    options = {"temperature": temperature.to(leaf.device) if per_row else temperature, "reduction": reduction}
    entropy_loss(leaf, backend=implementation.backend, **options).sum().backward()
    torch.testing.assert_close(
        leaf.grad.cpu().double(), torch.stack((-expected, expected), dim=-1), rtol=2e-6, atol=1e-36
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("view", ["whole", "shifted"])
def test_inplace_backward_writes_into_the_logits(implementation, lag, reduction, view):
    whole = make_logits(implementation, 2, 5, 300)
    logits = whole[:, :-1] if view == "shifted" else whole
    rest = whole[:, -1:].clone()
    _, gradient = check(implementation, logits, reduction=reduction, inplace_backward=True)
    assert torch.equal(gradient, logits)
    if view == "shifted":
        assert torch.equal(whole[:, -1:], rest), "wrote outside the logits it was given"
    else:
        assert gradient.data_ptr() == logits.data_ptr(), "the gradient was copied on its way"


def test_inplace_backward_leaves_the_logits_without_a_gradient_alone(implementation):
    logits = make_logits(implementation, 3, 50)
    before = logits.clone()
    entropy_loss(logits, inplace_backward=True, backend=implementation.backend)
    with torch.no_grad():
        entropy_loss(logits.requires_grad_(), inplace_backward=True, backend=implementation.backend)
    assert torch.equal(logits, before)


def test_inplace_backward_is_noticed_by_whoever_saved_the_logits(implementation):
    hidden = make_logits(implementation, 3, 50).requires_grad_()
    logits = hidden.tanh()  # whose backward needs its result
    loss = entropy_loss(logits, inplace_backward=True, backend=implementation.backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("shape", [(3, 50), (3, 4, 50)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_inplace_backward_refuses_logits_whose_tokens_share_memory(implementation, shape, reduction):
    # The gradient of one token would be read as the logits of the next.
    logits = make_logits(implementation, 1, *shape[1:]).expand(shape).requires_grad_()
    with pytest.raises(ValueError, match="inplace_backward needs logits whose elements have memory of their own"):
        entropy_loss(logits, reduction=reduction, inplace_backward=True, backend=implementation.backend)


def test_inplace_backward_refuses_rows_that_overlap(implementation):
    logits = make_logits(implementation, 29).as_strided((10, 20), (1, 1)).requires_grad_()
    with pytest.raises(ValueError, match="memory of their own"):
        entropy_loss(logits, inplace_backward=True, backend=implementation.backend)


def test_inplace_backward_refuses_logits_it_would_have_to_copy(implementation):
    logits = make_logits(implementation, 50, 4).T.requires_grad_()
    with pytest.raises(ValueError, match="inplace_backward needs logits"):
        entropy_loss(logits, inplace_backward=True, backend=implementation.backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_retained_graph_gives_the_same_gradient_again(implementation, reduction):
    logits = make_logits(implementation, 3, 50).requires_grad_()
    loss = entropy_loss(logits, reduction=reduction, backend=implementation.backend).sum() * 3
    first, second, third = (torch.autograd.grad(loss, logits, retain_graph=True)[0] for _ in range(3))
    assert torch.equal(first, second)
    assert torch.equal(first, third)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_higher_order_gradients_are_an_error(implementation, reduction):
    logits = make_logits(implementation, 3, 50).requires_grad_()
    loss = (entropy_loss(logits, reduction=reduction, backend=implementation.backend) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its gradients"):
        gradient.sum().backward()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_higher_order_gradients_are_an_error_of_a_tensor_subclass_too(implementation, reduction):
    class Subclass(torch.Tensor):
        """Goes through the registered operator rather than straight to the implementation."""

    logits = make_logits(implementation, 3, 50).as_subclass(Subclass).requires_grad_()
    loss = (entropy_loss(logits, reduction=reduction, backend=implementation.backend) ** 2).sum()
    (gradient,) = torch.autograd.grad(loss, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its gradients"):
        gradient.sum().backward()


def test_no_gradient_is_computed_where_none_is_asked_for(implementation, monkeypatch):
    def refuse(*_):
        raise AssertionError("a gradient was computed")

    module = backend.implementation(implementation.backend)
    of_backend = module.entropy_with_gradient

    def without_gradient(logits, token_weight, divisor, temperature, out):
        assert out is None, "a gradient was computed"
        return of_backend(logits, token_weight, divisor, temperature, out)

    monkeypatch.setattr(module, "entropy_with_gradient", without_gradient)
    monkeypatch.setattr(module, "row_gradient", refuse)
    logits = make_logits(implementation, 3, 50)
    assert not entropy_loss(logits, backend=implementation.backend).requires_grad
    with torch.no_grad():
        entropy_loss(logits.requires_grad_(), backend=implementation.backend)


def test_the_value_does_not_depend_on_whether_a_gradient_is_wanted(implementation):
    logits = make_logits(implementation, 3, 50)
    mask = torch.tensor([0.5, 0.0, 2.0], device=implementation.device)
    without = entropy_loss(logits, mask, backend=implementation.backend)
    torch.testing.assert_close(
        entropy_loss(logits.requires_grad_(), mask, backend=implementation.backend).detach(), without
    )


def test_module_and_function_agree(implementation):
    logits = make_logits(implementation, 2, 3, 50)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=implementation.device)
    module = EntropyLoss(temperature=0.5, backend=implementation.backend)
    expected = entropy_loss(logits, mask, temperature=0.5, num_items_in_batch=9, backend=implementation.backend)
    assert torch.equal(module(logits, mask, num_items_in_batch=9), expected)
    assert "temperature=0.5" in repr(module)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_transforms_are_refused(implementation, reduction):
    logits = make_logits(implementation, 2, 3, 20).requires_grad_()

    def loss(z):
        return entropy_loss(z, reduction=reduction, backend=implementation.backend).sum()

    for transform in (torch.vmap, torch.func.grad):
        with pytest.raises(RuntimeError, match=r"does not run under torch\.func's transforms"):
            transform(loss)(logits.detach())
    upstream = torch.ones(4, device=implementation.device)
    with pytest.raises(RuntimeError, match="is_grads_batched"):
        torch.autograd.grad(loss(logits), logits, upstream, is_grads_batched=True)


@pytest.mark.parametrize("shape", [(3, 100), (2, 3, 257)])
def test_gradcheck(shape):
    logits = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(shape[:-1]) < 0.7
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda z, reduction=reduction: entropy_loss(z, mask, temperature=0.7, reduction=reduction), logits
        )


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("temperature", [1e-30, 1e-22, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_gradients_are_finite_at_the_ends_of_the_range_of_temperatures(implementation, dtype, temperature, reduction):
    implementation.skip_dtype(dtype)
    logits = make_logits(implementation, 2, 3, 300, dtype=dtype).requires_grad_()
    loss = entropy_loss(logits, temperature=temperature, reduction=reduction, backend=implementation.backend)
    (gradient,) = torch.autograd.grad(loss.sum(), logits)
    assert gradient.isfinite().all()
