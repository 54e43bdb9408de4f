"""A vocabulary that is sharded over ranks: every result as of the whole vocabulary, the same bits on every rank."""

import itertools
from typing import NamedTuple

import pytest
import torch
from oracles import assert_entropy, assert_gradient, reference_loss, reference_stats
from ranks import collectives_so_far, run_on_ranks
from torch import Tensor, distributed

import em_kernels
from em_kernels import (
    TokenStats,
    entropy_loss,
    linear_entropy_loss,
    linear_token_entropy,
    linear_token_stats,
    token_entropy,
    token_stats,
)
from em_kernels.arguments import projection
from em_kernels.ops import backend as backends
from em_kernels.ops import types

INF, NAN = float("inf"), float("nan")
# The first column of each rank, and the number of all columns.
CUTS = {
    "halves": (0, 12, 24),
    "unequal": (0, 3, 23),
    "three": (0, 8, 16, 23),
    "an empty one": (0, 20, 20, 23),
}
STATISTICS = TokenStats._fields[:4]
# Half of a unit in the last place, relative.
ROUNDING = {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11, torch.float64: 2**-53}


def names(value):
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else None


def skip_unless_available(backend: str, dtype: torch.dtype = torch.float32) -> None:
    reason = backends.unavailable_reason(backend, torch.device("cpu"), dtype)
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(params=["torch", "native"])
def backend(request):
    skip_unless_available(request.param)
    return request.param


@pytest.fixture(params=CUTS.values(), ids=CUTS.keys())
def cuts(request):
    return request.param


# ------------------------------------------------------------------------------------------------------------ on logits


class Answer(NamedTuple):
    """What a rank has to say: results, the gradients of its operands, and the collectives it took part in."""

    results: list[Tensor | None]
    gradients: list[Tensor | None]
    in_forward: int
    in_backward: int


def on_rank(function, leaves, upstream, options) -> Answer:
    """Calls a function of this rank's part of the operands, and backward of its results times `upstream`."""
    before = collectives_so_far()
    found = function(*leaves, process_group=distributed.group.WORLD, **options)
    after_forward = collectives_so_far()
    results = list(found) if isinstance(found, tuple) else [found]
    used = [(r * g).sum() for r, g in zip(results, upstream, strict=False) if r is not None and g is not None]
    if used and sum(used).requires_grad:
        sum(used).backward()
    gradients = [None if leaf is None else leaf.grad for leaf in leaves]
    results = [None if r is None else r.detach() for r in results]
    return Answer(results, gradients, after_forward - before, collectives_so_far() - after_forward)


def own_columns(logits: Tensor, cuts) -> Tensor:
    """This rank's columns, which do not lie beside each other in memory from row to row."""
    rank = distributed.get_rank()
    return logits[..., cuts[rank] : cuts[rank + 1]].detach().requires_grad_()


def on_logits(name: str, logits: Tensor, cuts, upstream, options) -> Answer:
    return on_rank(getattr(em_kernels, name), [own_columns(logits, cuts)], upstream, options)


def sharded(function, logits, cuts, upstream=(1.0,), **options):
    """The results of the function over ranks, and the gradient of their columns put together."""
    answers = run_on_ranks(len(cuts) - 1, on_logits, function.__name__, logits, cuts, upstream, options)
    assert_same_bits(*(answer.results for answer in answers))
    for answer in answers:
        assert answer.in_forward <= (1 if options.get("target") is None else 2)
        assert answer.in_backward == 0
    gradients = [answer.gradients[0] for answer in answers]
    return answers[0].results, None if None in gradients else torch.cat(gradients, -1)


def assert_same_bits(first, *others):
    for other in others:
        for a, b in zip(first, other, strict=True):
            assert (a is None) == (b is None)
            assert a is None or (a.shape == b.shape and torch.equal(bits(a), bits(b)))


def bits(values: Tensor) -> Tensor:
    return values.contiguous().view(torch.uint8 if values.dim() else values.dtype).nan_to_num(-1.5)


