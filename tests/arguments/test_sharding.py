"""DTensors: what each placement means, gradients that are DTensors again, and errors that say what to do instead."""

import functools
import re
from typing import Any, NamedTuple

import pytest
import torch
from oracles import assert_entropy, assert_gradient, reference_loss, reference_stats
from ranks import run_on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import _StridedShard

import em_kernels
from em_kernels import (
    EntropyLoss,
    LinearEntropyLoss,
    entropy_loss,
    linear_entropy_loss,
    linear_token_stats,
    token_stats,
)


class Spread(NamedTuple):
    """A tensor that a rank makes a DTensor of, on the mesh of the call unless another one is named."""

    tensor: Tensor
    placements: list[Placement]
    mesh: tuple[int, ...] | None = None


class Answer(NamedTuple):
    """What a rank has to say: its results, and of each operand the whole gradient and its placements."""

    results: list[Tensor | None]
    gradients: list[Tensor | None]
    placements: list[Any]


@functools.cache
def mesh_of(shape: tuple[int, ...]) -> DeviceMesh:
    return init_device_mesh("cpu", shape)


def made(value: Any, mesh: DeviceMesh) -> Any:
    if not isinstance(value, Spread):
        return value
    mesh = mesh if value.mesh is None else mesh_of(value.mesh)
    if all(type(placement) in (Shard, Replicate) for placement in value.placements):
        return distribute_tensor(value.tensor, mesh, value.placements)
    return DTensor.from_local(value.tensor, mesh, value.placements)


def arguments_of(operands, options, mesh: DeviceMesh) -> tuple[list[Any], dict[str, Any]]:
    """The arguments of a call as this rank gives them; `group_of` is a dimension of the mesh."""
    options = {key: made(value, mesh) for key, value in options.items()}
    if "group_of" in options:
        options["process_group"] = mesh.get_group(options.pop("group_of"))
    return [made(operand, mesh) for operand in operands], options


def on_rank(name: str, operands, options, upstream, mesh) -> Answer:
    operands, options = arguments_of(operands, options, mesh_of(mesh))
    leaves = [x.requires_grad_() for x in (*operands, options.get("bias")) if x is not None]
    found = getattr(em_kernels, name)(*operands, **options)
    results = [r for r in (found if isinstance(found, tuple) else [found]) if r is not None]
    assert not any(isinstance(result, DTensor) for result in results)
    sum((result * made(upstream, mesh_of(mesh))).sum() for result in results).backward()
    gradients = [leaf.grad for leaf in leaves]
    return Answer(
        [result.detach() for result in results],
        [g.full_tensor() if isinstance(g, DTensor) else g for g in gradients],
        [g.placements if isinstance(g, DTensor) else None for g in gradients],
    )


def call(function, *operands, mesh=(2,), upstream=1.0, **options) -> list[Answer]:
    return run_on_ranks(2, on_rank, function.__name__, operands, options, upstream, mesh)


def refused_on_rank(name: str, message: str, operands, options, mesh) -> None:
    operands, options = arguments_of(operands, options, mesh_of(mesh))
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        getattr(em_kernels, name)(*operands, **options)


def refuses(message: str, function, *operands, mesh=(2,), **options) -> None:
    run_on_ranks(2, refused_on_rank, function.__name__, message, operands, options, mesh)


def as_distributed(placements: list[Placement], dims: int) -> tuple[Placement, ...]:
    """The placements as a DTensor has them, its dimensions counted from the front."""
    return tuple(Shard(p.dim % dims) if isinstance(p, Shard) else p for p in placements)


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(len(shape)))


SHAPE, VOCAB = (3, 5), 23
LOGITS = random(*SHAPE, VOCAB) * 3
MASK = (random(*SHAPE).abs() - 0.3).clamp(min=0)
TARGET = torch.arange(15).reshape(SHAPE)
TEMPERATURE = random(*SHAPE).abs() + 0.5
HIDDEN, WEIGHT, BIAS = random(*SHAPE, 8), random(VOCAB, 8), random(VOCAB)


# --------------------------------------------------------------------------------------------------------------- logits


