"""What only a GPU can show: programs that run at once, offsets beyond 32 bits, CUDA graphs, synchronisation, memory."""

import pytest
import reference
import torch
from oracles import assert_entropy, assert_gradient, reference_loss

from em_kernels import entropy_loss, linear_entropy_loss, linear_token_stats, token_entropy, token_stats

pytestmark = pytest.mark.gpu

GIB = 1 << 30


def train(logits, **options):
    loss = entropy_loss(logits, backend="triton", **options)
    loss.sum().backward()
    return loss.detach()


def test_more_than_2_31_elements():
    rows, vocab = 16_500, 131_072
    if torch.cuda.mem_get_info()[0] < 12 * GIB:
        pytest.skip("needs 12 GiB of free memory")
    logits = torch.empty(rows, vocab, dtype=torch.bfloat16, device="cuda")
    for chunk in logits.split(1024):
        chunk.normal_(std=3.0)
    # The last rows, beyond 2^31 elements.
    last = logits[-2:].clone()
    expected, expected_gradient = reference_loss(last, reduction="none")
    logits.requires_grad_()
    entropy = token_entropy(logits, backend="triton")
    assert_entropy(entropy[-2:], expected)
    train(logits, reduction="sum", inplace_backward=True)
    assert_gradient(logits.grad[-2:], expected_gradient, torch.bfloat16)
    logits.grad = None
    with torch.no_grad():
        logits[-2:] = last
    stats = token_stats(logits, torch.zeros(rows, dtype=torch.int64, device="cuda"), backend="triton")
    (gradient,) = torch.autograd.grad(stats.entropy[-2:].sum(), logits)
    assert_gradient(gradient[-2:], expected_gradient, torch.bfloat16)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("rows", [2, 300], ids=["few rows: all sums first", "many rows: lagged"])
