"""The contract over generated inputs: shapes, dtypes, strides, temperatures, masks and extreme values."""

from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from oracles import assert_entropy, assert_gradient, reference_loss

from em_kernels import entropy_loss

# A run of the interpreter takes 50 ms, of the others 1 ms.
EXAMPLES = {"pytorch": 150, "pytorch off cpu": 150, "compiled": 150, "triton": 25}


@st.composite
def cases(draw) -> dict[str, Any]:
    """One call: logits with their strides, and options."""
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
        "logits": logits.to(draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))),
        "mask": {"none": None, "bool": weights > 0, "int": (weights > 0).long(), "weights": weights}[mask],
        "temperature": temperature,
        "reduction": draw(st.sampled_from(["mean", "sum", "none"])),
    }


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_loss_and_gradient_match_the_reference(implementation):
    @settings(max_examples=EXAMPLES[implementation.name], deadline=None, suppress_health_check=list(HealthCheck))
    @given(case=cases())
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
