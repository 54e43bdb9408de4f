"""DTensors of every placement: worked on in parts, locally or gathered, or an error that says what to do."""

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from em_kernels import (
    entropy_loss,
    linear_entropy_loss,
    linear_token_stats,
    token_entropy,
    token_stats,
)

VOCAB = 31  # Not even: 16 columns on the first of two ranks, 15 on the second.
WHOLE, VOCABULARY, TOKENS, TIME = Replicate(), Shard(-1), Shard(0), Shard(1)


@pytest.fixture
def run(worlds):
    return worlds.of(2).run


def mesh_of(*shape: int):
    return init_device_mesh("cpu", shape)


def whole(values: Tensor) -> Tensor:
    return values.full_tensor() if isinstance(values, DTensor) else values


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(whole(actual.detach()), expected.detach(), rtol=3e-6, atol=3e-6)


# -------------------------------------------------------------------------------------------------------------- logits


def check_logits(shape, placements):
    mesh, logits = mesh_of(*shape), torch.randn(2, 3, VOCAB)
    mask, target = torch.tensor([[1, 0, 1], [1, 1, 1]]), torch.randint(0, VOCAB, (2, 3))
    results = []
    for distributed in (False, True):
        leaf = distribute_tensor(logits, mesh, placements) if distributed else logits.clone()
        leaf.requires_grad_()
        stats = token_stats(leaf, target, mask=mask, temperature=0.7)
        (entropy_loss(leaf, mask) + stats.logprob.sum() + stats.lse.sum()).backward()
        entropy = token_entropy(leaf, mask)
        results.append((entropy_loss(leaf, mask), *stats[:4], entropy, leaf.grad))
    for actual, expected in zip(results[1], results[0], strict=True):
        close(actual, expected)
    assert results[1][-1].placements == leaf.placements


@pytest.mark.parametrize(
    ("shape", "placements"),
    [
        ((2,), [VOCABULARY]),
        ((2,), [Shard(2)]),
        ((2,), [WHOLE]),
        ((1, 2), [WHOLE, VOCABULARY]),
        ((1, 2), [TOKENS, VOCABULARY]),
        ((2, 1), [VOCABULARY, WHOLE]),
    ],
    ids=str,
)
def test_logits(run, shape, placements):
    run(check_logits, shape, placements)


def check_tokens(placement):
    """Logits that are sharded along the tokens: each rank has the loss and the statistics of its own."""
    mesh, logits = mesh_of(2), torch.randn(2, 4, VOCAB)
    mask, temperature = torch.randint(0, 2, (2, 4)).bool(), torch.rand(2, 4) + 0.5
    of_rank = lambda values: distribute_tensor(values, mesh, [placement])  # noqa: E731
    plain = logits.clone().requires_grad_()
    expected = entropy_loss(plain, mask, temperature=temperature, num_items_in_batch=6)
    expected.backward()
    per_token = token_stats(logits, mask=mask, temperature=temperature).varentropy
    # A value per token lies as the tokens do, as a DTensor or as this rank's part.
    for part in (of_rank, lambda values: of_rank(values).to_local()):
        leaf = of_rank(logits).requires_grad_()
        options = {"mask": part(mask), "temperature": part(temperature)}
        loss = entropy_loss(leaf, num_items_in_batch=6, **options)
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        close(total, expected)
        close(leaf.grad, plain.grad)
        close(token_stats(leaf, **options).varentropy, of_rank(per_token).to_local())
    with pytest.raises(ValueError, match="expected num_items_in_batch=, the number of all ranks' tokens"):
        entropy_loss(of_rank(logits))
    with pytest.raises(
        ValueError, match=r"mask is a DTensor with placements .*Replicate.*, expected those of the tokens"
    ):
        entropy_loss(of_rank(logits), distribute_tensor(mask, mesh, [WHOLE]), reduction="sum")
    with pytest.raises(ValueError, match=r"mask is a DTensor with placements .*, expected no DTensor"):
        entropy_loss(logits, of_rank(mask))
    with pytest.raises(ValueError, match=r"mask has shape \(2, 4\), expected logits.shape\[:-1\]"):
        entropy_loss(of_rank(logits), mask, reduction="sum")


@pytest.mark.parametrize("placement", [TOKENS, TIME], ids=str)
def test_logits_sharded_along_the_tokens(run, placement):
    run(check_tokens, placement)


def check_bad_logits():
    logits = torch.randn(2, 3, 32)
    with pytest.raises(ValueError, match=r"logits has placements .*Partial.* redistribute it first"):
        entropy_loss(DTensor.from_local(logits, mesh_of(2), [Partial()]))
    with pytest.raises(ValueError, match="its vocabulary over 2 mesh dimensions; expected one at most"):
        entropy_loss(distribute_tensor(logits, mesh_of(1, 2), [VOCABULARY, VOCABULARY]))
    with pytest.raises(ValueError, match="logits is a DTensor, whose placements name the ranks"):
        entropy_loss(distribute_tensor(logits, mesh_of(2), [VOCABULARY]), process_group=dist.group.WORLD)


