"""linear_entropy_loss keeps its contract, in every implementation, against the float64 reference."""

import itertools
import subprocess
import sys

import pytest
import torch
from oracles import assert_entropy, reference_loss

from em_kernels import LinearEntropyLoss, entropy_loss, linear_entropy_loss
from em_kernels.arguments import projection
from em_kernels.ops import types
from em_kernels.ops.hidden import matmul

NAN = float("nan")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# Half of a unit in the last place, relative.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def make(implementation, *shape, vocab=70, dim=24, dtype=torch.float32, bias=False):
    """Hidden states, weight and bias whose logits are exact in every dtype: halves of at most 7 bits."""
    hidden = torch.randint(-2, 3, (*shape, dim))
    weight = torch.randint(-2, 3, (vocab, dim)) / 2
    offset = torch.randint(-4, 5, (vocab,)) / 2 if bias else None
    return [None if x is None else x.to(dtype).to(implementation.device) for x in (hidden, weight, offset)]


def logits_of(hidden, weight, bias=None, softcap=None):
    z = hidden.detach().cpu().double() @ weight.detach().cpu().double().T
    z = z if bias is None else z + bias.detach().cpu().double()
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def check(implementation, hidden, weight, mask=None, *, bias=None, softcap=None, upstream=1.0, **options):
    """The loss and all gradients against the reference; returns them."""
    z = logits_of(hidden, weight, bias, softcap)
    own = {key: options.pop(key) for key in ("chunk_size", "grad_tolerance", "logits_dtype") if key in options}
    expected, g = reference_loss(z, mask, upstream, **options)
    if softcap is not None:
        g = g * (1 - (z / softcap) ** 2)
    leaves = [None if x is None else x.detach().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_entropy_loss(
        leaves[0], leaves[1], mask, bias=leaves[2], softcap=softcap, backend=implementation.backend, **own, **options
    )
    assert loss.dtype == (torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    if softcap is None:
        assert_entropy(loss, expected)
    else:
        torch.testing.assert_close(loss.detach().cpu().double(), expected, rtol=1e-5, atol=1e-5)
    (loss * upstream).sum().backward()

    # The logits' gradient is rounded to their dtype, its products are sums of many terms, and the result is rounded.
    dim, vocab = hidden.shape[-1], weight.shape[0]
    rounding = ROUNDING[hidden.dtype]
    share = max(2 * rounding, 2e-6) if hidden.dtype != torch.float64 else 1e-12
    share = share if softcap is None else 2e-5
    g, h, w = g.reshape(-1, vocab), hidden.detach().cpu().double().reshape(-1, dim), weight.detach().cpu().double()
    # What is not read may hold anything.
    h = torch.where((g != 0).any(-1, keepdim=True), h, 0.0)
    exact = (g @ w, g.T @ h, g.sum(0))
    largest = g.abs().amax(-1, keepdim=True).expand_as(g)
    sizes = (largest @ w.abs(), largest.T @ h.abs(), largest.sum(0))
    for leaf, value, size in zip(leaves, exact, sizes, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == hidden.dtype
            error = (leaf.grad.cpu().double().reshape(value.shape) - value).abs()
            allowed = share * size + 2 * rounding * value.abs() + 1e-30
            if hidden.dtype == torch.float16:
                allowed = allowed + 2**-24  # half of the smallest number it has, for each of two roundings
            assert (error <= allowed).all(), (
                f"{tuple(value.shape)}: {(error / allowed).max():.2f} times what is allowed"
            )
    return loss.detach(), *(None if leaf is None else leaf.grad for leaf in leaves)


@pytest.mark.parametrize("chunk_size", [3, None], ids=["chunks of 3", "one chunk"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_loss_and_gradients(implementation, dtype, reduction, bias, chunk_size):
    implementation.skip_hidden_dtype(dtype)
    hidden, weight, offset = make(implementation, 2, 4, dtype=dtype, bias=bias)
    upstream = torch.rand(2, 4).to(implementation.device) if reduction == "none" else 1.0
    check(
        implementation,
        hidden,
        weight,
        bias=offset,
        upstream=upstream,
        reduction=reduction,
        temperature=2.0,
        chunk_size=chunk_size,
    )


@pytest.mark.parametrize("vocab", [1, 2, 4099, 9000])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_vocabularies(implementation, vocab, reduction):
    hidden, weight, _ = make(implementation, 5, vocab=vocab)
    check(implementation, hidden, weight, reduction=reduction, chunk_size=2)


@pytest.mark.parametrize("temperature", [0.5, 3, "0-d", "per token", "broadcast"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_temperatures(implementation, temperature, reduction):
    if isinstance(temperature, str):
        shape = {"0-d": (), "per token": (3, 4), "broadcast": (3, 1)}[temperature]
        temperature = (torch.rand(shape) * 3 + 0.5).to(implementation.device)
    hidden, weight, _ = make(implementation, 3, 4)
    check(implementation, hidden, weight, temperature=temperature, reduction=reduction, chunk_size=5)


@pytest.mark.parametrize("kind", ["bool", "int64", "float32", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("garbage", [NAN, float("inf"), 3e38])
def test_masked_tokens_are_not_read(implementation, kind, reduction, garbage):
    keep = torch.tensor([[1, 0, 1], [0, 1, 1]])
    mask = keep * torch.rand(2, 3) * 5 if kind == "weights" else keep.to(getattr(torch, kind))
    mask = mask.to(implementation.device)
    hidden, weight, bias = make(implementation, 2, 3, bias=True)
    hidden[mask == 0] = garbage
    clean = torch.where((mask == 0).unsqueeze(-1), 0.0, hidden)
    expected = check(implementation, clean, weight, mask, bias=bias, reduction=reduction, chunk_size=2)
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_entropy_loss(
        *leaves[:2], mask, bias=leaves[2], reduction=reduction, chunk_size=2, backend=implementation.backend
    )
    loss.sum().backward()
    assert torch.equal(loss, expected[0])
    assert all(torch.equal(leaf.grad, gradient) for leaf, gradient in zip(leaves, expected[1:], strict=True))
    assert (leaves[0].grad[mask == 0] == 0).all()


def test_masked_tokens_are_left_out_of_the_matmuls_on_the_cpu(monkeypatch):
    sizes = []
    project = matmul.project

    def spy(h, weight, bias, out):
        sizes.append(len(h))
        project(h, weight, bias, out)

    monkeypatch.setattr(matmul, "project", spy)
    hidden, weight = torch.randn(100, 8), torch.randn(30, 8)
    mask = torch.arange(100) < 10
    linear_entropy_loss(hidden.requires_grad_(), weight, mask, chunk_size=4).backward()
    assert sizes == [4, 4, 2]


# ---------------------------------------------------------------------------------------------------------- token_count


@pytest.mark.parametrize("kind", ["bool", "int64", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_token_count_leaves_masked_tokens_out_of_the_matmuls(implementation, monkeypatch, kind, reduction):
    sizes = []
    for name, operand in (("project", 0), ("product", 0), ("transposed_product", 1)):
        original = getattr(matmul, name)
        monkeypatch.setattr(
            matmul,
            name,
            lambda *a, of=operand, original=original, **k: (sizes.append(len(a[of])), original(*a, **k))[1],
        )
    keep = torch.tensor([[1, 0, 1, 0], [0, 1, 1, 1]])
    mask = keep * (torch.rand(2, 4) * 5 + 0.1) if kind == "weights" else keep.to(getattr(torch, kind))
    mask = mask.to(implementation.device)
    hidden, weight, bias = make(implementation, 2, 4, bias=True)
    temperature = torch.rand(2, 4).to(implementation.device) + 0.5
    hidden[mask == 0], temperature[mask == 0] = NAN, 77.0
    clean = torch.where((mask == 0).unsqueeze(-1), 0.0, hidden)
    options = {"bias": bias, "reduction": reduction, "temperature": temperature, "chunk_size": 2}
    expected = check(implementation, clean, weight, mask, **options)
    sizes.clear()
    leaves = [x.detach().requires_grad_() for x in (hidden, weight, bias)]
    loss = linear_entropy_loss(
        *leaves[:2], mask, token_count=5, backend=implementation.backend, **options | {"bias": leaves[2]}
    )
    loss.sum().backward()
    # Three products of each token, and its logits once more with "none".
    assert sum(sizes) == 5 * (3 + (reduction == "none"))
    for actual, value in zip((loss, *(leaf.grad for leaf in leaves)), expected, strict=True):
        torch.testing.assert_close(actual, value, rtol=1e-5, atol=1e-6)
    assert (leaves[0].grad[mask == 0] == 0).all()


def test_token_count_without_a_mask_is_the_number_of_tokens(implementation):
    hidden, weight, _ = make(implementation, 2, 3)
    counted, plain = (
        linear_entropy_loss(hidden, weight, token_count=count, backend=implementation.backend) for count in (6, None)
    )
    assert torch.equal(counted, plain)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("count", [0, 3, 5])
def test_a_wrong_token_count_that_cannot_be_seen_makes_nan(monkeypatch, count, reduction):
    monkeypatch.setattr(types, "host_sees", lambda _: False)
    monkeypatch.setattr(projection, "values_visible", lambda _: False)
    hidden, weight = torch.randn(6, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    mask = torch.tensor([1, 0, 1, 1, 0, 1])
    loss = linear_entropy_loss(hidden, weight, mask, token_count=count, reduction=reduction)
    assert loss.isnan().all()
    if count > 0:
        loss.sum().backward()
        assert hidden.grad.isnan().any()
        assert weight.grad.isnan().all()


@pytest.mark.parametrize("shape", [(0,), (2, 0), (1,), ()], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_few_tokens(implementation, shape, reduction):
    hidden, weight, _ = make(implementation, *shape)
    loss, *gradients = check(implementation, hidden, weight, reduction=reduction)
    mask = torch.zeros(shape, device=implementation.device)
    masked = linear_entropy_loss(
        hidden, weight, mask, token_count=0, reduction=reduction, backend=implementation.backend
    )
    assert (masked == 0).all()
    assert loss.shape == (shape if reduction == "none" else ())
    if 0 in shape:
        assert loss.sum().item() == 0
        assert (gradients[1] == 0).all()


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("requires_grad", [False, True])
def test_every_token_masked(implementation, reduction, requires_grad):
    hidden, weight, _ = make(implementation, 2, 3)
    hidden.fill_(NAN).requires_grad_(requires_grad)
    weight.requires_grad_(requires_grad)
    mask = torch.zeros(2, 3, device=implementation.device)
    loss = linear_entropy_loss(hidden, weight, mask, reduction=reduction, backend=implementation.backend)
    assert loss.item() == 0
    if requires_grad:
        loss.backward()
        assert (hidden.grad == 0).all()
        assert (weight.grad == 0).all()


@pytest.mark.parametrize("items", [11, 0, "tensor"])
def test_num_items_in_batch_replaces_the_divisor(implementation, items):
    hidden, weight, _ = make(implementation, 2, 3)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=implementation.device)
    items = torch.tensor(7, device=implementation.device) if items == "tensor" else items
    check(implementation, hidden, weight, mask, num_items_in_batch=items)


@pytest.mark.parametrize(
    "view",
    [lambda h: h[:, :-1], lambda h: h.transpose(0, 1), lambda h: h[..., ::2], lambda h: h[:1].expand(3, -1, -1)],
    ids=["shifted", "transposed", "strided columns", "expanded"],
)
def test_strides(implementation, view):
    hidden, weight, _ = make(implementation, 3, 4)
    hidden = view(hidden)
    check(implementation, hidden, weight.T.contiguous().T[:, : hidden.shape[-1]], chunk_size=4)


@pytest.mark.parametrize("needed", [n for n in itertools.product((False, True), repeat=3) if any(n)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_the_gradients_asked_for_are_computed(implementation, monkeypatch, needed, reduction):
    products = []
    for name in ("product", "transposed_product"):
        original = getattr(matmul, name)
        monkeypatch.setattr(
            matmul, name, lambda *a, name=name, original=original, **k: (products.append(name), original(*a, **k))[1]
        )
    leaves = make(implementation, 4, bias=True)
    whole = check(implementation, *leaves[:2], bias=leaves[2], reduction=reduction)[1:]
    products.clear()
    for leaf, wanted in zip(leaves, needed, strict=True):
        leaf.requires_grad_(wanted)
    loss = linear_entropy_loss(*leaves[:2], bias=leaves[2], reduction=reduction, backend=implementation.backend)
    loss.sum().backward()
    for leaf, wanted, expected in zip(leaves, needed, whole, strict=True):
        assert (leaf.grad is not None) == wanted
        assert not wanted or torch.equal(leaf.grad, expected)
    assert products == ["product"] * needed[0] + ["transposed_product"] * needed[1]


def test_without_gradients_there_is_one_matmul_a_chunk(implementation, monkeypatch):
    matmuls = []
    for name in ("project", "product", "transposed_product"):
        original = getattr(matmul, name)
        monkeypatch.setattr(
            matmul, name, lambda *a, name=name, original=original, **k: (matmuls.append(name), original(*a, **k))[1]
        )
    hidden, weight, _ = make(implementation, 4)
    expected, _ = reference_loss(logits_of(hidden, weight))
    assert_entropy(linear_entropy_loss(hidden, weight, chunk_size=2, backend=implementation.backend), expected)
    assert matmuls == ["project"] * 2
    with torch.no_grad():
        loss = linear_entropy_loss(hidden.requires_grad_(), weight, backend=implementation.backend)
    assert not loss.requires_grad
    assert matmuls == ["project"] * 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("softcap", [3.0, 30])
def test_softcap(implementation, softcap, reduction):
    hidden, weight, bias = make(implementation, 5, bias=True)
    check(implementation, hidden, weight, bias=bias, softcap=softcap, reduction=reduction, chunk_size=2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
def test_softcap_in_16_bits_is_about_as_good_as_eager(implementation, dtype):
    implementation.skip_dtype(dtype)
    hidden = torch.randn(40, 32).to(dtype).to(implementation.device)
    weight = torch.randn(300, 32).to(dtype).to(implementation.device)
    z = logits_of(hidden, weight, softcap=5.0)
    _, g = reference_loss(z)
    exact = (g * (1 - (z / 5.0) ** 2)).T @ hidden.cpu().double()

    def error(loss_of):
        leaf = weight.detach().requires_grad_()
        (loss_of(leaf) * 64).backward()
        return (leaf.grad.cpu().double() / 64 - exact).norm() / exact.norm()

    def loss(w, logits_dtype=None):
        return linear_entropy_loss(hidden, w, softcap=5.0, logits_dtype=logits_dtype, backend=implementation.backend)

    eager = error(lambda w: entropy_loss(5.0 * torch.tanh(hidden @ w.T / 5.0), backend="torch"))
    assert error(lambda w: loss(w, dtype)) < 1.3 * eager
    assert error(loss) < 0.8 * eager


@pytest.mark.parametrize("size", [1e-7, 1e-3, 1e6])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=names)
def test_weights_of_any_size_keep_the_accuracy_of_16_bits(implementation, dtype, size):
    implementation.skip_hidden_dtype(dtype)
    hidden, weight, _ = make(implementation, 6, dtype=dtype)
    mask = torch.tensor([1.0, 0.5, 0.0, 0.25, 1.0, 0.75], device=implementation.device)
    whole = check(implementation, hidden, weight, mask, upstream=64.0)
    scaled = check(implementation, hidden, weight, mask * size, upstream=64.0)
    for a, b in zip(whole[1:3], scaled[1:3], strict=True):
        assert (a - b).abs().max() <= 2**-7 * a.abs().max()


@pytest.mark.parametrize("upstream", [0.0, -3.0, 65536.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=names)
def test_upstream_gradient_of_the_mean(implementation, dtype, upstream):
    implementation.skip_hidden_dtype(dtype)
    hidden, weight, _ = make(implementation, 6, dtype=dtype)
    check(implementation, hidden / 8, weight, upstream=min(upstream, 1024.0), chunk_size=4)


def test_float16_mean_does_not_underflow_before_the_loss_scale(implementation):
    implementation.skip_hidden_dtype(torch.float16)
    # A gradient of 1e-8, which float16 cannot hold, until a gradient scaler has multiplied it.
    hidden, weight, _ = make(implementation, 6, dtype=torch.float16)
    weight.requires_grad_()
    hidden.requires_grad_()
    loss = linear_entropy_loss(hidden, weight, num_items_in_batch=10**7, backend=implementation.backend)
    (loss * 65536).backward()
    assert (hidden.grad != 0).any(-1).all()
    assert (weight.grad != 0).any()


@pytest.mark.parametrize("size", [0.02, 1.0], ids=["nearly uniform", "peaked"])
@pytest.mark.parametrize("temperature", [0.1, 1.0, "per token"])
def test_float16_holds_the_gradient_of_a_large_vocabulary(size, temperature):
    # About 1e-6 in a row that is nearly uniform over 100,000 tokens, which float16 rounds to a sixtieth of itself.
    hidden, weight = torch.randn(8, 16).half(), (torch.randn(100_000, 16) * size).half()
    temperature = torch.linspace(0.3, 2, 8) if temperature == "per token" else temperature
    results = []
    for x, w, scale in ((hidden, weight, 65536.0), (hidden.double(), weight.double(), 1.0)):
        leaf = w.detach().requires_grad_()
        (linear_entropy_loss(x, leaf, temperature=temperature) * scale).backward()
        results.append(leaf.grad.double() / scale)
    assert (results[0] - results[1]).norm() < 2e-3 * results[1].norm()


def test_a_second_backward_gives_the_same_gradient(implementation):
    hidden, weight, _ = make(implementation, 4)
    leaves = [x.requires_grad_() for x in (hidden, weight)]
    loss = linear_entropy_loss(hidden, weight, backend=implementation.backend)
    first = torch.autograd.grad(loss * 3, leaves, retain_graph=True)
    second = torch.autograd.grad(loss * 3, leaves)
    assert all(map(torch.equal, first, second))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_higher_order_gradients_raise(implementation, reduction):
    hidden, weight, _ = make(implementation, 4)
    loss = linear_entropy_loss(hidden.requires_grad_(), weight, reduction=reduction, backend=implementation.backend)
    (gradient,) = torch.autograd.grad((loss**2).sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="no derivative of its gradients"):
        gradient.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_two_runs_agree_bit_for_bit(implementation, dtype):
    implementation.skip_hidden_dtype(dtype)
    arguments = make(implementation, 9, vocab=3000, dtype=dtype)[:2]
    first, second = (check(implementation, *arguments, chunk_size=4, grad_tolerance=0.0) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True) if a is not None)
    compacted = peaked(implementation, 40, 600, sharpness=1.0)
    first, second = (
        gradients(implementation, *(x.to(dtype) for x in compacted), grad_tolerance=1e-3) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))


def test_weight_gradient_is_summed_in_float32_over_many_chunks():
    # 64 chunks whose contributions are alike: a bfloat16 sum stops growing once they are below half of its last place.
    hidden = torch.randn(1, 32).expand(64 * 4, 32) + 0.01 * torch.randn(256, 32)
    hidden, weight = hidden.bfloat16(), (torch.randn(200, 32) / 4).bfloat16()
    z = logits_of(hidden, weight)
    _, g = reference_loss(z, reduction="sum")
    exact = g.T @ hidden.double()
    leaf = weight.requires_grad_()
    linear_entropy_loss(hidden, leaf, reduction="sum", chunk_size=4, logits_dtype=torch.float32).backward()
    in_bfloat16 = torch.zeros_like(weight)
    for rows in torch.arange(256).split(4):
        in_bfloat16 += g[rows].bfloat16().T @ hidden[rows]
    ours, theirs = ((x.double() - exact).norm() / exact.norm() for x in (leaf.grad, in_bfloat16))
    assert ours < 3e-3  # one rounding to bfloat16, and that of the logits' gradient
    assert theirs > 5 * ours


def test_logits_of_bfloat16_operands_are_not_rounded_unless_asked_for(implementation):
    implementation.skip_dtype(torch.bfloat16)
    hidden = (torch.randn(16, 64) * 2).bfloat16().to(implementation.device)
    weight = torch.randn(500, 64).bfloat16().to(implementation.device)
    expected, g = reference_loss(logits_of(hidden, weight), reduction="none")
    exact = g @ weight.cpu().double()
    errors = {}
    for dtype in (None, torch.bfloat16):
        leaf = hidden.detach().requires_grad_()
        loss = linear_entropy_loss(
            leaf, weight, reduction="none", logits_dtype=dtype, chunk_size=5, backend=implementation.backend
        )
        loss.sum().backward()
        gradient_error = (leaf.grad.cpu().double() - exact).norm() / exact.norm()
        errors[dtype] = (loss.detach().cpu().double() - expected).abs().max(), gradient_error
    assert errors[None][0] < 2e-5
    assert errors[torch.bfloat16][0] > 100 * errors[None][0]
    assert errors[None][1] < errors[torch.bfloat16][1] / 3


@pytest.mark.parametrize("mask", [False, True])
def test_chunk_size_changes_nothing_but_rounding(implementation, mask):
    hidden, weight, _ = make(implementation, 13)
    mask = torch.rand(13).to(implementation.device) if mask else None
    for chunk_size in (1, 5, 13, 100):
        check(implementation, hidden, weight, mask, chunk_size=chunk_size)


# ------------------------------------------------------------------------------------------------------- grad_tolerance


def peaked(implementation, rows, vocab, *, sharpness):
    """Hidden states each of which lies along a few rows of the weight, so that most of the vocabulary is unlikely."""
    device = getattr(implementation, "device", implementation)
    weight = torch.randn(vocab, 32)
    likely = torch.randint(0, 20, (rows, 3))
    hidden = sharpness * (weight[likely] * torch.rand(rows, 3, 1)).sum(1)
    return hidden.to(device), weight.to(device)


def gradients(implementation, hidden, weight, upstream=1.0, **options):
    leaves = [x.detach().requires_grad_() for x in (hidden, weight)]
    loss = linear_entropy_loss(*leaves, backend=implementation and implementation.backend, **options)
    (loss.sum() * upstream).backward()
    return loss.detach(), *(leaf.grad for leaf in leaves)


@pytest.mark.parametrize("tolerance", [1e-8, 1e-6, 1e-3, 1.0])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("sharpness", [0.1, 0.6, 3.0], ids=["flat", "peaked", "one-hot"])
@pytest.mark.parametrize("weighted", [False, True])
def test_what_is_left_out_is_within_the_bound(weighted, sharpness, reduction, tolerance):
    # In float64, where nothing else can be made out.
    hidden, weight = (x.double() for x in peaked("cpu", 40, 600, sharpness=sharpness))
    mask = torch.rand(40, dtype=torch.float64) * 3 if weighted else None
    options = {"mask": mask, "reduction": reduction, "chunk_size": 16, "upstream": -7.0, "softcap": 20.0}
    exact, left_out = (gradients(None, hidden, weight, grad_tolerance=t, **options) for t in (0.0, tolerance))
    assert torch.equal(exact[0], left_out[0])
    divisor = 1 if reduction != "mean" else 40 if mask is None else mask.sum()
    for a, b, bound in zip(exact[1:], left_out[1:], (weight.abs().sum(0), hidden.abs().sum(0)), strict=True):
        assert ((a - b).abs() <= 7 * tolerance / divisor * bound + 1e-12).all()


def test_the_tolerance_of_none_takes_no_account_of_masked_tokens(implementation):
    hidden, weight = peaked(implementation, 64, 600, sharpness=0.6)
    mask = torch.arange(64, device=implementation.device) < 32
    upstream = torch.where(mask, 1.0, 1e6)
    leaf = hidden.requires_grad_()
    options = {"reduction": "none", "grad_tolerance": 1e-2, "backend": implementation.backend}
    (linear_entropy_loss(leaf, weight, mask, **options) * upstream).sum().backward()
    alone = gradients(implementation, hidden[:32], weight, reduction="none", grad_tolerance=1e-2)
    torch.testing.assert_close(leaf.grad[:32], alone[1], rtol=1e-4, atol=1e-5 * float(alone[1].abs().max()))


def test_the_tolerance_of_none_is_that_of_the_mean(implementation):
    hidden, weight = peaked(implementation.device, 64, 600, sharpness=0.6)
    mean = gradients(implementation, hidden, weight, grad_tolerance=1e-2)
    none = gradients(implementation, hidden, weight, reduction="none", grad_tolerance=1e-2, upstream=1 / 64)
    for a, b in zip(mean[1:], none[1:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))


def test_entries_right_at_the_tolerance_are_the_worst_case(implementation):
    # Every row has two tokens to choose from, whose entries are as large as each other; the columns differ by row.
    weight = torch.eye(64, device=implementation.device) * 10
    hidden = torch.zeros(32, 64, device=implementation.device)
    rows = torch.arange(32)
    hidden[rows, 2 * rows], hidden[rows, 2 * rows + 1] = 1.0, 0.9
    exact = gradients(implementation, hidden, weight, reduction="sum")
    largest = exact[1].abs().max().item() / 10
    none = gradients(implementation, hidden, weight, reduction="sum", grad_tolerance=1.001 * largest)
    assert (none[1] == 0).all()
    assert (none[2] == 0).all()
    every = gradients(implementation, hidden, weight, reduction="sum", grad_tolerance=0.999 * largest)
    assert (every[1] != 0).any(-1).all()
    torch.testing.assert_close(every[1][rows, 2 * rows], exact[1][rows, 2 * rows], rtol=1e-5, atol=0)


def test_nothing_left_out_is_the_dense_path_to_the_last_bit(implementation):
    hidden, weight = peaked(implementation, 40, 600, sharpness=0.1)
    exact = gradients(implementation, hidden, weight, chunk_size=16)
    same = gradients(implementation, hidden, weight, chunk_size=16, grad_tolerance=1e-30)
    assert all(map(torch.equal, exact, same))


def test_rows_and_columns_are_left_out_of_the_matmuls(implementation, monkeypatch):
    shapes = []
    product = matmul.product
    monkeypatch.setattr(matmul, "product", lambda g, w, out: (shapes.append(tuple(g.shape)), product(g, w, out))[1])
    hidden, weight = peaked(implementation, 40, 600, sharpness=1.0)
    hidden[:10] = 50 * weight[:10]  # one-hot
    gradients(implementation, hidden, weight, grad_tolerance=1e-3)
    [(rows, columns)] = shapes
    assert 0 < rows <= 30
    assert 0 < columns <= 300
    shapes.clear()
    gradients(implementation, hidden, weight)
    assert shapes == [(40, 600)]


def test_what_is_gathered_at_a_time_is_a_quarter_of_the_chunk(implementation, monkeypatch):
    # A fifth of the rows need every column: gathered whole, the weight and its gradient would be copied.
    hidden, weight = peaked(implementation, 40, 600, sharpness=0.1)
    hidden[8:] = 50 * weight[8:40]
    exact = gradients(implementation, hidden, weight)
    shapes = []
    product = matmul.product
    monkeypatch.setattr(
        matmul, "product", lambda g, w, out: (shapes.append((tuple(g.shape), tuple(w.shape))), product(g, w, out))[1]
    )
    compacted = gradients(implementation, hidden, weight, grad_tolerance=1e-9)
    quarter = 40 * 600 // 4
    assert [rows for (rows, _), _ in shapes] == [8] * len(shapes)
    assert sum(columns for (_, columns), _ in shapes) == 600
    assert all(max(g[0] * g[1], w[0] * w[1]) <= quarter for g, w in shapes)
    for a, b in zip(exact, compacted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6 * float(a.abs().max()))


def test_nan_is_never_left_out(implementation):
    hidden, weight = peaked(implementation, 8, 100, sharpness=3.0)
    hidden[3] = NAN
    loss, of_hidden, of_weight = gradients(implementation, hidden, weight, grad_tolerance=1e-3)
    assert loss.isnan()
    assert of_hidden[3].isnan().all()
    assert of_weight.isnan().all()


# ------------------------------------------------------------------------------------------------- how it is called


def test_autocast_casts_the_operands(implementation):
    implementation.skip_hidden_dtype(torch.bfloat16)
    hidden, weight, bias = make(implementation, 6, bias=True)
    leaves = [x.requires_grad_() for x in (hidden, weight, bias)]
    with torch.autocast(implementation.device, torch.bfloat16):
        loss = linear_entropy_loss(hidden, weight, bias=bias, backend=implementation.backend)
    loss.backward()
    expected = check(implementation, *(x.detach().bfloat16() for x in leaves[:2]), bias=bias.detach().bfloat16())
    assert torch.equal(loss, expected[0])
    for leaf, gradient in zip(leaves, expected[1:], strict=True):
        assert leaf.grad.dtype == torch.float32
        assert torch.equal(leaf.grad, gradient.float())


def test_autocast_leaves_float32_logits_alone(implementation):
    implementation.skip_hidden_dtype(torch.bfloat16)
    hidden, weight = (torch.randn(n, 64).bfloat16().to(implementation.device) for n in (8, 300))
    results = []
    for enabled in (False, True):
        with torch.autocast(implementation.device, torch.bfloat16, enabled=enabled):
            results.append(gradients(implementation, hidden, weight, reduction="none", logits_dtype=torch.float32))
    assert all(map(torch.equal, *results))


def test_module(implementation):
    hidden, weight, bias = make(implementation, 2, 3, bias=True)
    mask = torch.tensor([[1, 0, 1], [1, 1, 0]], device=implementation.device)
    module = LinearEntropyLoss(temperature=0.5, chunk_size=2, backend=implementation.backend)
    expected = linear_entropy_loss(
        hidden, weight, mask, bias=bias, temperature=0.5, num_items_in_batch=9, backend=implementation.backend
    )
    assert torch.equal(module(hidden, weight, mask, bias, num_items_in_batch=9, token_count=4), expected)
    with pytest.raises(ValueError, match="token_count is 5, expected 4"):
        module(hidden, weight, mask, bias, token_count=5)
    assert "temperature=0.5" in repr(module)


def test_it_is_the_loss_on_logits(implementation):
    hidden, weight, _ = make(implementation, 6)
    a, b = ([x.clone().requires_grad_() for x in (hidden, weight)] for _ in range(2))
    linear_entropy_loss(*a, backend=implementation.backend).backward()
    entropy_loss(b[0] @ b[1].T, backend=implementation.backend).backward()
    for x, y in zip(a, b, strict=True):
        torch.testing.assert_close(x.grad, y.grad, rtol=1e-5, atol=1e-7)


PEAK = """
import resource, torch
from em_kernels import linear_entropy_loss
from em_kernels.ops import types
if {off_cpu}:
    types.host_sees = lambda tensor: False
hidden, weight = torch.randn({rows}, {dim}), torch.randn({vocab}, {dim}) / {dim} ** 0.5
hidden[: {rows} // 2] *= 30  # half of the rows peaked, half flat
hidden, weight = hidden.to({dtype}).requires_grad_(), weight.to({dtype}).requires_grad_()
mask = (torch.arange({rows}) % 4 != 0) if {masked} else None
linear_entropy_loss(hidden[:64], weight[:512]).backward()  # what is loaded on first use
hidden.grad = weight.grad = None
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
linear_entropy_loss(hidden, weight, mask, temperature=2.0{options}).backward()
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""
PEAKS = {
    "default": ({}, 128),
    "small chunks": ({"options": ", chunk_size=128"}, 24),
    "masked": ({"masked": True}, 128),
    "masked, off cpu": ({"masked": True, "off_cpu": True}, 128),
    "softcap": ({"options": ", softcap=30.0"}, 128),
    "bfloat16": ({"dtype": "torch.bfloat16"}, 128),
    "tolerance": ({"options": ", grad_tolerance=1e-4"}, 128 + 96),
    "wide": ({"rows": 4096, "dim": 1024, "vocab": 8192}, 128),
    "wide, tolerance": ({"rows": 4096, "dim": 1024, "vocab": 8192, "options": ", grad_tolerance=1e-4"}, 128 + 96),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in other units")
@pytest.mark.parametrize("case", PEAKS)
def test_peak_memory_is_within_the_budget(case):
    # The logits of all tokens are 1.6 GB, or 134 MB.
    changes, scratch = PEAKS[case]
    plain = {"rows": 8192, "dim": 64, "vocab": 49152, "dtype": "torch.float32"}
    values = {**plain, "masked": False, "off_cpu": False, "options": "", **changes}
    done = subprocess.run([sys.executable, "-c", PEAK.format(**values)], capture_output=True, text=True, check=True)
    outputs = 4 * values["dim"] * (values["rows"] + values["vocab"])
    if "bfloat16" in values["dtype"]:
        outputs += outputs // 2  # the float32 weight gradient is no output
    # And what matmuls pack their operands into, and each thread's arena.
    assert int(done.stdout) < (scratch << 20) + outputs + (40 << 20)