def check_loss(logits, cuts, mask=None, upstream=1.0, **options):
    """The loss and its gradient over ranks against the reference and against the whole vocabulary; returns both."""
    own = {key: options.pop(key) for key in ("backend", "inplace_backward") if key in options}
    expected, expected_gradient = reference_loss(logits, mask, upstream, **options)
    [loss], gradient = sharded(entropy_loss, logits, cuts, [upstream], mask=mask, **own, **options)
    assert_entropy(loss, expected)
    assert_gradient(gradient, expected_gradient, logits.dtype)

    whole = logits.detach().clone().requires_grad_()
    whole_loss = entropy_loss(whole, mask, backend=own["backend"], **options)
    (whole_loss * upstream).sum().backward()
    assert loss.dtype == whole_loss.dtype
    torch.testing.assert_close(loss, whole_loss.detach(), rtol=2e-6, atol=3e-7, equal_nan=True)
    assert_gradient(gradient, whole.grad.double(), logits.dtype, ulps=2)
    return loss, gradient


def check_stats(logits, cuts, target=None, mask=None, upstream=(1.0, 1.0, 1.0, 1.0), temperature=1.0, **options):
    """The statistics and the gradient of their mix over ranks against the reference; returns both."""
    shape = logits.shape[:-1]
    upstream = [torch.full(shape, g) if isinstance(g, float) else g for g in upstream]
    expected, expected_gradient = reference_stats(logits, target, mask, upstream, temperature)
    results, gradient = sharded(
        token_stats, logits, cuts, upstream, target=target, mask=mask, temperature=temperature, **options
    )
    stats = TokenStats(*results)
    z = torch.where(logits.isfinite(), logits.double(), 0.0)
    spread = (z.amax(-1) - z.amin(-1)) / temperature
    assert_entropy(stats.entropy, expected[0])
    torch.testing.assert_close(stats.lse.double(), expected[1], rtol=3e-7, atol=1e-6, equal_nan=True)
    assert (stats.logprob is None) == (target is None)
    if target is not None:
        assert_within(stats.logprob, expected[2], 1e-6 + 3e-7 * spread)
    assert_within(stats.varentropy, expected[3], 1e-6 + 4e-7 * spread * (1 + spread))

    only_entropy = all(g is None for g in upstream[1:])
    scale = sum((g.abs() for g in upstream if g is not None), torch.zeros(shape)) / temperature
    scale = torch.zeros(shape) if only_entropy else scale
    assert_gradient(gradient, expected_gradient, logits.dtype, scale=scale)
    return stats, gradient


def assert_within(actual: Tensor, expected: Tensor, allowed: Tensor) -> None:
    assert torch.equal(actual.isnan(), expected.isnan())
    error = torch.where(actual == expected, 0.0, (actual - expected).abs().nan_to_num(0.0))
    assert (error <= allowed).all(), f"off by {error.max():.2e}, allowed {allowed.min():.2e}"


def make_logits(*shape, dtype=torch.float32):
    return (torch.randn(shape) * 3).to(dtype)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=names)
def test_loss_and_gradient(backend, cuts, dtype, reduction):
    skip_unless_available(backend, dtype)
    logits = make_logits(2, 3, cuts[-1], dtype=dtype)
    upstream = torch.randn(2, 3) if reduction == "none" else -0.5
    check_loss(logits, cuts, upstream=upstream, reduction=reduction, temperature=0.7, backend=backend)


