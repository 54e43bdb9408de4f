"""What a GPU is given to do, counted on the CPU: launches a chunk, what is allocated when, and the numbers it makes.

A dispatch mode stands in for the one thing the CPU lacks, matmuls of 16-bit operands with a float32 result.
"""

import weakref
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from em_kernels.ops import backend, types
from em_kernels.ops.hidden import chunks, gradients, matmul, passes
from em_kernels.ops.hidden.chunks import padded, rows_of_a_chunk, rows_of_a_part, rows_that_fit
from em_kernels.ops.hidden.head import Chunking, Head
from em_kernels.ops.sharded import Place
from em_kernels.ops.types import Divisor, Needs, Temperature, Upstream, Wanted

ROWS, DIM, VOCAB = 24, 16, 200
PLACE = Place("torch")


class Gpu(TorchDispatchMode):
    """Counts what launches a kernel: every operator but views and allocations, and a call of the backend as one."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        is_view = any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)
        if not is_view and "empty" not in func._schema.name:
            self.launches.append(func._schema.name.removeprefix("aten::").removesuffix("_"))
        if func in (torch.ops.aten.mm.dtype_out, torch.ops.aten.mm.dtype):
            a, b, dtype = args
            return _result(a.to(dtype) @ b.to(dtype), kwargs)
        if func in (torch.ops.aten.addmm.dtype_out, torch.ops.aten.addmm.dtype):
            total, a, b, dtype = args
            return _result(total + a.to(dtype) @ b.to(dtype), kwargs)
        return func(*args, **kwargs)


def _result(value: Tensor, kwargs: dict) -> Tensor:
    return kwargs["out"].copy_(value) if "out" in kwargs else value


class Counted:
    """A backend each of whose calls is a launch, whatever it does on the CPU."""

    scale_ = staticmethod(backend.implementation("torch").scale_)

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu

    def __getattr__(self, name):
        def call(*arguments):
            self.gpu.launches.append(name)
            with _disable_current_modes():
                return getattr(backend.implementation("torch"), name)(*arguments)

        return call


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    monkeypatch.setattr(types, "host_sees", lambda _: False)
    monkeypatch.setattr(matmul, "_has_float32_output", lambda _: True)
    monkeypatch.setattr(passes, "implementation", lambda _: Counted(gpu))
    return gpu


@pytest.fixture(params=[True, False], ids=["split sums may be rounded", "rounded once"])
def reduced_precision(request, monkeypatch):
    class Setting:
        allow_bf16_reduced_precision_reduction = request.param

    monkeypatch.setattr(torch.backends.cuda, "matmul", Setting)
    return request.param


class Case(NamedTuple):
    hidden: Tensor
    head: Head
    mask: Tensor

    @staticmethod
    def draw(dtype: torch.dtype, *, bias: bool = False, softcap: float | None = None) -> "Case":
        hidden, weight = torch.randn(ROWS, DIM).to(dtype), torch.randn(VOCAB, DIM).to(dtype)
        offset = torch.randn(VOCAB).to(dtype) if bias else None
        mask = torch.arange(ROWS) % 4 != 1
        hidden[~mask] = float("nan")
        return Case(hidden, Head(weight, offset, softcap, types.statistics_dtype(dtype)), mask)

    def loss_and_gradients(self, chunk_size: int, token_count: int | None = None):
        needs = Needs(True, True, self.head.bias is not None)
        divisor = Divisor(self.mask.sum(dtype=torch.float32))
        loss, gradients = passes.entropy_and_gradients(
            self.hidden, self.head, self.mask, divisor, Temperature(common=0.7), Chunking(chunk_size, 0.0, token_count),
            needs, PLACE,
        )  # fmt: skip
        return loss, *gradients

    def statistics_gradients(self, saved, chunk_size: int):
        upstream = Upstream(entropy=torch.ones(ROWS), lse=torch.ones(ROWS))
        needs = Needs(True, True, self.head.bias is not None)
        return passes.gradients_of_statistics(
            self.hidden, self.head, saved, None, upstream, Chunking(chunk_size), needs, PLACE
        )

    def statistics(self, chunk_size: int):
        return passes.row_statistics(
            self.hidden, self.head, self.mask, Temperature(), None, Wanted(), Chunking(chunk_size), PLACE
        )


def launches_a_chunk(gpu: Gpu, function) -> list[str]:
    """What `function` of a chunk size launches more with six chunks than with five."""
    launched = []
    for chunk_size in (4, 5):
        gpu.launches.clear()
        with gpu:
            function(chunk_size)
        launched.append(list(gpu.launches))
    many, few = launched
    for name in few:
        many.remove(name)
    return sorted(many)


@pytest.mark.parametrize("softcap", [None, 5.0], ids="cap {}".format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_launches_a_chunk(gpu, reduced_precision, dtype, bias, softcap):
    case = Case.draw(dtype, bias=bias, softcap=softcap)
    # A matmul adds the bias to logits of its operands' dtype. To wider logits it is added afterwards.
    logits = (["addmm"] if dtype == torch.float32 else ["mm", "add"]) if bias else ["mm"]
    rounding = ["copy"] * (dtype == torch.bfloat16 and reduced_precision)
    of_bias = ["sum", "add"] * bias
    products = [*logits, "mm", *rounding, "addmm", *of_bias]
    expected = sorted([*products, "entropy_with_gradient"])
    assert len(expected) <= (8 if bias else 5)
    assert launches_a_chunk(gpu, case.loss_and_gradients) == expected
    assert launches_a_chunk(gpu, lambda size: case.loss_and_gradients(size, int(case.mask.sum()))) == expected

    assert launches_a_chunk(gpu, case.statistics) == sorted([*logits, "row_statistics"])
    with gpu:
        _, saved = case.statistics(4)
    # A chunk's part of what is saved is copied together.
    expected = sorted([*products, "clone", "row_gradient"])
    assert launches_a_chunk(gpu, lambda size: case.statistics_gradients(saved, size)) == expected


def test_nothing_as_large_as_the_weight_is_cleared_scaled_or_copied(gpu):
    """Of the weight's gradient there is a float32 sum that matmuls make, and one copy of it in bfloat16."""
    case = Case.draw(torch.bfloat16)
    made = []

    class Large(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, Tensor) and result.shape == (VOCAB, DIM):
                made.append(func._schema.name.removeprefix("aten::"))
            return result

    with gpu, Large():
        case.loss_and_gradients(8)
    assert [name for name in made if "empty" not in name] == ["mm", "addmm", "addmm", "_to_copy"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("softcap", [None, 5.0], ids="cap {}".format)
@pytest.mark.parametrize("chunk_size", [5, 16, 100], ids="chunks of {}".format)
@pytest.mark.parametrize("counted", [False, True], ids=["masked", "counted"])
def test_results_are_those_of_the_cpu(gpu, reduced_precision, dtype, softcap, chunk_size, counted, monkeypatch):
    monkeypatch.setattr(chunks, "_SMALLEST_PART", 3)
    case = Case.draw(dtype, bias=True, softcap=softcap)
    with gpu:
        actual = case.loss_and_gradients(chunk_size, int(case.mask.sum()) if counted else None)
    monkeypatch.undo()
    hidden = case.hidden.double().masked_fill(~case.mask.unsqueeze(-1), 0)
    head = Head(case.head.weight.double(), case.head.bias.double(), softcap, torch.float64)
    exact = Case(hidden, head, case.mask).loss_and_gradients(chunk_size)
    rounding = 1e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for a, b in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=rounding, atol=rounding * float(b.abs().max()))
    assert (actual[1][~case.mask] == 0).all()


