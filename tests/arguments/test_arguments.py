"""Every mistake a caller can make gets an error that names the argument, what was given and what is accepted."""

import pytest
import torch

from em_kernels import entropy_loss, linear_entropy_loss, linear_token_stats, token_entropy, token_stats
from em_kernels.ops import backend as backends
from em_kernels.ops.backends import triton

LOGITS = torch.zeros(4, 16, 30)


@pytest.mark.parametrize("function", [entropy_loss, token_stats, token_entropy])
@pytest.mark.parametrize(
    ("logits", "error", "message"),
    [
        ([[1.0]], TypeError, "logits is a list, expected a torch.Tensor"),
        (
            torch.zeros(2, 3, dtype=torch.int64),
            TypeError,
            "logits has dtype torch.int64, expected one of torch.float32",
        ),
        (torch.zeros(()), ValueError, r"logits has shape \(\), expected \(..., V\)"),
        (torch.zeros(3, 0), ValueError, r"logits has shape \(3, 0\), expected \(..., V\) with V at least 1"),
    ],
    ids=["list", "integers", "scalar", "empty vocabulary"],
)
def test_logits(function, logits, error, message):
    with pytest.raises(error, match=message):
        function(logits)


@pytest.mark.parametrize("function", [entropy_loss, token_stats, token_entropy])
@pytest.mark.parametrize(
    ("mask", "error", "message"),
    [
        (
            torch.ones(4, 12),
            ValueError,
            r"mask has shape \(4, 12\), expected logits.shape\[:-1\] = \(4, 16\)",
        ),
        (torch.ones(4, 16, dtype=torch.complex64), TypeError, "mask has dtype torch.complex64, expected bool"),
        (torch.full((4, 16), -0.5), ValueError, r"mask has a negative weight \(-0.5\), expected weights of at least 0"),
        ([1, 1], TypeError, "mask is a list, expected a torch.Tensor"),
        (torch.ones(4, 16, device="meta"), ValueError, "mask is on meta, expected the device of logits, cpu"),
    ],
    ids=["shape", "complex", "negative", "list", "device"],
)
def test_mask(function, mask, error, message):
    with pytest.raises(error, match=message):
        function(LOGITS, mask=mask)


@pytest.mark.parametrize("function", [entropy_loss, token_stats, token_entropy])
@pytest.mark.parametrize(
    ("temperature", "error", "message"),
    [
        (0.0, ValueError, "temperature is 0.0, expected a value above 0"),
        (-1, ValueError, "temperature is -1, expected a value above 0"),
        (float("nan"), ValueError, "temperature is nan, expected a value above 0"),
        (float("inf"), ValueError, "temperature is inf, expected a value above 0"),
        (1e-39, ValueError, "temperature is 1e-39, expected a value above 0"),
        (1e39, ValueError, "temperature is 1e\\+39, expected a value above 0"),
        ("1", TypeError, "temperature is a str, expected a float"),
        (True, TypeError, "temperature is a bool, expected a float"),
        (torch.ones(5), ValueError, r"temperature has shape \(5,\), expected one that broadcasts to .* = \(4, 16\)"),
        (torch.tensor([1.0] * 15 + [-2.0]), ValueError, "temperature has -2, expected values above 0"),
        (torch.tensor([float("inf")] + [1.0] * 15), ValueError, "temperature has inf, expected values above 0"),
        (torch.tensor(float("nan")), ValueError, "temperature has nan, expected values above 0"),
        (torch.tensor(1j), TypeError, "temperature has dtype torch.complex64, expected a float or integer dtype"),
        (torch.tensor(True), TypeError, "temperature has dtype torch.bool, expected a float or integer dtype"),
    ],
    ids=[
        "zero",
        "negative",
        "nan",
        "inf",
        "too small",
        "too large",
        "str",
        "bool",
        "shape",
        "negative in a tensor",
        "inf in a tensor",
        "nan tensor",
        "complex tensor",
        "bool tensor",
    ],
)
def test_temperature(function, temperature, error, message):
    with pytest.raises(error, match=message):
        function(LOGITS, temperature=temperature)