@pytest.mark.parametrize(
    ("mesh", "placements"),
    [
        ((2,), [Shard(-1)]),
        ((2,), [Shard(2)]),
        ((2,), [Replicate()]),
        ((1, 2), [Shard(0), Shard(2)]),
        ((1, 2), [Replicate(), Shard(-1)]),
        ((2, 1), [Shard(2), Replicate()]),
    ],
    ids=str,
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_with_every_token_on_every_rank(mesh, placements, reduction):
    items = {"num_items_in_batch": 5} if reduction == "mean" else {}
    expected, gradient = reference_loss(LOGITS, MASK, reduction=reduction, **items)
    first, second = call(entropy_loss, Spread(LOGITS, placements), mask=MASK, mesh=mesh, reduction=reduction, **items)
    for answer in (first, second):
        assert_entropy(answer.results[0], expected)
        assert_gradient(answer.gradients[0], gradient, torch.float32)
        assert answer.placements == [as_distributed(placements, 3)]
    assert torch.equal(first.results[0], second.results[0])


def test_the_mean_of_whole_tokens_needs_no_number_of_them():
    expected, gradient = reference_loss(LOGITS, MASK)
    for answer in call(entropy_loss, Spread(LOGITS, [Shard(-1)]), mask=Spread(MASK, [Replicate()])):
        assert_entropy(answer.results[0], expected)
        assert_gradient(answer.gradients[0], gradient, torch.float32)


@pytest.mark.parametrize("vocab", [1, 2])
def test_a_rank_may_have_one_column_or_none(vocab):
    expected, gradient = reference_loss(LOGITS[..., :vocab])
    for answer in call(entropy_loss, Spread(LOGITS[..., :vocab], [Shard(-1)])):
        assert_entropy(answer.results[0], expected)
        assert_gradient(answer.gradients[0], gradient, torch.float32)


TOKENS_OVER_RANKS = [
    ((2,), [Shard(0)], 0),
    ((2,), [Shard(1)], 1),
    ((2, 1), [Shard(0), Shard(2)], 0),
    ((1, 2), [Replicate(), Shard(-2)], 1),
]


@pytest.mark.parametrize(("mesh", "placements", "dim"), TOKENS_OVER_RANKS, ids=str)
def test_each_rank_has_the_loss_of_its_own_tokens(mesh, placements, dim):
    logits = Spread(LOGITS, placements)
    mask = Spread(MASK, [p if p == Shard(dim) else Replicate() for p in as_distributed(placements, 3)])
    expected, gradient = reference_loss(LOGITS, MASK, reduction="none")
    answers = call(entropy_loss, logits, mask=mask, mesh=mesh, reduction="none")
    assert_entropy(torch.cat([answer.results[0] for answer in answers], dim), expected)
    for answer in answers:
        assert_gradient(answer.gradients[0], gradient, torch.float32)
        assert answer.placements == [as_distributed(placements, 3)]

    expected, gradient = reference_loss(LOGITS, MASK, num_items_in_batch=7)
    answers = call(entropy_loss, logits, mask=mask, mesh=mesh, num_items_in_batch=7)
    assert_entropy(sum(answer.results[0] for answer in answers), expected)
    assert_gradient(answers[0].gradients[0], gradient, torch.float32)


@pytest.mark.parametrize(("mesh", "placements", "dim"), TOKENS_OVER_RANKS, ids=str)
def test_each_rank_has_the_statistics_of_its_own_tokens(mesh, placements, dim):
    placements = as_distributed(placements, 3)
    of_tokens = [p if p == Shard(dim) else Replicate() for p in placements]
    expected, gradient = reference_stats(LOGITS, TARGET, MASK, [torch.ones(SHAPE)] * 4, TEMPERATURE)
    options = {"mask": Spread(MASK, of_tokens), "temperature": Spread(TEMPERATURE, of_tokens)}
    answers = call(token_stats, Spread(LOGITS, placements), target=Spread(TARGET, of_tokens), mesh=mesh, **options)
    for i in range(4):
        found = torch.cat([answer.results[i] for answer in answers], dim)
        torch.testing.assert_close(found.double(), expected[i], rtol=2e-6, atol=1e-5)
    assert_gradient(answers[0].gradients[0], gradient, torch.float32, scale=4 / TEMPERATURE)


def test_the_number_of_all_ranks_tokens_may_be_a_sum_that_is_not_summed_yet():
    # As of a mask that lies as the tokens do: (mask != 0).sum() of a DTensor.
    expected, _ = reference_loss(LOGITS, num_items_in_batch=15)
    items = Spread(torch.tensor(7.5), [Partial()])
    answers = call(entropy_loss, Spread(LOGITS, [Shard(0)]), num_items_in_batch=items)
    assert_entropy(sum(answer.results[0] for answer in answers), expected)


def of_a_gather_under_way(logits) -> tuple[Tensor, Tensor]:
    leaf = distribute_tensor(logits, mesh_of((2,)), [Shard(0)]).requires_grad_()
    loss = entropy_loss(leaf.redistribute(placements=[Replicate()], async_op=True))
    loss.backward()
    return loss.detach(), leaf.grad.full_tensor()


def test_logits_that_are_still_being_gathered():
    expected, gradient = reference_loss(LOGITS)
    for loss, found in run_on_ranks(2, of_a_gather_under_way, LOGITS):
        assert type(loss) is Tensor
        assert_entropy(loss, expected)
        assert_gradient(found, gradient, torch.float32)


def test_inplace_backward():
    _, gradient = reference_loss(LOGITS)
    answers = call(entropy_loss, Spread(LOGITS, [Shard(-1)]), inplace_backward=True)
    assert_gradient(answers[1].gradients[0], gradient, torch.float32)


@pytest.mark.parametrize(
    ("placements", "message"),
    [
        ([Partial()], "logits has placements (Partial(sum),), expected Shard and Replicate: redistribute it first"),
        ([_StridedShard(2, split_factor=2)], "expected Shard and Replicate: redistribute it first"),
    ],
    ids=["partial", "strided"],
)
def test_placements_of_logits_that_cannot_work(placements, message):
    refuses(message, entropy_loss, Spread(LOGITS, placements))
    refuses(message, token_stats, Spread(LOGITS, placements))


def test_a_vocabulary_over_two_mesh_dimensions():
    message = "the vocabulary over 2 mesh dimensions; expected one at most: redistribute the others to Replicate()"
    refuses(message, entropy_loss, Spread(LOGITS, [Shard(2), Shard(2)]), mesh=(1, 2))


@pytest.mark.parametrize("placements", [[Shard(0)], [Shard(1)]], ids=str)
def test_a_mean_over_the_tokens_of_one_rank(placements):
    message = "expected num_items_in_batch=, the number of all ranks' tokens, or reduction='sum' or 'none'"
    refuses(message, entropy_loss, Spread(LOGITS, placements))
    refuses(message, linear_entropy_loss, Spread(HIDDEN, placements), WEIGHT)


@pytest.mark.parametrize("name", ["mask", "target", "temperature"])
def test_values_per_token_that_lie_otherwise_than_the_tokens(name):
    value = {"mask": MASK, "target": TARGET, "temperature": TEMPERATURE}[name]
    logits, hidden = Spread(LOGITS, [Shard(0)]), Spread(HIDDEN, [Shard(0)])
    message = f"{name} has placements (Replicate(),) on"
    refuses(message, token_stats, logits, **{name: Spread(value, [Replicate()])})
    refuses(message, linear_token_stats, hidden, WEIGHT, **{name: Spread(value, [Replicate()])})
    message = f"{name} is a DTensor and the tensor of its tokens is not one; expected a plain tensor"
    refuses(message, token_stats, LOGITS, **{name: Spread(value, [Shard(0)])})
    if name != "target":
        refuses(message, entropy_loss, LOGITS, **{name: Spread(value, [Shard(0)])})
        refuses(message, linear_entropy_loss, HIDDEN, WEIGHT, **{name: Spread(value, [Shard(0)])})


def test_the_other_mesh_of_a_mask():
    placements = [Shard(0), Replicate()]
    message = "expected those of the tokens, (Shard(dim=0), Replicate()) on DeviceMesh"
    refuses(message, token_stats, Spread(LOGITS, placements, (2, 1)), mask=Spread(MASK, placements, (1, 2)))


def test_a_process_group_beside_a_dtensor():
    message = "logits is a DTensor, whose placements name the ranks; expected process_group=None"
    refuses(message, entropy_loss, Spread(LOGITS, [Shard(-1)]), group_of=0)


@pytest.mark.parametrize("given", ["0", 0, [0, 1]], ids=repr)
def test_process_groups_of_another_type(given):
    message = f"process_group is a {type(given).__name__}, expected a torch.distributed.ProcessGroup"
    with pytest.raises(TypeError, match=message):
        entropy_loss(LOGITS, process_group=given)
    with pytest.raises(TypeError, match=message):
        linear_token_stats(HIDDEN, WEIGHT, process_group=given)
    with pytest.raises(TypeError, match=message):
        EntropyLoss()(LOGITS, process_group=given)
    with pytest.raises(TypeError, match=message):
        LinearEntropyLoss()(HIDDEN, WEIGHT, process_group=given)


# -------------------------------------------------------------------------------------------------------- hidden states


def exact_gradients(g: Tensor) -> list[Tensor]:
    """Of hidden states, weight and bias, from that of the logits."""
    rows = g.reshape(-1, VOCAB)
    return [g @ WEIGHT.double(), rows.T @ HIDDEN.double().reshape(-1, HIDDEN.shape[-1]), rows.sum(0)]


def check_linear(
    hidden: list[Placement] | None,
    weight: list[Placement] | None,
    expected: list[list[Placement] | None],
    *,
    mesh: tuple[int, ...] = (2,),
    tokens: int | None = None,
    **options: Any,
) -> None:
    """Losses and gradients of operands with these placements, None for a plain tensor, against the reference.

    Args:
        hidden, weight: how the hidden states and weight and bias lie.
        expected: how the gradients of hidden states and of weight and bias lie.
        mesh: the shape of the device mesh.
        tokens: the dimension of the tokens of which each rank has a part, None where it has all.
    """
    logits = HIDDEN.double() @ WEIGHT.double().T + BIAS.double()
    h = HIDDEN if hidden is None else Spread(HIDDEN, hidden)
    w, b = (WEIGHT, BIAS) if weight is None else (Spread(WEIGHT, weight), Spread(BIAS, weight))
    of_tokens = None if hidden is None else [p if isinstance(p, Shard) and p.dim < 2 else Replicate() for p in hidden]
    mask = MASK if of_tokens is None else Spread(MASK, of_tokens)
    target = TARGET if of_tokens is None else Spread(TARGET, of_tokens)

    def check_gradients(answers: list[Answer], gradient: Tensor) -> None:
        for answer in answers:
            for found, exact in zip(answer.gradients, exact_gradients(gradient), strict=True):
                torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=2e-6 * float(exact.abs().amax()))
            of_hidden, of_weight = (None if p is None else tuple(p) for p in expected)
            assert answer.placements == [of_hidden, of_weight, of_weight]

    options["mesh"] = mesh
    loss, gradient = reference_loss(logits, MASK, num_items_in_batch=7)
    answers = call(linear_entropy_loss, h, w, mask=mask, bias=b, num_items_in_batch=7, **options)
    losses = [answer.results[0] for answer in answers]
    assert_entropy(losses[0] if tokens is None else sum(losses), loss)
    check_gradients(answers, gradient)

    fields, gradient = reference_stats(logits, TARGET, MASK, [torch.ones(SHAPE)] * 4)
    answers = call(linear_token_stats, h, w, target=target, mask=mask, bias=b, **options)
    for i in range(4):
        parts = [answer.results[i] for answer in answers]
        found = parts[0] if tokens is None else torch.cat(parts, tokens)
        torch.testing.assert_close(found.double(), fields[i], rtol=2e-6, atol=1e-5)
    check_gradients(answers, gradient)


