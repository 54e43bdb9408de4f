"""The contract over generated inputs: shapes, dtypes, strides, temperatures, masks and extreme values."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracles import assert_entropy, assert_gradient, reference_loss

from em_kernels import entropy_loss, linear_entropy_loss
from em_kernels.ops import backend

# A run of the interpreter takes 50 ms, of the others 1 ms.
EXAMPLES = {"torch": 150, "torch off cpu": 150, "native": 150, "triton": 25}


@st.composite
def cases(draw, dtypes) -> dict[str, Any]:
    """One call: logits of one of the dtypes, with their strides, and options."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(5,), (1,), (2, 3), (3, 1), (2, 2, 2), (0,)]))
    vocab = draw(st.one_of(st.integers(1, 40), st.sampled_from([127, 128, 129, 1000, 4097])))
    logits = torch.randn(*shape, vocab, generator=generator) * draw(st.sampled_from([0.0, 1e-3, 1.0, 5.0, 30.0]))
    logits += draw(st.sampled_from([0.0, -1e4, 1e4, 37.5]))
    banned = torch.rand(logits.shape, generator=generator) < draw(st.sampled_from([0.0, 0.0, 0.5, 0.99]))
    banned[..., 0] = False
    logits[banned] = -torch.inf
    layout = draw(st.sampled_from(["contiguous", "padded rows", "columns first"]))
    if layout == "padded rows":
        logits = torch.cat([logits, logits], dim=-1)[..., :vocab]
    elif layout == "columns first":
        logits = logits.movedim(-1, 0).contiguous().movedim(0, -1)
    mask = draw(st.sampled_from(["none", "bool", "int", "weights"]))
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
    temperature = draw(st.sampled_from([0.1, 0.5, 1.0, 2.5, 50.0, "per token"]))
    if temperature == "per token":
        temperature = torch.rand(shape, generator=generator) * 3 + 0.1
    return {
        "logits": logits.to(draw(st.sampled_from(dtypes))),
        "mask": {"none": None, "bool": weights > 0, "int": (weights > 0).long(), "weights": weights}[mask],
        "temperature": temperature,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_loss_and_gradient_match_the_reference(implementation):
    device = torch.device(implementation.device)
    every = (torch.float32, torch.bfloat16, torch.float16)
    dtypes = [dtype for dtype in every if not backend.unavailable_reason(implementation.backend, device, dtype)]

    @settings(max_examples=EXAMPLES[implementation.name], deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases(dtypes))
    def check(case):
        options = {key: case[key] for key in ("temperature", "reduction")}
        expected, expected_gradient = reference_loss(case["logits"], case["mask"], **options)
        on_device = {k: v.to(implementation.device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        logits = on_device.pop("logits").detach().requires_grad_()
        loss = entropy_loss(logits, backend=implementation.backend, **on_device)
        loss.sum().backward()
        assert_entropy(loss, expected)
        assert_gradient(logits.grad, expected_gradient, logits.dtype)

    check()


@st.composite
def linear_cases(draw) -> dict[str, Any]:
    """One call of the linear loss, with logits that are exact in float32."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1)))
    shape = draw(st.sampled_from([(5,), (1,), (2, 3), (0,), (300,)]))
    vocab, dim = draw(st.one_of(st.integers(1, 40), st.sampled_from([129, 1000]))), draw(st.integers(1, 40))
    weights = torch.rand(shape, generator=generator) * (torch.rand(shape, generator=generator) < 0.7)
    temperature = draw(st.sampled_from([0.5, 2.5, 50.0, "per token"]))
    banned = torch.rand(vocab, generator=generator) < draw(st.sampled_from([0.0, 0.5]))
    banned[0] = False
    return {
        "hidden": torch.randint(-8, 9, (*shape, dim), generator=generator) / 8,
        "weight": torch.randint(-16, 17, (vocab, dim), generator=generator) / 8,
        "bias": draw(st.sampled_from([None, torch.where(banned, -torch.inf, 0.5)])),
        "mask": draw(st.sampled_from([None, weights > 0, weights])),
        "temperature": torch.rand(shape, generator=generator) * 3 + 0.1 if temperature == "per token" else temperature,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
        "chunk_size": draw(st.sampled_from([None, 1, 4, 129])),
    }


def test_linear_loss_and_gradients_match_the_reference(implementation):
    @settings(max_examples=EXAMPLES[implementation.name], deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=linear_cases())
    def check(case):
        hidden, weight, bias = (case[k] for k in ("hidden", "weight", "bias"))
        z = hidden.double() @ weight.double().T + (0.0 if bias is None else bias.double())
        expected, g = reference_loss(z, case["mask"], temperature=case["temperature"], reduction=case["reduction"])
        on_device = {k: v.to(implementation.device) if isinstance(v, torch.Tensor) else v for k, v in case.items()}
        leaves = [on_device.pop(k).requires_grad_() for k in ("hidden", "weight")]
        loss = linear_entropy_loss(*leaves, backend=implementation.backend, **on_device)
        loss.sum().backward()
        assert_entropy(loss, expected)
        g, h = g.reshape(-1, g.shape[-1]), hidden.double().reshape(-1, hidden.shape[-1])
        largest = g.abs().amax(-1, keepdim=True).expand_as(g)
        for leaf, exact, size, terms in (
            (leaves[0], g @ weight.double(), largest @ weight.double().abs(), g.shape[1]),
            (leaves[1], g.T @ h, largest.T @ h.abs(), g.shape[0]),
        ):
            error = (leaf.grad.cpu().double().reshape(exact.shape) - exact).abs()
            # A BLAS may add the terms of a product one after another, and then its rounding errors walk at random.
            assert (error <= (1e-6 + 1.2e-7 * terms**0.5) * size + 1e-30).all()

    check()