def test_one_chunk_makes_a_narrow_weight_gradient_directly_where_that_rounds_once(gpu, reduced_precision):
    case = Case.draw(torch.bfloat16)
    with gpu:
        case.loss_and_gradients(100)
    # Of logits, hidden's gradient and the weight's; what is rounded afterwards is a copy.
    assert gpu.launches.count("mm") == 3
    assert gpu.launches.count("_to_copy") == reduced_precision
    assert "addmm" not in gpu.launches


def test_the_memory_of_the_chunks_is_free_before_the_narrow_weight_gradient_is_allocated(gpu, monkeypatch):
    scratch, alive = [], []
    original = chunks.Chunks.logits

    def logits(self, part):
        z = original(self, part)
        if not scratch:
            scratch.extend(weakref.ref(memory.untyped_storage()) for memory in (z, self.gradient(part)))
        return z

    class AtTheEnd(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten._to_copy.default and args[0].shape == (VOCAB, DIM):
                alive.append([memory() is not None for memory in scratch])
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(chunks.Chunks, "logits", logits)
    case = Case.draw(torch.bfloat16)
    with gpu, AtTheEnd():
        case.loss_and_gradients(8)
    assert alive == [[False, False]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_what_is_rounded_down_to_the_tolerance_is_not_left_out(dtype):
    """Numbers next to the tolerance on both sides, and subnormal ones, each in a row and a column of its own."""
    for size in (1e-3, 3e-7):
        tolerance = torch.tensor(size)
        unrounded = torch.diag(size * torch.linspace(0.5, 1.2, 401))
        active = gradients._active(unrounded.to(dtype), tolerance)
        assert active is not None
        for kept in active:
            left_out = torch.ones(401, dtype=torch.bool)
            left_out[kept] = False
            assert unrounded.diagonal()[left_out].max() <= tolerance
            assert 0 < len(kept) < 401
    # Well below the tolerance nothing is kept.
    rows, columns = gradients._active(torch.full((4, 4), 9e-4).to(dtype), torch.tensor(1e-3))
    assert len(rows) == len(columns) == 0


@pytest.mark.parametrize("actual", [0, 5, 7])
def test_a_wrong_count_is_nan_in_every_result(gpu, actual):
    case = Case.draw(torch.bfloat16)
    case = case._replace(hidden=case.hidden.nan_to_num(), mask=torch.arange(ROWS) < actual)
    chunking = Chunking(3, 0.0, 6)
    with gpu:
        loss, of_hidden, of_weight, _ = case.loss_and_gradients(3, 6)
        statistics, _ = passes.row_statistics(
            case.hidden, case.head, case.mask, Temperature(), None, Wanted(True), chunking, PLACE
        )
    assert loss.isnan()
    assert of_hidden.isnan().all()
    assert of_weight.isnan().all() or actual == 0
    for field in (statistics.entropy, statistics.lse, statistics.varentropy):
        assert field.isnan().all()
    with gpu:
        right = case.loss_and_gradients(3, actual)
    assert all(result.isfinite().all() for result in right)


@pytest.mark.parametrize(
    ("rows", "dim", "most", "expected"),
    [
        (8192, 4096, 2688, 2048),  # 16 tiles across, so a wave of 8 tiles down
        (2100, 4096, 2688, 2100),  # one chunk
        (8192, 4096, 1000, 911),  # a ninth, for whole tiles would be more than 1000
        (2048, 576, 640, 512),  # 3 tiles across: a wave is more rows than there may be
        (1000, 4096, 1, 1),
        (0, 16, 5, 1),
    ],
)
def test_chunks_are_equal_and_fill_waves(rows, dim, most, expected):
    assert rows_of_a_chunk(rows, dim, most) == expected


@pytest.mark.parametrize(
    ("rows", "expected"),
    [(100, 100), (256, 256), (512, 256), (1000, 256), (1152, 256), (4096, 1024), (2688, 640), (1, 1)],
)
def test_rows_of_a_part(rows, expected):
    assert rows_of_a_part(rows) == expected


@pytest.mark.parametrize("gradient", [0, 2], ids=["in place", "narrower"])
@pytest.mark.parametrize(("vocab", "dim"), [(131072, 4096), (151936, 896), (262144, 640), (32000, 8192), (50257, 64)])
@pytest.mark.parametrize("scratch", [32 << 20, 512 << 20, 2 << 30])
def test_a_chunk_is_as_large_as_its_memory_allows(scratch, vocab, dim, gradient):
    def memory(rows: int) -> int:
        of_logits = rows_of_a_part(rows) if gradient else rows
        return padded(vocab) * (4 * of_logits + gradient * rows) + 4 * dim * rows

    rows = rows_that_fit(scratch, vocab, dim, logits=4, gradient=gradient, product=4)
    assert memory(rows) <= scratch
    # A wave is at most 1.25 times as many rows, or where it is more than fit, a tile more.
    wave = next(multiple for multiple in chunks._multiples(dim) if multiple <= rows)
    assert memory(rows + wave + 4 * 128) > scratch
    assert rows % wave == 0


@pytest.mark.parametrize(
    ("scratch", "vocab", "dim", "expected"),
    [
        (4 * 131072 * 4096, 131072, 4096, 5120),  # quarters of 1280, five waves
        (512 << 20, 262144, 640, 384),  # parts of 256
        (128 << 20, 131072, 4096, 128),  # a tile, in one part
        (1 << 20, 131072, 4096, 1),
    ],
)
def test_rows_that_fit(scratch, vocab, dim, expected):
    assert rows_that_fit(scratch, vocab, dim, logits=4, gradient=2, product=4) == expected


def test_logits_are_made_in_parts_where_their_gradient_is_narrower(gpu, monkeypatch):
    monkeypatch.setattr(chunks, "_SMALLEST_PART", 3)
    case = Case.draw(torch.bfloat16)
    for chunk_size, rounded in ((12, torch.float32), (12, torch.bfloat16)):
        gpu.launches.clear()
        with gpu:
            case._replace(head=case.head._replace(logits_dtype=rounded)).loss_and_gradients(chunk_size)
        # Two chunks, of four parts each unless their gradient is made in place.
        assert gpu.launches.count("entropy_with_gradient") == (8 if rounded == torch.float32 else 2)
        assert gpu.launches.count("addmm") == 1