@pytest.mark.parametrize(
    ("mesh", "hidden", "weight"),
    [
        ((2,), [Replicate()], [Shard(0)]),
        ((2,), [Replicate()], [Replicate()]),
        ((1, 2), [Shard(0), Replicate()], [Replicate(), Shard(0)]),
        ((1, 2), [Replicate(), Replicate()], [Replicate(), Shard(0)]),
    ],
    ids=str,
)
def test_hidden_states_with_every_token_on_every_rank(mesh, hidden, weight):
    check_linear(hidden, weight, [hidden, weight], mesh=mesh)


@pytest.mark.parametrize(
    ("mesh", "hidden", "weight", "tokens"),
    [
        ((2,), [Shard(0)], [Replicate()], 0),
        ((2,), [Shard(1)], [Replicate()], 1),
        # As FSDP stores a weight: in parts, and every rank has tokens of its own.
        ((2,), [Shard(0)], [Shard(0)], 0),
        ((2,), [Shard(1)], [Shard(0)], 1),
        ((2, 1), [Shard(0), Replicate()], [Replicate(), Shard(0)], 0),
        ((2, 1), [Shard(0), Replicate()], [Shard(0), Shard(0)], 0),
    ],
    ids=str,
)
def test_a_weight_that_ranks_use_for_tokens_of_their_own(mesh, hidden, weight, tokens):
    check_linear(hidden, weight, [hidden, weight], mesh=mesh, tokens=tokens)


