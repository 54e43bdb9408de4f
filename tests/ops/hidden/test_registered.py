"""The linear operators under compilers and checkers."""

import pytest
import torch
import torch._dynamo
from opchecks import opcheck_loss

from em_kernels import linear_entropy_loss, linear_token_stats
from em_kernels.ops.hidden import matmul, registered


@pytest.fixture
def operands(implementation):
    device = implementation.device
    return {
        "hidden": torch.randn(6, 8, device=device, requires_grad=True),
        "weight": torch.randn(20, 8, device=device, requires_grad=True),
        "bias": torch.randn(20, device=device, requires_grad=True),
        "mask": torch.tensor([True, False, True, True, True, False], device=device),
        "temperature": torch.rand(6, device=device) + 0.5,
        "target": torch.randint(0, 20, (6,), device=device),
        "divisor": torch.tensor(4.0, device=device),
    }


@pytest.mark.parametrize("needs", [(True, True, True), (True, False, False), (False, True, False)], ids=str)
@pytest.mark.parametrize("extras", [False, True])
def test_opcheck_entropy_with_gradient(implementation, operands, extras, needs):
    o = {k: v.detach() if k in ("hidden", "weight", "bias") and not needed else v
         for (k, v), needed in zip(operands.items(), (*needs, *[True] * 4), strict=True)}  # fmt: skip
    if extras:
        rest = (o["bias"], 5.0, torch.float32, o["mask"], o["divisor"], 1, o["temperature"], 1.0, 4, 1e-3, 4)
    else:
        needs = (*needs[:2], False)
        rest = (None, None, torch.float32, None, None, 3, None, 0.7, 100, 0.0, None)
    opcheck_loss(registered._entropy_op, (o["hidden"], o["weight"], *rest, list(needs), implementation.backend, ""))


@pytest.mark.parametrize("extras", [False, True])
def test_opcheck_row_statistics(implementation, operands, extras):
    o = operands
    if extras:
        wanted = (True, True)
        rest = (o["bias"], 5.0, torch.float32, o["mask"], o["temperature"], 1.0, o["target"], *wanted, 4, 0.0, 4)
    else:
        rest = (None, None, torch.float32, None, None, 0.7, None, False, False, 100, 0.0, None)
    torch.library.opcheck(registered._statistics_op, (o["hidden"], o["weight"], *rest, implementation.backend, ""))


def test_opcheck_row_gradient(implementation, operands):
    o = {k: v.detach() for k, v in operands.items()}
    head = (o["weight"], o["bias"], None, torch.float32)
    *_, saved = registered._statistics_op(
        o["hidden"], *head, o["mask"], None, 0.7, o["target"], True, False, 4, 0.0, None, implementation.backend, ""
    )
    upstream = torch.randn(4, 6, device=implementation.device)
    for used in ((True,) * 4, (True, False, False, False)):
        grads = [g if u else None for g, u in zip(upstream, used, strict=True)]
        torch.library.opcheck(
            registered._gradients_op,
            (o["hidden"], *head, saved, o["target"], grads, 4, 0.0, 4, [True] * 3, implementation.backend, ""),
        )


FUNCTIONS = {
    "mean": lambda h, w, mask, t, backend: linear_entropy_loss(h, w, mask, temperature=t, backend=backend) * 2,
    "tolerance": lambda h, w, mask, t, backend: linear_entropy_loss(
        h, w, mask.float(), temperature=t, grad_tolerance=1e-2, softcap=9.0, backend=backend
    ),
    "none": lambda h, w, mask, t, backend: (
        linear_entropy_loss(h, w, mask, temperature=t, reduction="none", backend=backend) ** 2
    ).sum(),
    "linear_token_stats": lambda h, w, mask, t, backend: sum(
        field.sum()
        for field in linear_token_stats(h, w, mask.long(), mask=mask, temperature=t, backend=backend)
        if field is not None
    ),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("backend", ["torch", "native", "triton"])
def test_compiles_whole_with_dynamic_shapes(fresh_compiler, name, backend):
    compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    weight = torch.randn(40, 8, device=device)
    for batch, time, temperature in ((2, 3, 0.7), (2, 5, 0.7), (3, 7, 0.6), (4, 9, 0.5), (5, 11, 0.4)):
        hidden, mask = torch.randn(batch, time, 8, device=device), torch.rand(batch, time, device=device) < 0.7
        results = []
        for function in (FUNCTIONS[name], compiled):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            loss = function(*leaves, mask, temperature, backend)
            loss.backward()
            results.append((loss, *(leaf.grad for leaf in leaves)))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
    # One for the first shape, one when the time turns out to change, one for the batch and the temperature.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_token_counts_that_the_compiler_does_not_see_through(fresh_compiler, reduction):
    def loss(hidden, weight, mask, count):
        return linear_entropy_loss(hidden, weight, mask, token_count=count, reduction=reduction)

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    weight = torch.randn(40, 8)
    for kept in (2, 4, 3, 5):
        hidden, mask = torch.randn(6, 8), torch.arange(6) < kept
        results = []
        for function in (loss, compiled):
            leaves = [x.clone().requires_grad_() for x in (hidden, weight)]
            value = function(*leaves, mask, kept)
            value.sum().backward()
            results.append((value, *(leaf.grad for leaf in leaves)))
        for expected, actual in zip(*results, strict=True):
            torch.testing.assert_close(actual, expected)
        # A wrong one is an error where the mask is seen.
        with pytest.raises(ValueError, match=f"token_count is {kept + 1}, expected {kept}, the number of tokens whose"):
            loss(hidden, weight, mask, kept + 1)
        assert compiled(hidden, weight, mask, kept + 1).isnan().all()
    # With gradients one for the first count and one for any, without them one for any.
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_matmuls_of_16_bits_keep_their_float32(dtype):
    gradient, h = torch.randn(256, 512, device="cuda", dtype=dtype), torch.randn(256, 64, device="cuda", dtype=dtype)
    weight = torch.randn(512, 64, device="cuda", dtype=dtype)
    total = torch.randn(512, 64, device="cuda")
    # Rows as they lie in the scratch, and a total that has something in it.
    logits = torch.empty(256, 576, device="cuda")[:, :512]
    matmul.project(h, weight, None, out=logits)
    expected_total = total.double() + gradient.double().T @ h.double()
    matmul.transposed_product(gradient, h, total, add=True)
    product, first_total = torch.empty(256, 64, device="cuda"), torch.full_like(total, float("nan"))
    matmul.product(gradient, weight, product)
    matmul.transposed_product(gradient, h, first_total, add=False)
    for actual, expected in (
        (logits, h.double() @ weight.double().T),
        (product, gradient.double() @ weight.double()),
        (total, expected_total),
        (first_total, gradient.double().T @ h.double()),
    ):
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-3)
