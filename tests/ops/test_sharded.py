"""A vocabulary that is sharded over the ranks of a process group gives what it gives in one piece."""

import itertools

import pytest
import torch
import torch.distributed as dist
from oracles import assert_entropy, assert_gradient, reference_loss, reference_stats
from ranks import Collectives
from torch import Tensor

from em_kernels import (
    EntropyLoss,
    LinearEntropyLoss,
    entropy_loss,
    linear_entropy_loss,
    linear_token_entropy,
    linear_token_stats,
    token_entropy,
    token_stats,
)
from em_kernels.ops import backend as backends
from em_kernels.ops.types import EXTRA

INF, NAN = float("inf"), float("nan")
VOCAB = 30
# How many columns each rank holds.
SHARDS = [(15, 15), (11, 19), (10, 10, 10), (7, 14, 9), (12, 0, 18)]


@pytest.fixture(params=SHARDS, ids=str)
def shards(request):
    return request.param


@pytest.fixture(params=backends.NAMES)
def backend(request):
    reason = backends.unavailable_reason(request.param, torch.device("cpu"))
    if reason is not None:
        pytest.skip(reason)
    return request.param


@pytest.fixture
def run(worlds, shards):
    """Runs a function on as many ranks as there are shards; the first arguments it gets are the shards."""
    return lambda function, *arguments: worlds.of(len(shards)).run(function, shards, *arguments)


def own(values: Tensor, shards, dim: int = -1) -> Tensor:
    """This rank's part of the vocabulary, as a leaf."""
    return values.detach().split(shards, dim)[dist.get_rank()].clone().requires_grad_()


def group():
    return dist.group.WORLD


def assert_part(actual: Tensor, whole: Tensor, shards, scale: Tensor) -> None:
    """A rank's part of a gradient; its accuracy is relative to the largest entry of a row, which any rank may hold."""
    expected = whole.split(shards, -1)[dist.get_rank()]
    if expected.numel() == 0:
        assert actual.shape == expected.shape
    else:
        assert_gradient(actual, expected, actual.dtype, scale=scale)


def same_on_every_rank(values: Tensor) -> None:
    everyone = [torch.empty_like(values) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, values.detach().contiguous())
    assert all(torch.equal(values.nan_to_num(), other.nan_to_num()) for other in everyone)


# -------------------------------------------------------------------------------------------------------------- logits


def check_loss(shards, backend, dtype, reduction, changes):
    logits = (torch.randn(2, 3, VOCAB) * 4).to(dtype)
    if changes.get("banned"):
        logits[..., : shards[0]] = -INF
    mask = changes.get("mask")
    options = {key: value for key, value in changes.items() if key in ("temperature", "num_items_in_batch")}
    upstream = torch.randn(2, 3) if reduction == "none" else -2.5
    expected, gradient = reference_loss(logits, mask, upstream, reduction=reduction, **options)
    if mask is not None:
        logits = torch.where((mask != 0).unsqueeze(-1), logits, NAN)
    for inplace in (False, True):
        leaf = own(logits, shards)
        loss = entropy_loss(
            leaf, mask, reduction=reduction, inplace_backward=inplace, process_group=group(), backend=backend, **options
        )
        (loss * upstream).sum().backward()
        assert_entropy(loss, expected)
        same_on_every_rank(loss)
        assert_part(leaf.grad, gradient, shards, gradient.abs().amax(-1))


LOSSES = {
    "plain": {},
    "mask": {"mask": torch.tensor([[True, False, True], [True, True, False]])},
    "weights": {"mask": torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]])},
    "a banned shard": {"banned": True},
    "temperatures": {"temperature": torch.tensor([[0.5, 1.0, 2.0], [0.7, 3.0, 1.0]])},
    "items": {"num_items_in_batch": 11, "temperature": 0.6},
}


@pytest.mark.parametrize("changes", LOSSES.values(), ids=LOSSES)
def test_loss_on_logits(run, backend, changes):
    reductions = ("mean",) if "num_items_in_batch" in changes else ("mean", "sum", "none")
    for reduction in reductions:
        run(check_loss, backend, torch.float32, reduction, changes)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_loss_on_logits_of_other_dtypes(run, dtype):
    for reduction in ("mean", "none"):
        run(check_loss, "torch", dtype, reduction, {})