def test_a_plain_weight_and_hidden_states_of_each_ranks_own():
    expected, _ = reference_loss(HIDDEN.double() @ WEIGHT.double().T, reduction="none")
    answers = call(linear_entropy_loss, Spread(HIDDEN, [Shard(1)]), WEIGHT, reduction="none")
    assert_entropy(torch.cat([answer.results[0] for answer in answers], 1), expected)
    # Of its own tokens, as in data parallelism.
    _, gradient = reference_loss(HIDDEN.double() @ WEIGHT.double().T)
    of_weight = sum(answer.gradients[1].double() for answer in answers) / 15
    torch.testing.assert_close(of_weight, exact_gradients(gradient)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("mesh", "weight", "group_of"), [((2,), [Shard(0)], 0), ((1, 2), [Replicate(), Shard(0)], 1)], ids=str
)
def test_plain_hidden_states_and_the_group_of_a_weight_in_parts(mesh, weight, group_of):
    check_linear(None, weight, [None, weight], mesh=mesh, group_of=group_of)


def test_plain_hidden_states_and_a_replicated_weight():
    check_linear(None, [Replicate()], [None, [Replicate()]])


def test_a_weight_in_parts_leaves_two_cases():
    for function in (linear_entropy_loss, linear_token_stats):
        for case in (
            "(tensor parallelism), pass process_group=weight.device_mesh.get_group(0)",
            "(FSDP), pass weight.full_tensor(grad_placements=[Partial()])",
        ):
            refuses(case, function, HIDDEN, Spread(WEIGHT, [Shard(0)]))