@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (
            torch.zeros(4, 15, dtype=torch.int64),
            ValueError,
            r"target has shape \(4, 15\), expected logits.shape\[:-1\]",
        ),
        (torch.zeros(4, 16), TypeError, "target has dtype torch.float32, expected an integer dtype"),
        (
            torch.zeros(4, 16, dtype=torch.bool),
            TypeError,
            "target has dtype torch.bool, expected an integer dtype; a mask is given as mask=",
        ),
        (torch.full((4, 16), 30), ValueError, r"target has 30 where it is not masked, expected values in \[0, 30\)"),
        (
            torch.full((4, 16), -100),
            ValueError,
            r"target has -100 where it is not masked, expected values in \[0, 30\); .* with mask=target != -100",
        ),
        (7, TypeError, "target is a int, expected a torch.Tensor"),
    ],
    ids=["shape", "float", "bool", "too large", "negative", "int"],
)
def test_target(target, error, message):
    with pytest.raises(error, match=message):
        token_stats(LOGITS, target)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reduction": "avg"}, ValueError, "reduction is 'avg', expected one of 'mean', 'sum', 'none'"),
        ({"num_items_in_batch": -1}, ValueError, "num_items_in_batch is -1, expected at least 0"),
        ({"num_items_in_batch": torch.tensor(-2)}, ValueError, "num_items_in_batch is -2, expected at least 0"),
        (
            {"num_items_in_batch": 2.5},
            TypeError,
            "num_items_in_batch is a float, expected an int or a tensor of one element",
        ),
        (
            {"num_items_in_batch": True},
            TypeError,
            "num_items_in_batch is a bool, expected an int or a tensor of one element",
        ),
        ({"num_items_in_batch": torch.ones(2)}, ValueError, r"num_items_in_batch has shape \(2,\), expected an int"),
        (
            {"num_items_in_batch": 3, "reduction": "sum"},
            ValueError,
            "num_items_in_batch is the divisor of reduction='mean', given with reduction='sum'",
        ),
    ],
    ids=[
        "reduction",
        "negative items",
        "negative tensor of items",
        "float items",
        "bool items",
        "items shape",
        "items with a sum",
    ],
)
def test_options_of_the_loss(options, error, message):
    with pytest.raises(error, match=message):
        entropy_loss(LOGITS, **options)


HIDDEN, WEIGHT = torch.zeros(4, 16, 8), torch.zeros(30, 8)
MASK = torch.arange(64).view(4, 16) < 4