def check_stats(shards, backend, used, masked):
    logits, target = torch.randn(4, VOCAB) * 4, torch.tensor([0, 10, 20, VOCAB - 1])
    mask = torch.tensor([1, 1, 0, 1]) if masked else None
    upstream = [torch.randn(4) if is_used else None for is_used in used]
    expected, gradient = reference_stats(logits, target, mask, upstream, 0.7)
    if masked:
        logits[2], target[2] = NAN, -100
    options = {"mask": mask, "temperature": 0.7, "extra": EXTRA, "backend": backend}
    leaf = own(logits, shards)
    stats = token_stats(leaf, target, process_group=group(), **options)
    for field in stats:
        same_on_every_rank(field)
    assert_entropy(stats.entropy, expected[0])
    whole = token_stats(logits, target, **options)
    for name, field, value in zip(stats._fields, stats, whole, strict=True):
        torch.testing.assert_close(field, value, rtol=3e-6, atol=3e-6, msg=name)
    sum((f * g).sum() for f, g in zip(stats[:4], upstream, strict=True) if g is not None).backward()
    scale = gradient.abs().amax(-1) + sum(g.abs() for g in upstream if g is not None) / 0.7
    assert_part(leaf.grad, gradient, shards, scale)
    entropy = token_entropy(own(logits, shards), mask, temperature=0.7, process_group=group(), backend=backend)
    torch.testing.assert_close(entropy, whole.entropy, rtol=3e-6, atol=3e-6)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_statistics_of_logits(run, backend, masked):
    every = [u for u in itertools.product((False, True), repeat=4) if any(u)]
    for used in every if backend == "native" else [(True,) * 4, (False, False, True, False)]:
        run(check_stats, backend, used, masked)


def check_special_rows(shards, backend):
    far = torch.randn(2, 9) - 200
    sizes = (4, 5) if len(shards) == 2 else (2, 3, 4)
    loss = entropy_loss(own(far, sizes), process_group=group(), backend=backend)
    assert_entropy(loss, reference_loss(far)[0])
    without_offset = entropy_loss(own(far.double() + 200, sizes), process_group=group())
    torch.testing.assert_close(loss.double(), without_offset, rtol=2e-6, atol=1e-6)

    confident, sizes = torch.tensor([[0.0, -20.0, -21.0]]), (1, 2) if len(shards) == 2 else (1, 1, 1)
    rest = confident[0, 1:].double().exp().sum()
    for leaf in (own(confident, sizes), own(confident, sizes[::-1])):
        logprob = token_stats(leaf, torch.tensor([0]), process_group=group(), backend=backend).logprob
        logprob.sum().backward()
        torch.testing.assert_close(logprob[0].double(), -rest.log1p(), rtol=1e-5, atol=0)
        if dist.get_rank() == 0:
            torch.testing.assert_close(leaf.grad[0, 0].double(), rest, rtol=1e-5, atol=0)

    nothing = torch.tensor([[-INF] * VOCAB, [NAN] + [0.0] * (VOCAB - 1), [0.0] * (VOCAB - 1) + [INF], [1.0] * VOCAB])
    stats = token_stats(own(nothing, shards), torch.tensor([0] * 4), process_group=group(), backend=backend)
    for field in stats[:4]:
        assert field.isnan().tolist() == [True, True, True, False]
    for shape in ((0,), (2, 0)):
        empty = own(torch.randn(*shape, VOCAB), shards)
        entropy_loss(empty, process_group=group(), backend=backend).backward()
        assert empty.grad.shape == empty.shape
        stats = token_stats(empty, torch.empty(shape, dtype=torch.int64), process_group=group(), backend=backend)
        assert stats.logprob.shape == shape
    with pytest.raises(ValueError, match=r"target has 30 where it is not masked, expected values in \[0, 30\)"):
        token_stats(own(torch.zeros(1, VOCAB), shards), torch.tensor([VOCAB]), process_group=group(), backend=backend)


def test_rows_that_are_special(run, backend):
    run(check_special_rows, backend)


# ------------------------------------------------------------------------------------------------------- hidden states


def draw(dtype=torch.float32):
    """Hidden states, weight and bias whose logits are exact in every dtype."""
    hidden = torch.randint(-2, 3, (2, 3, 8)).to(dtype)
    return hidden, (torch.randint(-2, 3, (VOCAB, 8)) / 2).to(dtype), (torch.randint(-4, 5, (VOCAB,)) / 2).to(dtype)