def as_the_error_says(hidden, weight) -> tuple[Tensor, Tensor]:
    """The second case: plain hidden states of this rank's own, and a weight that is only stored in parts."""
    own = hidden.chunk(2)[torch.distributed.get_rank()]
    weight = distribute_tensor(weight, mesh_of((2,)), [Shard(0)]).requires_grad_()
    loss = linear_entropy_loss(own, weight.full_tensor(grad_placements=[Partial()]), num_items_in_batch=15)
    loss.backward()
    assert weight.grad.placements == (Shard(0),)
    return loss.detach(), weight.grad.full_tensor()


def test_what_the_error_says_of_a_weight_that_is_stored_in_parts():
    expected, gradient = reference_loss(HIDDEN.double() @ WEIGHT.double().T)
    answers = run_on_ranks(2, as_the_error_says, HIDDEN, WEIGHT)
    assert_entropy(sum(loss for loss, _ in answers), expected)
    torch.testing.assert_close(answers[0][1].double(), exact_gradients(gradient)[1], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("hidden", "weight", "message"),
    [
        ([Partial()], [Shard(0)], "hidden has placements (Partial(sum),), expected Shard and Replicate"),
        ([Shard(2)], [Shard(0)], "hidden has placements (Shard(dim=2),), each rank a part of D; expected whole hidden"),
        (
            [Replicate()],
            [Shard(1)],
            "weight has placements (Shard(dim=1),), each rank a part of D; expected whole rows",
        ),
        (None, [Shard(1)], "weight has placements (Shard(dim=1),), each rank a part of D; expected whole rows"),
        ([Replicate()], [Partial()], "weight has placements (Partial(sum),), expected Shard and Replicate"),
        ([Replicate()], [_StridedShard(0, split_factor=2)], "expected Shard and Replicate: redistribute it first"),
    ],
    ids=str,
)
def test_placements_of_operands_that_cannot_work(hidden, weight, message):
    hidden = HIDDEN if hidden is None else Spread(HIDDEN, hidden)
    refuses(message, linear_entropy_loss, hidden, Spread(WEIGHT, weight), num_items_in_batch=1)