def test_logits_that_cannot_work(run):
    run(check_bad_logits)


@pytest.mark.parametrize("group", ["world", 0, True])
def test_a_process_group_that_is_none(group):
    with pytest.raises(TypeError, match=r"process_group is a \w+, expected a torch.distributed.ProcessGroup"):
        entropy_loss(torch.zeros(2, 3), process_group=group)


# ------------------------------------------------------------------------------------------------------- hidden states


def draw():
    return torch.randn(2, 4, 8), torch.randn(VOCAB, 8), torch.randn(VOCAB)


def check_operands(shape, hidden_placements, weight_placements):
    mesh, operands = mesh_of(*shape), draw()
    plain = [x.clone().requires_grad_() for x in operands]
    expected = linear_entropy_loss(*plain[:2], bias=plain[2], reduction="sum")
    expected.backward()
    leaves = [
        distribute_tensor(x, mesh, placements).requires_grad_()
        for x, placements in zip(operands, (hidden_placements, weight_placements, weight_placements), strict=True)
    ]
    loss = linear_entropy_loss(*leaves[:2], bias=leaves[2], reduction="sum")
    loss.backward()
    total = loss.detach().clone()
    if any(placement.is_shard() for placement in hidden_placements):
        dist.all_reduce(total)
    close(total, expected)
    for leaf, exact in zip(leaves, plain, strict=True):
        assert leaf.grad.placements == leaf.placements
        close(leaf.grad, exact.grad)
    statistics = linear_token_stats(*leaves[:2], bias=leaves[2]).entropy
    per_token = linear_token_stats(*operands[:2], bias=operands[2]).entropy
    close(statistics, distribute_tensor(per_token, mesh, hidden_placements).to_local())


@pytest.mark.parametrize(
    ("shape", "hidden", "weight"),
    [
        ((2,), [WHOLE], [Shard(0)]),
        ((2,), [WHOLE], [WHOLE]),
        ((2,), [TOKENS], [Shard(0)]),
        ((2,), [TIME], [Shard(0)]),
        ((2,), [TOKENS], [WHOLE]),
        ((1, 2), [WHOLE, WHOLE], [WHOLE, Shard(0)]),
        ((2, 1), [TOKENS, WHOLE], [WHOLE, Shard(0)]),
        ((2, 1), [TOKENS, WHOLE], [Shard(0), WHOLE]),
    ],
    ids=str,
)
def test_operands(run, shape, hidden, weight):
    run(check_operands, shape, hidden, weight)


def check_bad_operands():
    hidden, weight, bias = draw()
    mesh = mesh_of(2)
    at = lambda values, *placements: distribute_tensor(values, mesh, placements)  # noqa: E731
    rows = at(weight, Shard(0))
    group = mesh.get_group()
    for call, message in (
        (lambda: linear_entropy_loss(hidden, rows), r"tensor parallelism.* process_group=.*FSDP.* weight.full_tensor"),
        (lambda: linear_entropy_loss(at(hidden, WHOLE), at(weight, Shard(1))), "each rank a part of D"),
        (lambda: linear_entropy_loss(at(hidden, Shard(2)), weight), "each rank a part of D"),
        (lambda: linear_entropy_loss(at(hidden, WHOLE), rows, bias=bias), "bias has placements no DTensor, expected"),
        (lambda: linear_entropy_loss(at(hidden, WHOLE), rows, bias=at(bias, WHOLE)), "expected those of weight"),
        (lambda: linear_entropy_loss(at(hidden, WHOLE), rows, process_group=group), "expected process_group=None"),
        (lambda: linear_entropy_loss(DTensor.from_local(hidden, mesh, [Partial()]), rows), "Partial is not summed yet"),
        (lambda: linear_entropy_loss(at(hidden, TOKENS), rows), "expected num_items_in_batch="),
        (
            lambda: linear_entropy_loss(distribute_tensor(hidden, mesh_of(1, 2), [WHOLE, WHOLE]), rows),
            "two device meshes",
        ),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    with pytest.raises(TypeError, match="bias is a DTensor and weight is not"):
        linear_entropy_loss(hidden, weight, bias=at(bias, WHOLE))
    # What the first message advises works.
    expected = linear_entropy_loss(hidden, weight)
    close(linear_entropy_loss(hidden, rows, process_group=group), expected)
    close(linear_entropy_loss(hidden, rows.full_tensor()), expected)
    close(linear_entropy_loss(hidden, at(weight, WHOLE)), expected)


def test_operands_that_cannot_work(run):
    run(check_bad_operands)