def check_linear(shards, backend, dtype, options, needs=(True, True, True)):
    hidden, weight, bias = draw(dtype)
    options = {"backend": backend, **options}
    rank, tolerance = dist.get_rank(), {torch.float32: 4e-6, torch.float64: 1e-12}.get(dtype, 8e-3)
    results = []
    for sharded in (False, True):
        leaves = [x.clone() for x in (hidden, weight, bias)]
        if sharded:
            leaves[1:] = (own(x, shards, 0).detach() for x in leaves[1:])
        leaves = [x.requires_grad_(needed) for x, needed in zip(leaves, needs, strict=True)]
        given = {**options, "process_group": group() if sharded else None}
        loss = linear_entropy_loss(*leaves[:2], bias=leaves[2], **given)
        upstream = torch.linspace(-1, 2, loss.numel()).view(loss.shape) * 16
        if any(needs):
            (loss * upstream).sum().backward()
        results.append((loss.detach(), *(leaf.grad for leaf in leaves)))
    (loss, *whole), (shared_loss, *parts) = results
    torch.testing.assert_close(shared_loss, loss, rtol=3e-6, atol=3e-7)
    same_on_every_rank(shared_loss)
    if needs[0]:
        same_on_every_rank(parts[0])
    whole = [g if g is None or i == 0 else g.split(shards, 0)[rank] for i, g in enumerate(whole)]
    largest = [None if g is None else g.abs().amax() for g in results[0][1:]]
    for part, expected, size, needed in zip(parts, whole, largest, needs, strict=True):
        assert (part is not None) == needed
        if needed:
            torch.testing.assert_close(part, expected, rtol=tolerance, atol=tolerance * float(size))
    return shared_loss, parts


LINEAR = {
    "plain": {},
    "mask and chunks": {"mask": torch.tensor([[1, 0, 1], [1, 1, 0]]), "chunk_size": 2},
    "weights": {"mask": torch.tensor([[0.5, 0.0, 2.0], [1.0, 0.25, 0.0]]), "temperature": 0.6},
    "softcap": {"softcap": 3.0, "chunk_size": 4},
    "temperatures": {"temperature": torch.tensor([[0.5, 1.0, 2.0], [0.7, 3.0, 1.0]])},
}


@pytest.mark.parametrize("options", LINEAR.values(), ids=LINEAR)
def test_loss_on_hidden_states(run, backend, options):
    for reduction in ("mean", "sum", "none"):
        run(check_linear, backend, torch.float32, {"reduction": reduction, **options})


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_loss_on_hidden_states_of_other_dtypes(run, dtype):
    for reduction in ("mean", "none"):
        run(check_linear, "torch", dtype, {"reduction": reduction, "chunk_size": 4})


@pytest.mark.parametrize("needs", list(itertools.product((False, True), repeat=3)), ids=str)
def test_frozen_operands(worlds, needs):
    for reduction in ("mean", "none"):
        worlds.of(2).run(check_linear, (11, 19), "torch", torch.float32, {"reduction": reduction}, needs)


def test_two_runs_agree_bit_for_bit(run, backend):
    run(_check_determinism_from_seed, backend)


def _check_determinism_from_seed(shards, backend):
    results = []
    for _ in range(2):
        torch.manual_seed(1)
        loss, gradients = check_linear(shards, backend, torch.float32, {"chunk_size": 2})
        results.append([loss, *gradients])
    assert all(map(torch.equal, *results))


def check_tolerance(shards, tolerance):
    weight = torch.randn(VOCAB, 8, dtype=torch.float64)
    hidden = 3 * weight[torch.randint(0, 5, (20,))]
    results = []
    for grad_tolerance in (0.0, tolerance):
        h, w = hidden.clone().requires_grad_(), own(weight, shards, 0)
        linear_entropy_loss(h, w, grad_tolerance=grad_tolerance, chunk_size=8, process_group=group()).backward()
        results.append((h.grad, w.grad))
    bounds = (weight.abs().sum(0), hidden.abs().sum(0))
    for exact, left_out, bound in zip(*results, bounds, strict=True):
        assert ((exact - left_out).abs() <= tolerance / 20 * bound + 1e-12).all()
    return float((results[0][0] - results[1][0]).abs().max())


@pytest.mark.parametrize("tolerance", [1e-6, 1e-2])
def test_what_grad_tolerance_leaves_out_is_within_the_bound(run, tolerance):
    assert max(run(check_tolerance, tolerance)) > 0, "nothing was left out"