def test_captured_in_a_cuda_graph(reduction, rows):
    logits = torch.randn(rows, 50_000, device="cuda", requires_grad=True)
    mask = torch.rand(rows, device="cuda") < 0.7
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            logits.grad = None
            train(logits, mask=mask, reduction=reduction)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    logits.grad = None
    with torch.cuda.graph(graph):
        loss = train(logits, mask=mask, reduction=reduction)
    for share in (0.2, 0.5, 1.0):
        # The divisor of a mean is the sum of the mask as it is at the replay, not as it was at the capture.
        mask.copy_(torch.rand(rows, device="cuda") < share)
        mask[0] = True
        with torch.no_grad():
            logits.normal_()
        graph.replay()
        expected, expected_gradient = reference_loss(logits, mask, reduction=reduction)
        assert_entropy(loss, expected)
        assert_gradient(logits.grad, expected_gradient, torch.float32)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("kind", ["no mask", "bool", "int64", "float32"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_no_synchronisation(reduction, kind, dtype):
    logits = torch.randn(4, 50, 1000, device="cuda", dtype=dtype, requires_grad=True)
    mask = None if kind == "no mask" else torch.ones(4, 50, device="cuda").to(getattr(torch, kind))
    items = torch.tensor(150.0, device="cuda") if reduction == "mean" else None
    temperature = torch.ones(4, 1, device="cuda")
    target = torch.zeros(4, 50, dtype=torch.int64, device="cuda")
    for mode in ("default", "error"):  # the first time compiles, which may wait
        torch.cuda.set_sync_debug_mode(mode)
        try:
            train(logits, mask=mask, reduction=reduction)
            train(logits[:, :-1], temperature=temperature, reduction=reduction, num_items_in_batch=items)
            stats = token_stats(logits, target, mask=mask, backend="triton")
            sum(field.sum() for field in stats).backward()
            token_entropy(logits, mask=mask, backend="triton")
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_peak_memory(inplace, reduction):
    logits = torch.randn(512, 151_936, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    mask = torch.rand(512, device="cuda") < 0.7
    train(logits[:1], mask=mask[:1], reduction=reduction)
    logits.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    train(logits, mask=mask, reduction=reduction, inplace_backward=inplace)
    extra = torch.cuda.max_memory_allocated() - before
    gradient = 0 if inplace else logits.numel() * logits.element_size()
    # A few float32 numbers a token, and the allocator's granularity.
    assert extra <= gradient + 512 * 64 + (2 << 20)


def draw(rows, vocab, dtype):
    """Logits, and a mask that leaves out about a third of the rows, but not the first."""
    logits = torch.randn(rows, vocab, device="cuda", dtype=dtype)
    mask = torch.rand(rows, device="cuda") < 0.7
    mask[0] = True
    return logits, mask


def loss_and_gradient(logits, **options):
    leaf = logits.clone().requires_grad_()
    return train(leaf, **options), leaf.grad


def assert_mean(loss, gradient, logits, mask):
    """The mean over all rows, and the gradients of some of them, against float64."""
    entropy = torch.cat([reference.row_statistics(part).entropy for part in logits.split(128)])
    assert_entropy(loss, entropy[mask].mean().cpu())
    index = torch.linspace(0, len(logits) - 1, min(24, len(logits)), device="cuda").long()
    _, expected = reference_loss(logits[index], mask[index], num_items_in_batch=int(mask.sum()))
    assert_gradient(gradient[index], expected, logits.dtype)
    assert not gradient[~mask].any()


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("rows", "vocab"),
    [(1, 262_144), (8, 262_144), (300, 50_257), (2000, 8192), (600, 151_936), (20_000, 512)],
    ids=["a row", "few rows: all sums first", "odd rows: lagged", "short: lagged", "long: lagged", "a part a row"],
)
def test_repeats_bit_for_bit(rows, vocab, dtype, inplace):
    # A race between programs would show as a difference between two of the runs, or from float64.
    logits, mask = draw(rows, vocab, dtype)
    loss, gradient = loss_and_gradient(logits, mask=mask, inplace_backward=inplace)
    assert_mean(loss, gradient, logits, mask)
    for _ in range(50):
        again = loss_and_gradient(logits, mask=mask, inplace_backward=inplace)
        assert torch.equal(again[0], loss)
        assert torch.equal(again[1], gradient)


@pytest.mark.parametrize("inplace", [False, True], ids=["out of place", "in place"])
@pytest.mark.parametrize(
    ("dtype", "rows", "vocab"),
    [(torch.bfloat16, 12_000, 151_936), (torch.float32, 5000, 128_257), (torch.bfloat16, 200_000, 8192)],
    ids=["bfloat16", "float32, odd rows", "bfloat16, short rows"],
)
def test_rows_far_beyond_the_lag(dtype, rows, vocab, inplace):
    if torch.cuda.mem_get_info()[0] < 5 * rows * vocab * dtype.itemsize:
        pytest.skip("needs five times the memory of the logits")
    logits, mask = draw(rows, vocab, dtype)
    loss, gradient = loss_and_gradient(logits, mask=mask, inplace_backward=inplace)
    assert_mean(loss, gradient, logits, mask)


def test_two_streams_at_once():
    # The programs of two calls share the device, so that fewer of each run at once, in another order.
    inputs = [draw(8, 262_144, torch.bfloat16), draw(300, 151_936, torch.bfloat16)]
    expected = [loss_and_gradient(logits, mask=mask) for logits, mask in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    for _ in range(20):
        found = []
        for stream, (logits, mask) in zip(streams, inputs, strict=True):
            with torch.cuda.stream(stream):
                found.append(loss_and_gradient(logits, mask=mask))
        torch.cuda.synchronize()
        for (loss, gradient), (expected_loss, expected_gradient) in zip(found, expected, strict=True):
            assert torch.equal(loss, expected_loss)
            assert torch.equal(gradient, expected_gradient)


def linear_operands(rows, dim, vocab, dtype):
    hidden, weight = (torch.randn(n, dim, device="cuda", dtype=dtype) for n in (rows, vocab))
    return hidden.requires_grad_(), (weight / dim**0.5).detach().requires_grad_()


@pytest.mark.parametrize("function", ["mean", "none", "stats"])
def test_linear_functions_are_captured_and_do_not_synchronise(function):
    hidden, weight = linear_operands(500, 64, 3000, torch.bfloat16)
    mask, temperature = torch.rand(500, device="cuda"), torch.ones(500, device="cuda")
    items = torch.tensor(300.0, device="cuda") if function == "mean" else None

    def run():
        hidden.grad = weight.grad = None
        options = {"mask": mask, "temperature": temperature, "chunk_size": 128}
        if function == "stats":
            result = linear_token_stats(hidden, weight, **options).entropy.mean()
        else:
            result = linear_entropy_loss(hidden, weight, reduction=function, num_items_in_batch=items, **options).sum()
        result.backward()
        return result.detach()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = run()
    with torch.no_grad():
        hidden.normal_()
    graph.replay()
    captured = loss.clone(), hidden.grad.clone(), weight.grad.clone()
    assert torch.equal(run(), captured[0])
    assert torch.equal(hidden.grad, captured[1])
    assert torch.equal(weight.grad, captured[2])


@pytest.mark.parametrize("grad_tolerance", [0.0, 1e-6])
def test_linear_peak_memory(grad_tolerance):
    hidden, weight = linear_operands(16_384, 896, 151_936, torch.bfloat16)
    mask = torch.rand(16_384, device="cuda")
    linear_entropy_loss(hidden[:256], weight, mask[:256]).backward()
    hidden.grad = weight.grad = None
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    linear_entropy_loss(hidden, weight, mask, grad_tolerance=grad_tolerance).backward()
    extra = torch.cuda.max_memory_allocated() - before
    outputs = 2 * hidden.numel() + (2 + 4) * weight.numel()
    assert extra <= outputs + (512 << 20)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_device_that_is_not_the_current_one():
    logits = torch.randn(4, 100, device="cuda:1", requires_grad=True)
    expected, expected_gradient = reference_loss(logits)
    assert_entropy(train(logits), expected)
    assert_gradient(logits.grad, expected_gradient, torch.float32)