@pytest.mark.parametrize("vocab", [2, 9000])
def test_vocabularies(backend, vocab):
    check_loss(make_logits(3, vocab), (0, vocab // 2, vocab), backend=backend)


@pytest.mark.parametrize(
    "used", list(itertools.product([False, True], repeat=4))[1:], ids=lambda used: "".join("01"[u] for u in used)
)
def test_any_mix_of_statistics_may_be_used(backend, used):
    logits, target = make_logits(2, 3, 23), torch.randint(0, 23, (2, 3))
    upstream = [torch.randn(2, 3) if u else None for u in used]
    check_stats(logits, CUTS["unequal"], target, upstream=upstream, temperature=0.7, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=names)
def test_targets_in_every_column(backend, cuts, dtype):
    skip_unless_available(backend, dtype)
    vocab = cuts[-1]
    upstream = [torch.randn(vocab) for _ in STATISTICS]
    check_stats(make_logits(vocab, vocab, dtype=dtype), cuts, torch.arange(vocab), upstream=upstream, backend=backend)


def test_statistics_without_a_target(backend, cuts):
    check_stats(make_logits(4, cuts[-1]), cuts, backend=backend)


def test_extra_statistics(backend, cuts):
    vocab = cuts[-1]
    logits, target = make_logits(2 * vocab, vocab), torch.arange(vocab).repeat(2)
    # In every other row the target is one of two that are the most likely.
    logits[::2].scatter_(-1, target[::2, None], logits[::2].amax(-1, keepdim=True))
    logits[5, 7] = -INF
    mask = torch.arange(2 * vocab) % 7 != 2
    extra = ("max_prob", "top1", "mean_logprob", "collision")
    results, _ = sharded(token_stats, logits, cuts, target=target, mask=mask, extra=extra, backend=backend)
    stats = TokenStats(*results)
    logp = logits.double().log_softmax(-1)
    at_target = logits.gather(-1, target[:, None]).squeeze(-1)
    expected = (
        logp.exp().amax(-1),
        (at_target >= logits.amax(-1)).double(),
        logp.mean(-1),
        logp.exp().square().sum(-1),
    )
    assert 0 < expected[1].mean() < 1
    for name, value in zip(extra, expected, strict=True):
        value = value.masked_fill(~mask, 0.0).float()
        torch.testing.assert_close(getattr(stats, name), value, rtol=2e-6, atol=1e-7)


def test_token_entropy(backend, cuts):
    logits, mask = make_logits(2, 3, cuts[-1]), torch.tensor([[1, 1, 0], [0, 1, 1]])
    [entropy], gradient = sharded(token_entropy, logits, cuts, mask=mask, temperature=0.5, backend=backend)
    assert gradient is None
    assert_entropy(entropy, reference_loss(logits, mask, reduction="none", temperature=0.5)[0])


@pytest.mark.parametrize("garbage", [NAN, INF, 3e38])
@pytest.mark.parametrize("kind", ["bool", "weights"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_masked_tokens_are_not_read(backend, kind, reduction, garbage):
    mask = torch.tensor([[True, False, True], [False, True, True]])
    logits = make_logits(2, 3, 23)
    # On one rank, on the other, and on both.
    logits[0, 1, :3] = garbage
    logits[1, 0] = garbage
    weight = mask if kind == "bool" else mask * (torch.rand(2, 3) + 0.5)
    upstream = torch.randn(2, 3) if reduction == "none" else 1.0
    _, gradient = check_loss(logits, CUTS["unequal"], weight, upstream, reduction=reduction, backend=backend)
    assert (gradient[~mask] == 0).all()
    # Their targets are not looked at either.
    target = torch.tensor([[3, -100, 0], [99, 22, 2]])
    check_stats(logits, CUTS["unequal"], target, weight, backend=backend)


def test_no_token_counts(backend):
    loss, gradient = check_loss(make_logits(4, 24), CUTS["halves"], torch.zeros(4), backend=backend)
    assert loss == 0
    assert (gradient == 0).all()


def test_no_tokens(backend, cuts):
    loss, gradient = check_loss(torch.empty(2, 0, cuts[-1]), cuts, backend=backend)
    assert loss == 0
    assert gradient.shape == (2, 0, cuts[-1])
    check_stats(torch.empty(0, cuts[-1]), cuts, torch.empty(0, dtype=torch.int64), backend=backend)


@pytest.mark.parametrize("rank", [0, 1, 2])
def test_a_rank_whose_columns_are_all_banned(backend, rank):
    cuts = CUTS["three"]
    logits = make_logits(8, 23)
    logits[::2, cuts[rank] : cuts[rank + 1]] = -INF
    check_loss(logits, cuts, upstream=torch.randn(8), reduction="none", backend=backend)
    target = torch.arange(8) * 2 + 1  # a banned one has a log-probability of -inf
    check_stats(logits, cuts, target, upstream=(1.0, 0.5, None, -0.5), backend=backend)
    allowed = logits.gather(-1, target[:, None]).squeeze(-1) > -INF
    check_stats(logits[allowed], cuts, target[allowed], backend=backend)


def test_rows_without_a_distribution_are_nan_on_every_rank(backend, cuts):
    logits = make_logits(6, cuts[-1])
    logits[0] = -INF
    logits[1, 1] = NAN
    logits[2, -1] = INF
    logits[3, 1] = -INF
    _, gradient = check_loss(logits, cuts, reduction="none", backend=backend)
    assert gradient[:3].isnan().all()
    results, _ = sharded(
        token_stats, logits, cuts, target=torch.tensor([0, 0, 0, 0, 1, 2]), extra=("max_prob", "top1"), backend=backend
    )
    for field in results:
        assert field is None or field.isnan().tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize("offset", [-200, -(2**15), 2**15])
@pytest.mark.parametrize("cuts", [(0, 4, 9), (0, 1, 9), (0, 4, 4, 9)], ids=str)
def test_logits_far_from_zero(backend, cuts, offset):
    # Multiples of 2^-8, so that the offset does not round them.
    logits, target = (torch.randn(2, 9) * 256).round() / 256, torch.tensor([0, 8])
    near, far = (check_stats(z, cuts, target, backend=backend) for z in (logits, logits + offset))
    for name in ("entropy", "logprob", "varentropy"):
        assert torch.equal(getattr(near[0], name), getattr(far[0], name))
    assert torch.equal(near[1], far[1])


@pytest.mark.parametrize("edges", [(0, 1, 1000), (0, 999, 1000), (0, 500, 1000)], ids=str)
def test_rows_that_are_all_but_one_hot(backend, edges):
    # The rounding of the distance between the shards' maxima, above 64 up to 4e-6, would be a relative error of a sum.
    logits = torch.randn(64, 1000)
    logits[:32, 0] += torch.linspace(68, 71, 32)
    logits[32:, -1] += torch.linspace(68, 71, 32)
    check_loss(logits, edges, temperature=1.25, backend=backend)


@pytest.mark.parametrize("cuts", [(0, 1, 3), (0, 2, 3), (0, 1, 2, 3)], ids=str)
def test_a_confident_target(backend, cuts):
    logits = torch.tensor([[0.0, -20.0, -21.0], [-20.0, 0.0, -21.0], [-20.0, -21.0, 0.0]])
    upstream = (None, None, 1.0, None)
    results, gradient = sharded(token_stats, logits, cuts, upstream, target=torch.arange(3), backend=backend)
    rest = torch.tensor([-20.0, -21.0], dtype=torch.float64).exp().sum()
    exact = -rest.log1p()
    assert exact == pytest.approx(-2.8e-9, rel=0.01)
    torch.testing.assert_close(results[2].double(), exact.expand(3), rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient.diagonal().double(), (rest / (1 + rest)).expand(3), rtol=1e-5, atol=0)


@pytest.mark.parametrize("shape", [(), (2, 1), (2, 3)], ids=str)
def test_temperatures(backend, shape):
    temperature = torch.rand(shape) * 2 + 0.3
    logits, target = make_logits(2, 3, 23), torch.randint(0, 23, (2, 3))
    check_loss(logits, CUTS["three"], temperature=temperature, backend=backend)
    check_stats(logits, CUTS["three"], target, temperature=temperature.expand(2, 3), backend=backend)


@pytest.mark.parametrize("items", [7, torch.tensor(7), 0], ids=["int", "tensor", "0"])
def test_num_items_in_batch(backend, items):
    mask = torch.tensor([1.0, 0.0, 0.5, 1.0])
    check_loss(make_logits(4, 24), CUTS["halves"], mask, num_items_in_batch=items, backend=backend)


def in_place(logits, cuts, backend):
    own = own_columns(logits, cuts)
    loss = entropy_loss(own, inplace_backward=True, process_group=distributed.group.WORLD, backend=backend)
    [gradient] = torch.autograd.grad(loss, own)
    assert gradient.data_ptr() == own.data_ptr()
    return gradient


def test_inplace_backward(backend):
    logits = make_logits(4, 23)
    parts = run_on_ranks(2, in_place, logits, CUTS["unequal"], backend)
    assert_gradient(torch.cat(parts, -1), reference_loss(logits)[1], torch.float32)


def out_of_range(logits, cuts, target, message):
    with pytest.raises(ValueError, match=message):
        token_stats(own_columns(logits, cuts), target, process_group=distributed.group.WORLD)


@pytest.mark.parametrize("wrong", [23, -1])
def test_a_target_out_of_range_is_an_error_on_every_rank(cuts, wrong):
    target = torch.tensor([0, wrong + (cuts[-1] - 23 if wrong > 0 else 0)])
    message = rf"target has {target[1]} where it is not masked, expected values in \[0, {cuts[-1]}\)"
    run_on_ranks(len(cuts) - 1, out_of_range, make_logits(2, cuts[-1]), cuts, target, message)


def test_two_runs_agree_bit_for_bit(backend):
    logits, target = make_logits(30, 23), torch.randint(0, 23, (30,))
    upstream = [torch.randn(30) for _ in STATISTICS]
    first, second = (
        sharded(token_stats, logits, CUTS["three"], upstream, target=target, backend=backend) for _ in "12"
    )
    assert_same_bits([*first[0], first[1]], [*second[0], second[1]])


def test_triton():
    skip_unless_available("triton")
    logits = make_logits(2, 3, 23)
    check_loss(logits, CUTS["unequal"], reduction="mean", backend="triton")
    upstream = [torch.randn(2, 3) for _ in STATISTICS]
    check_stats(logits, CUTS["three"], torch.randint(0, 23, (2, 3)), upstream=upstream, backend="triton")


def of_two_in_three(logits, cuts):
    """The last two of three ranks share the vocabulary, whose first columns have other numbers in the group."""
    group = distributed.new_group([1, 2])
    rank = distributed.get_rank()
    if rank == 0:
        return None
    target = torch.arange(len(logits))
    return token_stats(logits[:, cuts[rank - 1] : cuts[rank]], target, process_group=group)


def test_a_group_that_is_not_all_ranks():
    logits = make_logits(23, 23)
    _, first, second = run_on_ranks(3, of_two_in_three, logits, CUTS["unequal"])
    assert_same_bits(first, second)
    expected, _ = reference_stats(logits, torch.arange(23), None, [torch.ones(23)] * 4)
    torch.testing.assert_close(first.logprob.double(), expected[2], rtol=1e-6, atol=1e-6)


# ----------------------------------------------------------------------------------------------------- on hidden states


def on_hidden(name: str, operands, cuts, upstream, options, frozen) -> Answer:
    """Calls the function of the hidden states and this rank's rows of weight and bias."""
    rank = distributed.get_rank()
    hidden, weight, bias = operands
    rows = slice(cuts[rank], cuts[rank + 1])
    leaves = [hidden.detach(), weight.detach()[rows], None if bias is None else bias.detach()[rows]]
    for operand, leaf in zip(("hidden", "weight", "bias"), leaves, strict=True):
        if leaf is not None and operand not in frozen:
            leaf.requires_grad_()
    function = getattr(em_kernels, name)

    def of_leaves(hidden, weight, bias, **options):
        return function(hidden, weight, bias=bias, **options)

    return on_rank(of_leaves, leaves, upstream, options)


def linear_sharded(function, operands, cuts, upstream=(1.0,), frozen=(), chunks=1, **options):
    """The results of the function over ranks, and the gradients of hidden states, of all rows of weight and of bias."""
    answers = run_on_ranks(len(cuts) - 1, on_hidden, function.__name__, operands, cuts, upstream, options, frozen)
    assert_same_bits(*([*answer.results, answer.gradients[0]] for answer in answers))
    of_targets, of_hidden = options.get("target") is not None, answers[0].gradients[0] is not None
    for answer in answers:
        assert answer.in_forward + answer.in_backward == chunks + of_targets + of_hidden
    parts = zip(*(answer.gradients[1:] for answer in answers), strict=True)
    return answers[0].results, [answers[0].gradients[0], *(None if None in part else torch.cat(part) for part in parts)]


def logits_of(operands, softcap=None) -> Tensor:
    hidden, weight, bias = (None if x is None else x.double() for x in operands)
    z = hidden @ weight.T if bias is None else hidden @ weight.T + bias
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def make_operands(*shape, vocab=23, dim=24, dtype=torch.float32, bias=False):
    """Hidden states, weight and bias whose logits are exact in every dtype: halves of at most 7 bits."""
    hidden = torch.randint(-2, 3, (*shape, dim))
    weight = torch.randint(-2, 3, (vocab, dim)) / 2
    offset = torch.randint(-4, 5, (vocab,)) / 2 if bias else None
    return [None if x is None else x.to(dtype) for x in (hidden, weight, offset)]


def assert_operand_gradients(actual, operands, g: Tensor, share: float, size: Tensor | None = None) -> None:
    """Of each operand that has one, from the logits' exact gradient `g`, known up to `share` of `size`.

    Where no size is given, it is the largest entry of each row.
    """
    hidden, weight, _ = operands
    rounding = ROUNDING[hidden.dtype]
    g, h, w = g.reshape(-1, g.shape[-1]), hidden.double().reshape(-1, hidden.shape[-1]), weight.double()
    h = torch.where((g != 0).any(-1, keepdim=True), h, 0.0)  # what is not read may hold anything
    size = g.abs().amax(-1, keepdim=True).expand_as(g) if size is None else size.reshape(g.shape)
    exact, sizes = (g @ w, g.T @ h, g.sum(0)), (size @ w.abs(), size.T @ h.abs(), size.sum(0))
    for value, expected, size in zip(actual, exact, sizes, strict=True):
        if value is None:
            continue
        assert value.dtype == hidden.dtype
        error = (value.double().reshape(expected.shape) - expected).abs()
        allowed = share * size + 2 * rounding * expected.abs() + 1e-30
        if hidden.dtype == torch.float16:
            allowed = allowed + 2**-24  # half of the smallest number it has, for each of two roundings
        assert (error <= allowed).all(), f"{tuple(value.shape)}: {(error / allowed).max():.2f} times what is allowed"


def check_linear_loss(operands, cuts, mask=None, upstream=1.0, softcap=None, frozen=(), chunks=1, **options):
    """The loss and its gradients over ranks against the reference and the unsharded call; returns them."""
    own = {key: options.pop(key) for key in ("backend", "chunk_size") if key in options}
    z = logits_of(operands, softcap)
    expected, g = reference_loss(z, mask, upstream, **options)
    g = g if softcap is None else g * (1 - (z / softcap) ** 2)
    own |= {"softcap": softcap, "mask": mask}
    [loss], gradients = linear_sharded(
        linear_entropy_loss, operands, cuts, [upstream], frozen, chunks, **own, **options
    )
    if softcap is None:
        assert_entropy(loss, expected)
    dtype = operands[0].dtype
    share = 1e-12 if dtype == torch.float64 else max(2 * ROUNDING[dtype], 2e-6 if softcap is None else 2e-5)
    assert_operand_gradients(gradients, operands, g, share)

    leaves = [None if x is None else x.detach().requires_grad_() for x in operands]
    whole = linear_entropy_loss(leaves[0], leaves[1], bias=leaves[2], **own, **options)
    (whole * upstream).sum().backward()
    assert loss.dtype == whole.dtype
    torch.testing.assert_close(loss, whole.detach(), rtol=2e-6, atol=3e-7)
    for name, gradient, leaf in zip(("hidden", "weight", "bias"), gradients, leaves, strict=True):
        assert (gradient is None) == (leaf is None or name in frozen)
    return loss, gradients


def check_linear_stats(operands, cuts, target=None, mask=None, upstream=None, temperature=1.0, chunks=1, **options):
    """The statistics and the gradients of their mix over ranks against the reference; returns both."""
    shape = operands[0].shape[:-1]
    upstream = [torch.rand(shape) for _ in STATISTICS] if upstream is None else upstream
    expected, g = reference_stats(logits_of(operands), target, mask, upstream, temperature)
    own = {"target": target, "mask": mask, "temperature": temperature}
    results, gradients = linear_sharded(linear_token_stats, operands, cuts, upstream, chunks=chunks, **own, **options)
    stats = TokenStats(*results)
    assert_entropy(stats.entropy, expected[0])
    for field, value in zip(stats[1:4], expected[1:], strict=True):
        assert (field is None) == (value is None)
        if field is not None:
            torch.testing.assert_close(field.double(), value, rtol=2e-6, atol=2e-5)
    # Of a mix of upstream gradients some cancel; rounding is relative to what did.
    cancelled = sum(u.abs().double() for u in upstream).unsqueeze(-1)
    size = torch.where((g != 0).any(-1, keepdim=True), g.abs() + cancelled, 0.0)
    assert_operand_gradients(gradients, operands, g, max(2 * ROUNDING[operands[0].dtype], 4e-6), size)
    return stats, gradients


@pytest.mark.parametrize("chunk_size", [3, None], ids=["chunks of 3", "one chunk"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=names)
def test_linear_loss_and_gradients(backend, cuts, dtype, reduction, chunk_size):
    skip_unless_available(backend, torch.float64 if dtype == torch.float64 else torch.float32)
    operands = make_operands(2, 4, vocab=cuts[-1], dtype=dtype, bias=True)
    upstream = torch.rand(2, 4) if reduction == "none" else -0.5
    check_linear_loss(
        operands,
        cuts,
        upstream=upstream,
        reduction=reduction,
        temperature=2.0,
        chunk_size=chunk_size,
        chunks=1 if chunk_size is None else 3,
        backend=backend,
    )


def test_linear_softcap(backend, cuts):
    operands = make_operands(5, vocab=cuts[-1], bias=True)
    check_linear_loss(operands, cuts, softcap=5.0, chunk_size=2, chunks=3, backend=backend)
    check_linear_loss(operands, cuts, softcap=5.0, reduction="none", upstream=torch.rand(5), backend=backend)


@pytest.mark.parametrize("frozen", [("weight",), ("hidden",), ("weight", "bias"), ("hidden", "bias")], ids="-".join)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_only_what_is_not_frozen_gets_a_gradient(backend, frozen, reduction):
    operands = make_operands(5, bias=True)
    check_linear_loss(operands, CUTS["three"], frozen=frozen, reduction=reduction, backend=backend)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_masked_hidden_states_are_not_read(backend, reduction):
    operands = make_operands(6)
    mask = torch.tensor([1.0, 0.0, 0.5, 0.0, 1.0, 0.25])
    operands[0][mask == 0] = NAN
    # Two chunks of the four tokens that are left.
    options = {"chunk_size": 2, "chunks": 2, "backend": backend}
    _, gradients = check_linear_loss(operands, CUTS["three"], mask, reduction=reduction, **options)
    assert (gradients[0][mask == 0] == 0).all()
    check_linear_stats(operands, CUTS["three"], torch.tensor([0, -100, 22, 99, 7, 8]), mask, **options)


def on_hidden_off_cpu(*arguments) -> Answer:
    """The same as `on_hidden` on a rank that cannot see the mask."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(types, "host_sees", lambda _: False)
        patch.setattr(projection, "values_visible", lambda _: False)
        return on_hidden(*arguments)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_count_over_ranks_that_cannot_see_the_mask(reduction):
    operands, cuts = make_operands(6), CUTS["unequal"]
    mask = torch.tensor([True, False, True, False, True, True])
    operands[0][~mask] = NAN
    options = {"mask": mask, "reduction": reduction, "chunk_size": 2, "backend": "torch"}
    [expected], gradients = linear_sharded(linear_entropy_loss, operands, cuts, chunks=2, **options)
    arguments = ("linear_entropy_loss", operands, cuts, [1.0])
    for answer in run_on_ranks(2, on_hidden_off_cpu, *arguments, {**options, "token_count": 4}, ()):
        # Two chunks of the four tokens, and the sum of hidden's gradient.
        assert answer.in_forward + answer.in_backward == 3
        torch.testing.assert_close(answer.results[0], expected)
        torch.testing.assert_close(answer.gradients[0], gradients[0])
    for answer in run_on_ranks(2, on_hidden_off_cpu, *arguments, {**options, "token_count": 3}, ()):
        assert answer.results[0].isnan().all()


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_no_hidden_states(backend, cuts, reduction):
    operands = make_operands(2, 0, vocab=cuts[-1], bias=True)
    loss, gradients = check_linear_loss(operands, cuts, reduction=reduction, chunks=0, backend=backend)
    assert loss.sum() == 0
    assert all((gradient == 0).all() for gradient in gradients)


def test_temperatures_of_hidden_states(backend):
    operands, temperature = make_operands(3, 4), torch.rand(3, 4) + 0.5
    check_linear_loss(operands, CUTS["three"], temperature=temperature, chunk_size=5, chunks=3, backend=backend)
    check_linear_stats(operands, CUTS["three"], temperature=temperature, chunk_size=5, chunks=3, backend=backend)


@pytest.mark.parametrize("chunk_size", [2, None], ids=["chunks of 2", "one chunk"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_linear_statistics_and_gradients(backend, cuts, dtype, chunk_size):
    operands = make_operands(2, 3, vocab=cuts[-1], dtype=dtype, bias=True)
    target = torch.randint(0, cuts[-1], (2, 3))
    chunks = 1 if chunk_size is None else 3
    check_linear_stats(operands, cuts, target, temperature=2.0, chunk_size=chunk_size, chunks=chunks, backend=backend)


def test_linear_token_entropy(backend, cuts):
    operands, mask = make_operands(2, 3, vocab=cuts[-1], bias=True), torch.tensor([[1, 1, 0], [0, 1, 1]])
    operands[2][:3] = -INF  # all columns of a rank
    frozen = ("hidden", "weight", "bias")
    [entropy], _ = linear_sharded(linear_token_entropy, operands, cuts, frozen=frozen, mask=mask, backend=backend)
    assert_entropy(entropy, reference_loss(logits_of(operands), mask, reduction="none")[0])


def test_unequal_shards_are_cut_into_the_same_chunks(backend):
    # More tokens than a chunk of the default size, whatever a rank's share of the vocabulary.
    operands = make_operands(700, vocab=90, dim=4)
    check_linear_loss(operands, (0, 1, 90), chunks=2, backend=backend)


def test_two_runs_of_hidden_states_agree_bit_for_bit(backend):
    operands = [torch.randn(50, 24), torch.randn(23, 24), torch.randn(23)]
    first, second = (
        linear_sharded(linear_entropy_loss, operands, CUTS["three"], chunks=4, chunk_size=16, backend=backend)
        for _ in "12"
    )
    assert_same_bits([*first[0], *first[1]], [*second[0], *second[1]])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("tolerance", [1e-4, 1e-2])
def test_grad_tolerance_bounds_the_error(backend, reduction, tolerance):
    hidden, weight = torch.randn(40, 24) / 2, torch.randn(200, 24)
    # Nine of ten columns are so unlikely that the logits' gradient is small there.
    operands = [hidden, weight, torch.where(torch.arange(200) % 10 == 0, 0.0, -12.0)]
    cuts = (0, 90, 120, 200)
    upstream = torch.rand(40) if reduction == "none" else 1.0
    options = {"reduction": reduction, "backend": backend}
    exact, near = (
        linear_sharded(linear_entropy_loss, operands, cuts, [upstream], grad_tolerance=t, **options)
        for t in (0.0, tolerance)
    )
    divisor = 40 if reduction == "mean" else 1
    largest = upstream.max() if reduction == "none" else 1.0
    assert torch.equal(near[0][0], exact[0][0])
    for operand, other in ((0, weight), (1, hidden)):
        error = (near[1][operand] - exact[1][operand]).abs()
        allowed = tolerance * largest / divisor * other.abs().sum(0)
        assert (error <= allowed + 1e-6 * exact[1][operand].abs().amax()).all()
        assert (error > 0).any(), "nothing was left out"
    torch.testing.assert_close(near[1][2], exact[1][2], rtol=0, atol=0)


def test_triton_on_hidden_states():
    skip_unless_available("triton")
    check_linear_loss(make_operands(4, bias=True), CUTS["unequal"], chunk_size=3, chunks=2, backend="triton")


# ------------------------------------------------------------------------------------------------------------- compiled


def compiled_and_eager(name: str, cuts, operands, options) -> tuple[Answer, Answer]:
    """A function of this rank's part of the operands under torch.compile, its group an argument; and as it is."""
    rank = distributed.get_rank()
    *hidden, parted = operands
    answers = []
    for function in (
        torch.compile(getattr(em_kernels, name), fullgraph=True, backend="aot_eager"),
        getattr(em_kernels, name),
    ):
        own = parted[:, cuts[rank] : cuts[rank + 1]] if not hidden else parted[cuts[rank] : cuts[rank + 1]]
        leaves = [x.detach().clone().requires_grad_() for x in (*hidden, own)]
        answers.append(on_rank(function, leaves, [1.0] * 4, options))
    return tuple(answers)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("entropy_loss", {"temperature": 0.5}),
        ("entropy_loss", {"reduction": "none"}),
        ("linear_entropy_loss", {"mask": torch.tensor([1.0, 0.0, 0.5, 1.0])}),
        ("token_stats", {"target": torch.tensor([0, 3, 11, 22])}),
        ("linear_token_stats", {"target": torch.tensor([0, 3, 11, 22]), "chunk_size": 2}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_compiled(name, options):
    operands = [torch.randn(4, 24), torch.randn(23, 24)] if name.startswith("linear") else [torch.randn(4, 23)]
    answers = run_on_ranks(2, compiled_and_eager, name, CUTS["unequal"], operands, options)
    for compiled, eager in answers:
        assert compiled.in_forward + compiled.in_backward == eager.in_forward + eager.in_backward
        for a, b in zip(compiled.results + compiled.gradients, eager.results + eager.gradients, strict=True):
            assert (a is None) == (b is None)
            assert a is None or torch.equal(a, b)


def compiled_statistics(logits, cuts, target) -> TokenStats:
    function = torch.compile(token_stats, fullgraph=True, backend="aot_eager")
    return function(own_columns(logits, cuts), target, process_group=distributed.group.WORLD)


def test_a_target_out_of_range_is_nan_where_it_cannot_be_seen():
    answers = run_on_ranks(2, compiled_statistics, torch.randn(4, 23), CUTS["unequal"], torch.tensor([0, 22, 23, -1]))
    for stats in answers:
        for field in stats[:4]:
            assert field.isnan().tolist() == [False, False, True, True]