def check_linear_stats(shards, backend):
    hidden, weight, bias = draw()
    target, mask = torch.tensor([[0, 12, 29], [15, 7, -100]]), torch.tensor([[1, 1, 1], [0, 1, 0]])
    options = {"mask": mask, "softcap": 4.0, "temperature": 0.8, "backend": backend}
    upstream = torch.randn(4, 2, 3)
    results = []
    for sharded in (False, True):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        if sharded:
            leaves[1:] = (own(x, shards, 0) for x in leaves[1:])
        given = {**options, "process_group": group() if sharded else None}
        stats = linear_token_stats(*leaves[:2], target, bias=leaves[2], extra=EXTRA, chunk_size=2, **given)
        sum((field * g).sum() for field, g in zip(stats[:4], upstream, strict=True)).backward()
        entropy = linear_token_entropy(*leaves[:2], bias=leaves[2], **given)
        results.append((stats, entropy, [leaf.grad for leaf in leaves]))
    (whole, entropy, gradients), (stats, shared_entropy, parts) = results
    torch.testing.assert_close(tuple(stats), tuple(whole), rtol=3e-6, atol=3e-6)
    torch.testing.assert_close(shared_entropy, entropy, rtol=3e-6, atol=3e-6)
    for i, (part, gradient) in enumerate(zip(parts, gradients, strict=True)):
        expected = gradient if i == 0 else gradient.split(shards, 0)[dist.get_rank()]
        torch.testing.assert_close(part, expected, rtol=1e-5, atol=1e-5)
    same_on_every_rank(parts[0])


def test_statistics_of_hidden_states(run, backend):
    run(check_linear_stats, backend)


# --------------------------------------------------------------------------------------------------- how it is called


def count_collectives(shards):
    hidden, weight, bias = (x.requires_grad_() for x in draw())
    w, b = own(weight, shards, 0), own(bias, shards, 0)
    target, logits = torch.zeros(2, 3, dtype=torch.int64), own(torch.randn(2, 3, VOCAB), shards)
    calls = {
        "loss": lambda: entropy_loss(logits, process_group=group()),
        "stats": lambda: token_stats(logits, process_group=group()).entropy.sum(),
        "stats with targets": lambda: token_stats(logits, target, process_group=group()).logprob.sum(),
        "linear loss, 1 chunk": lambda: linear_entropy_loss(hidden, w, bias=b, process_group=group()),
        "linear loss, 3 chunks": lambda: linear_entropy_loss(hidden, w, chunk_size=2, process_group=group()),
        "linear none, 3 chunks": lambda: linear_entropy_loss(
            hidden, w, chunk_size=2, reduction="none", process_group=group()
        ).sum(),
        "frozen hidden": lambda: linear_entropy_loss(hidden.detach(), w, process_group=group()),
    }
    counted = {}
    for name, call in calls.items():
        with Collectives() as forward:
            loss = call()
        with Collectives() as backward:
            loss.backward()
        counted[name] = len(forward), len(backward)
    return counted


def test_the_collectives_are_counted(run):
    for counted in run(count_collectives):
        assert counted == {
            "loss": (1, 0),
            "stats": (1, 0),
            "stats with targets": (2, 0),
            "linear loss, 1 chunk": (2, 0),
            "linear loss, 3 chunks": (4, 0),
            "linear none, 3 chunks": (3, 1),
            "frozen hidden": (1, 0),
        }


def check_modules(shards):
    logits = torch.randn(2, 3, VOCAB)
    module = EntropyLoss(temperature=0.5)
    torch.testing.assert_close(module(own(logits, shards), process_group=group()), module(logits))
    hidden, weight, bias = draw()
    module = LinearEntropyLoss(temperature=0.5)
    shared = module(hidden, own(weight, shards, 0), None, own(bias, shards, 0), process_group=group())
    torch.testing.assert_close(shared, module(hidden, weight, None, bias))


def test_modules(run):
    run(check_modules)


def check_compiled(shards):
    torch._dynamo.reset()
    hidden, weight, _ = draw()
    functions = {
        "loss": (lambda z: entropy_loss(z, temperature=0.7, process_group=group()), own(torch.randn(4, VOCAB), shards)),
        "linear": (lambda w: linear_entropy_loss(hidden, w, process_group=group()), own(weight, shards, 0)),
    }
    for name, (function, leaf) in functions.items():
        results = []
        for call in (function, torch.compile(function, fullgraph=True, backend="aot_eager")):
            leaf.grad = None
            value = call(leaf)
            value.backward()
            results.append((value.detach(), leaf.grad))
        torch.testing.assert_close(results[1], results[0], msg=name)


def test_compiles_whole(worlds):
    worlds.of(2).run(check_compiled, (11, 19))