@pytest.mark.parametrize("function", [linear_entropy_loss, linear_token_stats])
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"hidden": [1.0]}, TypeError, "hidden is a list, expected a torch.Tensor"),
        ({"hidden": torch.zeros(())}, ValueError, r"hidden has shape \(\), expected \(..., D\)"),
        ({"weight": torch.zeros(30, 9)}, ValueError, r"weight has shape \(30, 9\), expected \(V, 8\)"),
        ({"weight": torch.zeros(30)}, ValueError, r"weight has shape \(30,\), expected \(V, 8\)"),
        ({"weight": torch.zeros(0, 8)}, ValueError, r"weight has shape \(0, 8\), expected \(V, 8\) with V at least 1"),
        ({"weight": None}, TypeError, "weight is a NoneType, expected a torch.Tensor"),
        (
            {"weight": WEIGHT.bfloat16()},
            TypeError,
            r"weight has dtype torch.bfloat16 and hidden torch.float32, .* weight.to\(hidden.dtype\)",
        ),
        ({"weight": WEIGHT.to("meta")}, ValueError, "weight is on meta, expected the device of hidden, cpu"),
        ({"bias": torch.zeros(8)}, ValueError, r"bias has shape \(8,\), expected \(V,\) = \(30,\)"),
        ({"bias": torch.zeros(30).half()}, TypeError, "bias has dtype torch.float16 and hidden torch.float32"),
        ({"mask": torch.ones(4)}, ValueError, r"mask has shape \(4,\), expected hidden.shape\[:-1\] = \(4, 16\)"),
        ({"temperature": 0.0}, ValueError, "temperature is 0.0, expected a value above 0"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0, expected a finite number above 0, or None"),
        ({"softcap": "x"}, TypeError, "softcap is a str, expected a float"),
        ({"softcap": True}, TypeError, "softcap is a bool, expected a float"),
        ({"chunk_size": 0}, ValueError, "chunk_size is 0, expected at least 1, or None"),
        ({"chunk_size": 2.5}, TypeError, "chunk_size is a float, expected an int, or None"),
        ({"mask": MASK, "token_count": -1}, ValueError, "token_count is -1, expected 0 to 64, the number of tokens"),
        ({"mask": MASK, "token_count": 65}, ValueError, "token_count is 65, expected 0 to 64, the number of tokens"),
        ({"mask": MASK, "token_count": True}, TypeError, "token_count is a bool, expected an int, or None"),
        ({"mask": MASK, "token_count": 4.0}, TypeError, "token_count is a float, expected an int, or None"),
        (
            {"mask": MASK, "token_count": torch.tensor(4)},
            TypeError,
            "token_count is a Tensor, expected an int, or None",
        ),
        (
            {"mask": MASK, "token_count": 5},
            ValueError,
            "token_count is 5, expected 4, the number of tokens whose mask is not 0, or None",
        ),
        ({"token_count": 5}, ValueError, "token_count is 5 without a mask, expected 64, the number of tokens, or None"),
        (
            {"logits_dtype": torch.bfloat16},
            ValueError,
            "logits_dtype is torch.bfloat16, expected None or torch.float32",
        ),
        ({"logits_dtype": "float32"}, ValueError, "logits_dtype is 'float32', expected None or torch.float32"),
        ({"backend": "tpu"}, ValueError, "backend='tpu' cannot run here"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_linear_functions(function, options, error, message):
    with pytest.raises(error, match=message):
        function(**{"hidden": HIDDEN, "weight": WEIGHT, **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grad_tolerance": -1e-6}, "grad_tolerance is -1e-06, expected a finite number of at least 0"),
        ({"reduction": "avg"}, "reduction is 'avg', expected one of 'mean', 'sum', 'none'"),
        ({"num_items_in_batch": -1}, "num_items_in_batch is -1, expected at least 0"),
    ],
)
def test_options_of_the_linear_loss(options, message):
    with pytest.raises(ValueError, match=message):
        linear_entropy_loss(HIDDEN, WEIGHT, **options)


def test_grad_tolerance_that_is_no_number():
    with pytest.raises(TypeError, match="grad_tolerance is a NoneType, expected a float"):
        linear_entropy_loss(HIDDEN, WEIGHT, grad_tolerance=None)


def test_target_of_the_linear_statistics():
    with pytest.raises(ValueError, match=r"target has 30 where it is not masked, expected values in \[0, 30\)"):
        linear_token_stats(HIDDEN, WEIGHT, torch.full((4, 16), 30))


@pytest.mark.parametrize("function", [entropy_loss, token_stats, token_entropy])
@pytest.mark.parametrize(
    ("backend", "message"),
    [
        ("tpu", "backend='tpu' cannot run here: there is no such backend; accepted are 'triton', 'native', 'torch'"),
    ],
)
def test_backends_that_cannot_run(function, backend, message):
    with pytest.raises(ValueError, match=message):
        function(LOGITS, backend=backend)


def test_triton_says_why_it_cannot_run():
    cpu = torch.device("cpu")
    assert "logits are float64" in str(backends.unavailable_reason("triton", cpu, torch.float64))
    if not triton._interpreted():
        assert "logits are on cpu" in str(backends.unavailable_reason("triton", cpu))


def test_triton_is_not_chosen_where_it_would_be_interpreted(monkeypatch):
    def refuse(*_):
        raise AssertionError("Triton was chosen for tensors on the CPU")

    monkeypatch.setattr(backends.implementation("triton"), "row_statistics", refuse)
    token_entropy(LOGITS)


def test_values_that_a_device_would_have_to_be_asked_for_are_not_looked_at():
    # On the meta device there are none: a check that looked would fail.
    logits = LOGITS.to("meta")
    weights = torch.ones(4, 16, device="meta")
    assert entropy_loss(logits, weights, temperature=weights).shape == ()
