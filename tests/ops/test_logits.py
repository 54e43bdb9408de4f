"""The operators under the machinery that users put around them: compilers, checkers, autocast, data parallelism."""

import os

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
import torch.multiprocessing as mp
from opchecks import opcheck_loss
from torch import nn

from em_kernels import entropy_loss, token_entropy, token_stats
from em_kernels.ops import logits as operators
from em_kernels.ops.backend import implementation as implementation_of
from em_kernels.ops.sharded import Place
from em_kernels.ops.types import Temperature, Wanted

SAMPLES = {
    "plain": (None, None, 1.3, None, Wanted()),
    "mask and target": ("mask", None, 1.0, "target", Wanted(second_moment=True)),
    "row temperature": (None, "temperature", 1.0, None, Wanted(second_moment=True, extra=True)),
}


@pytest.fixture
def rows(implementation):
    """Per-row arguments for logits of (2, 3, 20)."""
    values = {
        "mask": torch.tensor([True, False, True, True, True, False]),
        "temperature": torch.rand(6) + 0.5,
        "target": torch.randint(0, 20, (6,)),
    }
    return {None: None, **{name: value.to(implementation.device) for name, value in values.items()}}


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_row_statistics(implementation, rows, sample, requires_grad):
    mask, temperature, common, target, wanted = SAMPLES[sample]
    logits = torch.randn(2, 3, 20, device=implementation.device, requires_grad=requires_grad)
    torch.library.opcheck(
        operators._row_statistics_op,
        (logits, rows[mask], rows[temperature], common, rows[target], *wanted, implementation.backend, ""),
    )


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_entropy_with_gradient(implementation, rows, requires_grad):
    device = implementation.device
    logits = torch.randn(2, 3, 20, device=device, requires_grad=requires_grad)
    for weight, divisor, temperature in (
        (None, None, None),
        (rows["mask"], torch.tensor(4.0, device=device), None),
        (torch.rand(6, device=device), torch.tensor(2.5, device=device), rows["temperature"]),
    ):
        inputs = (logits, weight, divisor, 3, temperature, 0.7, requires_grad, implementation.backend)
        opcheck_loss(operators._entropy_with_gradient_op, inputs)


def test_opcheck_row_gradient(implementation, rows):
    logits = torch.randn(2, 3, 20, device=implementation.device)
    _, saved = implementation_of(implementation.backend).row_statistics(
        logits, rows["mask"], Temperature(common=0.7), rows["target"], Wanted(second_moment=True)
    )
    upstream = torch.randn(4, 6, device=implementation.device)
    for used in ((True,) * 4, (True, False, False, False), (False, False, True, False)):
        gradients = [g if u else None for g, u in zip(upstream, used, strict=True)]
        torch.library.opcheck(
            operators._row_gradient_op,
            (logits, saved.planes, rows["target"], gradients, implementation.backend, ""),
        )