@pytest.mark.parametrize("hidden", [None, [Replicate(), Replicate()]], ids=str)
def test_rows_over_two_mesh_dimensions(hidden):
    hidden = HIDDEN if hidden is None else Spread(HIDDEN, hidden)
    message = "weight has placements (Shard(dim=0), Shard(dim=0)), the vocabulary over 2 mesh dimensions"
    group = {"group_of": 1} if isinstance(hidden, Tensor) else {}
    refuses(message, linear_entropy_loss, hidden, Spread(WEIGHT, [Shard(0), Shard(0)]), mesh=(1, 2), **group)


@pytest.mark.parametrize(
    ("weight", "bias", "message"),
    [
        ([Shard(0)], [Replicate()], "bias has placements (Replicate(),), expected those of weight, (Shard(dim=0),)"),
        ([Shard(0)], None, "bias has placements none, it is no DTensor, expected those of weight, (Shard(dim=0),)"),
        (None, [Shard(0)], "bias is a DTensor and weight is not, expected both or neither"),
    ],
    ids=str,
)
def test_a_bias_lies_as_the_weight_does(weight, bias, message):
    weight = WEIGHT if weight is None else Spread(WEIGHT, weight)
    bias = BIAS if bias is None else Spread(BIAS, bias)
    refuses(message, linear_entropy_loss, Spread(HIDDEN, [Replicate()]), weight, bias=bias)


def test_operands_on_two_meshes():
    weight = Spread(WEIGHT, [Replicate(), Shard(0)], mesh=(1, 2))
    refuses("expected one device mesh", linear_entropy_loss, Spread(HIDDEN, [Replicate()]), weight)


def test_process_groups_that_do_not_fit_the_operands():
    refuses(
        "hidden and weight are DTensors, which name the ranks; expected process_group=None",
        linear_entropy_loss,
        Spread(HIDDEN, [Replicate()]),
        Spread(WEIGHT, [Shard(0)]),
        group_of=0,
    )
    refuses(
        "weight has placements (Replicate(),)", linear_entropy_loss, HIDDEN, Spread(WEIGHT, [Replicate()]), group_of=0
    )
    refuses(
        "its rows not over the ranks of process_group",
        linear_entropy_loss,
        HIDDEN,
        Spread(WEIGHT, [Replicate(), Shard(0)]),
        mesh=(1, 2),
        group_of=0,
    )
    refuses(
        "hidden has placements (Shard(dim=1),), other tokens on each rank of process_group",
        linear_entropy_loss,
        Spread(HIDDEN, [Shard(1)]),
        WEIGHT,
        group_of=0,
    )


def compiled_message(operands: list[Any], name: str) -> str:
    mesh = mesh_of((2,))
    function = torch.compile(getattr(em_kernels, name), fullgraph=True, backend="eager")
    with pytest.raises(Exception, match=r"placements torch.compile cannot read") as caught:
        function(*(made(operand, mesh) for operand in operands))
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "operands", "named"),
    [
        ("entropy_loss", [Spread(torch.randn(3, 30), [Shard(1)])], "logits"),
        ("linear_entropy_loss", [Spread(torch.randn(3, 8), [Replicate()]), torch.randn(30, 8)], "hidden"),
        ("linear_entropy_loss", [torch.randn(3, 8), Spread(torch.randn(30, 8), [Shard(0)])], "weight"),
    ],
)
def test_the_compiler_refuses_dtensors_and_says_what_to_pass(name, operands, named):
    for message in run_on_ranks(2, compiled_message, operands, name):
        assert f"{named} is a DTensor" in message
