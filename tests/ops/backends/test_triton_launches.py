"""How many kernels a call launches, ours and PyTorch's, counted with launchers that launch nothing."""

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

pytest.importorskip("triton")

from em_kernels import entropy_loss, token_entropy, token_stats
from em_kernels.ops import autograd
from em_kernels.ops.backends import triton
from em_kernels.ops.backends.triton import launch

# What only allocates, or looks at the same memory in another way. Operators that are made of others are not counted.
LAUNCH_NOTHING = {"empty", "empty_strided", "view", "detach", "alias", "expand", "as_strided", "select", "resolve_neg"}


class Fake:
    """A kernel that only writes its name down."""

    def __init__(self, name: str, launched: list[str]) -> None:
        self.name, self.launched = name, launched

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launched.append(self.name)


@pytest.fixture
def launched(monkeypatch) -> list[str]:
    names: list[str] = []
    monkeypatch.setattr(triton, "_interpreted", lambda: True)
    for name in vars(launch):
        if name.endswith("_kernel"):
            monkeypatch.setattr(launch, name, Fake(name, names))
    return names


def torch_launches(run) -> list[str]:
    """The operators that a call comes down to, without those that launch nothing."""
    with profile(activities=[ProfilerActivity.CPU]) as recorded:
        run()
    events = [event for event in recorded.events() if event.name.startswith("aten::")]
    parents = {id(event.cpu_parent) for event in events if event.cpu_parent is not None}
    leaves = [event.name.removeprefix("aten::") for event in events if id(event) not in parents]
    return [name for name in leaves if name not in LAUNCH_NOTHING]


def test_the_count_sees_copies():
    assert torch_launches(lambda: torch.randn(4, 6).t().contiguous()) == ["normal_", "copy_"]


def backward(loss: torch.Tensor, logits: torch.Tensor, upstream: torch.Tensor) -> None:
    torch.autograd.grad(loss, logits, upstream)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("inplace_backward", [False, True])
def test_the_mean_loss_with_its_gradient(launched, monkeypatch, masked, inplace_backward):
    # The host cannot see the upstream gradient of a GPU.
    monkeypatch.setattr(autograd, "host_sees", lambda _: False)
    logits = torch.randn(64, 512, requires_grad=True)
    mask = torch.rand(64) < 0.5 if masked else None
    one = torch.ones(())

    def run() -> None:
        leaf = logits.view_as(logits) if inplace_backward else logits
        loss = entropy_loss(leaf, mask, backend="triton", inplace_backward=inplace_backward)
        backward(loss, logits, one)

    of_torch = torch_launches(run)
    assert launched == ["entropy_gradient_kernel", "scale_kernel"]
    # The counters.
    assert of_torch == ["zero_"]


def test_statistics_of_rows_that_are_not_split(launched):
    logits = torch.randn(64, 512)
    of_torch = torch_launches(lambda: token_entropy(logits, backend="triton"))
    assert launched == ["partial_sums_kernel"]
    assert of_torch == []


def test_statistics_of_rows_that_are_split_and_their_gradient(launched):
    logits = torch.randn(2, 50_000, requires_grad=True)
    upstream = torch.ones(2)

    def run() -> None:
        stats = token_stats(logits, torch.tensor([1, 2]), backend="triton")
        backward(stats.logprob, logits, upstream)

    torch_launches(run)
    assert launched == ["partial_sums_kernel", "finish_kernel", "coefficients_kernel", "row_gradient_kernel"]