FUNCTIONS = {
    "mean": lambda z, mask, t, backend: entropy_loss(z, mask, temperature=t, backend=backend) * 2,
    "sum": lambda z, mask, t, backend: entropy_loss(z, temperature=t, reduction="sum", backend=backend),
    "none": lambda z, mask, t, backend: (
        entropy_loss(z, mask, temperature=t, reduction="none", backend=backend) ** 2
    ).sum(),
    "shifted": lambda z, mask, t, backend: entropy_loss(z[:, :-1], mask[:, 1:], temperature=t, backend=backend),
    "inplace": lambda z, mask, t, backend: entropy_loss(z * 1.0, mask, inplace_backward=True, backend=backend),
    "token_stats": lambda z, mask, t, backend: sum(
        field.sum()
        for field in token_stats(z, mask.long(), mask=mask, temperature=t, backend=backend)
        if field is not None
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_compiles_whole_with_dynamic_shapes(fresh_compiler, name, backend):
    # aot_eager traces as inductor does, and does not depend on a C++ compiler.
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    for batch, time in ((2, 3), (2, 5), (3, 7), (4, 9)):
        logits = torch.randn(batch, time, 40, device=device)
        mask = torch.rand(batch, time, device=device) < 0.7
        eager_leaf, compiled_leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        expected = FUNCTIONS[name](eager_leaf, mask, 0.7, backend)
        actual = compiled(compiled_leaf, mask, 0.7, backend)
        expected.backward()
        actual.backward()
        torch.testing.assert_close(actual, expected)
        torch.testing.assert_close(compiled_leaf.grad, eager_leaf.grad)
    # One for the first shape, one when the time turns out to change, one for the batch.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("backend", [None, "native"])
def test_compiles_whole_on_the_cpu_by_its_number(fresh_compiler, backend):
    compiled = torch.compile(
        lambda logits: entropy_loss(logits.to("cpu:0"), backend=backend), fullgraph=True, backend="eager"
    )
    logits = torch.randn(3, 40)
    assert torch.equal(compiled(logits), entropy_loss(logits, backend=backend))


def test_compiles_where_the_number_of_tokens_depends_on_data(fresh_compiler):
    logits, mask = torch.randn(6, 40), torch.tensor([True, False, True, True, False, True])
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True, capture_scalar_outputs=True):
        compiled = torch.compile(lambda logits, mask: entropy_loss(logits[mask]), backend="eager")
        torch.testing.assert_close(compiled(logits, mask), entropy_loss(logits, mask))


def test_compiles_with_inductor(fresh_compiler):
    logits = torch.randn(3, 5, 40)
    leaf, other = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    torch.compile(FUNCTIONS["none"], fullgraph=True)(leaf, torch.ones(3, 5), 0.7, "torch").backward()
    FUNCTIONS["none"](other, torch.ones(3, 5), 0.7, "torch").backward()
    torch.testing.assert_close(leaf.grad, other.grad)


@pytest.mark.parametrize("name", ["mean", "none", "token_stats"])
def test_a_new_temperature_does_not_recompile(fresh_compiler, name):
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    logits, mask = torch.randn(2, 3, 40), torch.ones(2, 3, dtype=torch.bool)
    for temperature in (1.0, 0.7, 0.6, 0.5, 0.4, 0.3):
        leaf = logits.clone().requires_grad_()
        loss = compiled(leaf, mask, temperature, "torch")
        torch.testing.assert_close(loss, FUNCTIONS[name](logits, mask, temperature, "torch"))
    # The first is taken for a constant, the second shows that it is not.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


def test_traces_on_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        logits = torch.empty(2, 3, 50, requires_grad=True)
        loss = entropy_loss(logits, torch.ones(2, 3))
        assert loss.shape == ()
        assert token_entropy(logits).shape == (2, 3)


def test_autocast(implementation):
    logits = torch.randn(4, 50, device=implementation.device)
    expected = entropy_loss(logits, backend=implementation.backend)
    with torch.autocast(implementation.device, dtype=torch.bfloat16):
        weight = torch.randn(50, 8, device=implementation.device, requires_grad=True)
        hidden = torch.randn(4, 8, device=implementation.device)
        assert torch.equal(entropy_loss(logits, backend=implementation.backend), expected)
        low = hidden @ weight.T
        assert low.dtype == torch.bfloat16
        implementation.skip_dtype(low.dtype)
        loss = entropy_loss(low, backend=implementation.backend)
    assert loss.dtype == torch.float32
    loss.backward()
    assert weight.grad.isfinite().all()


def test_checkpointing_recomputes_the_gradient(implementation):
    logits = torch.randn(4, 50, device=implementation.device, requires_grad=True)
    expected = torch.autograd.grad(entropy_loss(logits, backend=implementation.backend), logits)[0]
    loss = torch.utils.checkpoint.checkpoint(
        lambda z: entropy_loss(z, backend=implementation.backend), logits, use_reentrant=False
    )
    assert torch.equal(torch.autograd.grad(loss, logits)[0], expected)


def _train_one_step(rank: int, world: int, folder: str, results) -> None:
    os.environ.pop("PYTEST_XDIST_WORKER", None)
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=world)
    torch.manual_seed(0)
    head = nn.parallel.DistributedDataParallel(nn.Linear(8, 50))
    hidden = torch.randn(world, 4, 8)[rank]
    entropy_loss(head(hidden)).backward()
    results[rank] = head.module.weight.grad
    dist.destroy_process_group()


def test_data_parallel_gradients_are_the_average_of_the_ranks(tmp_path):
    world = 2
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(_train_one_step, (world, str(tmp_path), results), nprocs=world)
        by_rank = [results[rank] for rank in range(world)]
    torch.manual_seed(0)
    head = nn.Linear(8, 50)
    entropy_loss(head(torch.randn(world, 4, 8))).backward()
    assert torch.equal(by_rank[0], by_rank[1])
    torch.testing.assert_close(by_rank[0], head.weight.grad)


def test_a_target_that_does_not_exist_makes_its_row_nan(implementation):
    # Where the values cannot be looked at first, as on a GPU: the public function refuses such a target on the CPU.
    logits = torch.randn(1, 2, 30, device=implementation.device, requires_grad=True)
    target = torch.tensor([30, 3], device=implementation.device)
    statistics = operators.row_statistics(
        logits, None, Temperature(), target, Wanted(second_moment=True), Place(implementation.backend)
    )
    statistics.logprob.sum().backward()
    for field in statistics[:4]:
        assert field.isnan().tolist() == [True, False]
    assert logits.grad[0, 0].isnan().any()
    assert not logits.grad[0, 1].isnan().any()
