"""The compiled CPU kernels against float64, on every instruction set that this machine has."""

import ctypes
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from em_kernels.ops import native_cpu

pytestmark = pytest.mark.skipif(
    native_cpu.unavailable_reason() is not None, reason=str(native_cpu.unavailable_reason())
)

INSTRUCTIONS = ("baseline", "avx2", "avx512")
INF, NAN = float("inf"), float("nan")
# One element, less than a vector of any instruction set, one whole vector, one element more than a block of 4096 holds
# whole vectors of, many blocks.
VOCABS = (1, 7, 16, 4099, 49152)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    library = ctypes.CDLL(str(native_cpu.LIBRARY))
    wanted = INSTRUCTIONS.index(request.param)
    if library.em_limit_instructions(wanted) != wanted:
        pytest.skip(f"this processor has no {request.param}")
    yield request.param
    library.em_limit_instructions(len(INSTRUCTIONS))


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def entropy_with_gradient(
    logits: Tensor, weight: Tensor, temperature: Tensor | float, *, inplace: bool = False
) -> tuple[Tensor, Tensor]:
    out = logits if inplace else torch.empty(logits.shape)
    return native_cpu.entropy_with_gradient(logits, weight, temperature, out), out


def row_gradient(
    logits: Tensor, m: Tensor, inv_tau: Tensor, *coefficients: Tensor | None, inplace: bool = False, **target: Tensor
) -> Tensor:
    out = logits if inplace else torch.empty(logits.shape)
    scale = inv_tau.double() * math.log2(math.e)
    hi = scale.float()
    native_cpu.row_gradient(
        logits, m, hi, (scale - hi).float(), *coefficients, *[None] * (3 - len(coefficients)), out, **target
    )
    return out


class Exact(NamedTuple):
    """The sums of each row in float64, centred on the maximum as a float64 log-softmax is not: the gradient of a
    one-hot row lies far below the rounding error of 1."""

    d: Tensor
    s: Tensor
    a: Tensor
    b: Tensor

    @property
    def entropy(self) -> Tensor:
        return self.s.log() - self.a / self.s

    def entropy_gradient(self, inv_tau: float) -> Tensor:
        return -inv_tau * self.d.exp() / self.s[:, None] * (_finite(self.d) - (self.a / self.s)[:, None])


def exact(logits: Tensor, inv_tau: float) -> Exact:
    z = logits.double()
    d = (z - z.amax(-1, keepdim=True)) * inv_tau
    e = d.exp()
    return Exact(d, e.sum(-1), (_finite(d) * e).sum(-1), (_finite(d) ** 2 * e).sum(-1))


def _finite(d: Tensor) -> Tensor:
    return d.clamp(min=-1e100)  # 0 * -inf is NaN, and the square is finite


def rows(vocab: int, offset: float, spread: float) -> Tensor:
    """Rows of many shapes, (rows, vocab), whose entropies at temperature `spread` run from 0 to log vocab."""
    generator = torch.Generator().manual_seed(vocab)
    noise = torch.randn(vocab, generator=generator)
    peak = torch.full((vocab,), -60.0).index_fill_(0, torch.tensor(vocab // 2), 0.0)
    shapes = {
        "normal": noise,
        "wide": 3 * noise,
        "nearly uniform": 1e-3 * noise,
        "uniform": torch.zeros(vocab),
        "one-hot": peak,
        "nearly one-hot": peak / 4 + noise / 10,
        "rising": torch.linspace(-8, 0, vocab),  # every block brings a new maximum
        "falling": torch.linspace(0, -8, vocab),
        "some banned": torch.where(noise < noise.median() - 0.5, -INF, noise),
        "first half banned": torch.where(torch.arange(vocab) < vocab // 2, -INF, noise),
        "all but one banned": torch.full((vocab,), -INF).index_fill_(0, torch.tensor(vocab - 1), 0.0),
    }
    return torch.stack(list(shapes.values())) * spread + offset


def assert_entropy_close(actual: Tensor, expected: Tensor) -> None:
    error = (actual.double() - expected).abs()
    assert (error <= 2e-6 * expected + 3e-7).all(), (error / (2e-6 * expected + 3e-7)).max()
    assert (actual >= 0).all()


def assert_gradient_close(actual: Tensor, expected: Tensor, scale: float = 1.0) -> None:
    """Within 2e-6 of each row's largest entry, given exponentials below the normal numbers' range count as 0."""
    allowed = 2e-6 * expected.abs().amax(-1, keepdim=True) + 4e-36 * scale
    error = (actual.double() - expected).abs()
    assert (error <= allowed).all(), (error / allowed).max()


@pytest.mark.parametrize("temperature", [0.01, 0.7, 1.0, 100.0], ids="tau{}".format)
@pytest.mark.parametrize("offset", [0.0, 1e4, -1e4], ids="offset{}".format)
@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_entropy_and_gradient_are_accurate(instructions, vocab, offset, temperature):
    logits = rows(vocab, offset, temperature)
    weight = torch.linspace(0.5, 2, len(logits))
    entropy, grad = entropy_with_gradient(logits[None], weight, temperature)
    expected = exact(logits, 1 / temperature)
    assert_entropy_close(entropy, expected.entropy)
    assert_gradient_close(
        grad[0],
        weight[:, None] * expected.entropy_gradient(1 / temperature),
        1 / temperature,
    )


@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_sums_are_accurate(instructions, vocab):
    logits = rows(vocab, 3.0, 1.0)
    m, s, a, b = native_cpu.row_sums(logits[None], None, 1 / 0.7, second_moment=True)
    expected = exact(logits, 0.7)
    assert torch.equal(m, logits.amax(-1))
    for actual, exact_sum in ((s, expected.s), (a, expected.a), (b, expected.b)):
        torch.testing.assert_close(actual.double(), exact_sum, rtol=1e-6, atol=1e-20)


@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_sums_without_the_second_moment(instructions, vocab):
    logits = rows(vocab, 3.0, 1.0)
    m, s, a, b = native_cpu.row_sums(logits[None], None, 1 / 0.7)
    expected = exact(logits, 0.7)
    assert b is None
    assert torch.equal(m, logits.amax(-1))
    torch.testing.assert_close(s.double(), expected.s, rtol=1e-6, atol=0)
    torch.testing.assert_close(a.double(), expected.a, rtol=1e-6, atol=1e-20)


def test_exponential_is_accurate(instructions):
    d = torch.cat([torch.linspace(-87.3, 0, 200_003), -torch.logspace(-30, 1.9, 20_000)])
    one = torch.ones(1)
    exponential = row_gradient(d[None, None], 0 * one, one, one, 0 * one)[0, 0]
    truth = d.double().exp()
    unit_in_last_place = truth.frexp().exponent.double().sub(24).exp2()
    limit = 2.2 if instructions == "baseline" else 2  # its polynomial has no fused multiply-adds
    assert ((exponential.double() - truth).abs() / unit_in_last_place).max() < limit


@pytest.mark.parametrize(
    ("d", "expected"), [(0.0, 1.0), (-104.0, 0.0), (-200.0, 0.0), (-3e38, 0.0), (-INF, 0.0), (NAN, NAN)], ids=str
)
def test_exponential_at_the_ends_of_its_range(instructions, d, expected):
    one = torch.ones(1)
    result = row_gradient(torch.full((1, 1, 21), d), 0 * one, one, one, one)
    torch.testing.assert_close(result, torch.full((1, 1, 21), expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_gradient_of_any_coefficients_and_target(instructions, vocab):
    logits = rows(vocab, -2.0, 1.0)
    count = len(logits)
    generator = torch.Generator().manual_seed(0)
    A, B, C, alpha = torch.randn(4, count, generator=generator).unbind()
    target = torch.randint(vocab, (count,), generator=generator)
    inv_tau = torch.linspace(0.3, 1, count)
    d = _finite(exact(logits, 1.0).d * inv_tau[:, None])
    polynomial = A[:, None] + B[:, None] * d
    with_square = polynomial + C[:, None] * d**2
    m = logits.amax(-1)
    for coefficients, bracket in (((A, B), polynomial), ((A, B, C), with_square)):
        # Fewer than 2e-6 would be needed of a gradient that cancels: the largest of the terms is what is rounded.
        expected = d.exp() * bracket
        grad = row_gradient(logits[None], m, inv_tau, *coefficients)[0]
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-5)
        expected[torch.arange(count), target] += alpha
        grad = row_gradient(logits[None], m, inv_tau, *coefficients, target=target, alpha=alpha)[0]
        torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 16])
def test_target_out_of_range_makes_its_row_nan_and_touches_no_other(target):
    one = torch.ones(3)
    targets = torch.tensor([0, target, 15])
    grad = row_gradient(torch.zeros(1, 3, 16), 0 * one, one, one, one, target=targets, alpha=one)[0]
    assert grad[1].isnan().all()
    assert grad[0].tolist() == [2.0] + [1.0] * 15
    assert grad[2].tolist() == [1.0] * 15 + [2.0]


@pytest.mark.parametrize("vocab", [1, 7, 4099, 9001], ids="V{}".format)
@pytest.mark.parametrize("fill", [0.5, -INF], ids=["finite", "banned"])
@pytest.mark.parametrize("culprit", [NAN, INF], ids=str)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_nan_or_infinity_makes_its_row_nan_and_no_other(instructions, vocab, fill, culprit, place):
    logits = torch.full((1, 3, vocab), fill)
    logits[0, ::2] = 1.0
    logits[0, 1, {"first": 0, "middle": vocab // 2, "last": vocab - 1}[place]] = culprit
    check_only_middle_row_is_nan(logits)


@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_row_without_any_token_left_is_nan(instructions, vocab):
    logits = torch.ones(1, 3, vocab)
    logits[0, 1] = -INF
    check_only_middle_row_is_nan(logits)


def check_only_middle_row_is_nan(logits: Tensor) -> None:
    one = torch.ones(3)
    m, s, a, b = native_cpu.row_sums(logits, None, 1.0, second_moment=True)
    entropy, grad = entropy_with_gradient(logits, one, 1.0)
    from_sums = row_gradient(logits, m, one, a / s, -one)
    for result in (s, a, b, entropy, grad[0], from_sums[0]):
        assert result[1].isnan().all()
        assert result[::2].isfinite().all()


@pytest.mark.parametrize("vocab", [7, 4099], ids="V{}".format)
def test_banned_tokens_get_exactly_nothing(instructions, vocab):
    logits = torch.randn(vocab)
    banned = torch.arange(vocab) % 3 == 0
    entropy, grad = entropy_with_gradient(torch.where(banned, -INF, logits)[None, None], torch.ones(1), 1.0)
    assert (grad[0, 0][banned] == 0).all()
    torch.testing.assert_close(entropy, entropy_with_gradient(logits[~banned][None, None], torch.ones(1), 1.0)[0])


def test_certain_rows_have_no_entropy_and_uniform_rows_no_gradient(instructions):
    certain = torch.full((1, 1, 4099), -200.0).index_fill_(-1, torch.tensor(4097), 5.0)
    entropy, grad = entropy_with_gradient(certain, torch.ones(1), 1.0)
    assert entropy.item() == 0
    assert (grad == 0).all()
    _, grad = entropy_with_gradient(torch.full((1, 1, 4099), 7.0), torch.ones(1), 1.0)
    assert (grad == 0).all()


@pytest.mark.parametrize("garbage", [NAN, INF, 1e38], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_masked_rows_are_not_read_and_are_zero(garbage, inplace):
    logits = torch.randn(2, 3, 100)
    mask = torch.tensor([True, False, True, True, True, False])
    logits.view(6, 100)[~mask] = garbage
    m, s, a, b = native_cpu.row_sums(logits, mask, 1.0, second_moment=True)
    weight = mask.float()
    A = torch.where(mask, a / s, NAN)
    copy = logits.clone()
    from_sums = row_gradient(copy, m, weight, A, -weight, inplace=inplace).view(6, 100)
    entropy, grad = entropy_with_gradient(logits, weight, 1.0, inplace=inplace)
    for result in (m, s, a, b, entropy, grad.view(6, 100), from_sums):
        assert (result[~mask] == 0).all()
        assert result.isfinite().all()
        assert (result[mask] != 0).any()


@pytest.mark.parametrize("vocab", [7, 16, 4099], ids="V{}".format)
def test_rows_with_two_strides_are_those_of_the_contiguous_copy(vocab):
    whole = torch.randn(3, 5, vocab + 3)
    views = {
        "without the last token": whole[:, :-1, :vocab],
        "transposed": whole.transpose(0, 1)[..., 3:],
        "expanded": whole[:1, :, :vocab].expand(4, 5, vocab),
    }
    for name, logits in views.items():
        count = logits.shape[0] * logits.shape[1]
        weight = torch.linspace(1, 2, count)
        contiguous = logits.contiguous()
        actual = entropy_with_gradient(logits, weight, 1.0)
        assert actual[1].is_contiguous()
        expected = entropy_with_gradient(contiguous, weight, 1.0)
        assert all(map(torch.equal, actual, expected)), name
        m, s, a, _ = native_cpu.row_sums(logits, None, weight)
        assert all(map(torch.equal, (m, s, a), native_cpu.row_sums(contiguous, None, weight))), name
        grads = (row_gradient(x, m, weight, a, s) for x in (logits, contiguous))
        assert torch.equal(*grads), name


def test_in_place_gradient_replaces_the_logits_of_a_slice_and_nothing_else():
    whole = torch.randn(3, 5, 4099)
    before = whole.clone()
    weight = torch.linspace(1, 2, 12)
    entropy, grad = entropy_with_gradient(whole[:, :-1], weight, 0.5)
    part = whole[:, :-1]
    same_entropy, same_grad = entropy_with_gradient(part, weight, 0.5, inplace=True)
    assert torch.equal(entropy, same_entropy)
    assert same_grad.data_ptr() == whole.data_ptr()
    assert torch.equal(whole[:, :-1], grad)
    assert torch.equal(whole[:, -1], before[:, -1])

    arguments = (torch.ones(12), weight, weight, -weight)
    grad = row_gradient(before[:, :-1], *arguments)
    row_gradient(before[:, :-1], *arguments, inplace=True)
    assert torch.equal(before[:, :-1], grad)


def test_temperature_of_each_row_is_that_of_the_row_alone():
    logits = torch.randn(1, 3, 4099)
    temperature = torch.tensor([0.5, 1.0, 3.0])
    weight = torch.ones(3)
    together = entropy_with_gradient(logits, weight, temperature)
    sums = native_cpu.row_sums(logits, None, temperature)
    for i in range(3):
        entropy, grad = entropy_with_gradient(logits[:, i : i + 1], weight[:1], temperature[i].item())
        assert torch.equal(entropy[0], together[0][i])
        assert torch.equal(grad[0, 0], together[1][0, i])
        alone = native_cpu.row_sums(logits[:, i : i + 1], None, temperature[i].item())
        assert [x.item() for x in alone[:3]] == [x[i].item() for x in sums[:3]]


def test_results_are_the_same_bits_for_any_number_of_threads(threads):
    logits = torch.randn(1, 61, 16411)  # enough work for seven threads, in rows that do not divide evenly
    weight = torch.rand(61)
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        m, s, a, b = native_cpu.row_sums(logits, None, 0.7, second_moment=True)
        entropy, grad = entropy_with_gradient(logits, weight, 0.7)
        results.append((m, s, a, b, entropy, grad, row_gradient(logits, m, weight, a, s, b)))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("vocab", [49152, 49157], ids="V{}".format)
def test_large_gradients_which_bypass_the_cache_are_those_of_small_ones(instructions, vocab):
    count = (32 << 20) // (4 * vocab) + 1
    logits = torch.randn(1, count, vocab)
    weight = torch.rand(count)
    _, together = entropy_with_gradient(logits, weight, 1.0)
    for i in range(count):
        _, alone = entropy_with_gradient(logits[:, i : i + 1], weight[i : i + 1], 1.0)
        assert torch.equal(together[0, i], alone[0, 0])


def test_offsets_beyond_32_bits():
    # Only the pages of the two rows are ever touched.
    stride = 2**31 + 5
    logits = torch.empty(stride + 16).as_strided((2, 1, 16), (stride, 16, 1))
    logits.copy_(torch.randn(2, 1, 16))
    weight = torch.ones(2)
    expected = entropy_with_gradient(logits.contiguous(), weight, 1.0)
    actual = entropy_with_gradient(logits, weight, 1.0, inplace=True)
    assert all(map(torch.equal, actual, expected))


@pytest.mark.parametrize("shape", [(0, 3, 8), (2, 0, 8)], ids=str)
def test_no_rows(shape):
    logits, none = torch.empty(shape), torch.empty(0)
    entropy, grad = entropy_with_gradient(logits, none, 1.0)
    assert entropy.shape == (0,)
    assert grad.shape == shape
    assert native_cpu.row_sums(logits, None, 1.0)[0].shape == (0,)
    assert row_gradient(logits, none, none, none, none).shape == shape


@pytest.mark.parametrize(
    ("content", "reason"), [(None, "not built"), (b"not a library", "cannot be loaded")], ids=["missing", "broken"]
)
def test_library_that_cannot_be_loaded_is_a_reason_not_an_error(tmp_path, monkeypatch, content, reason):
    library = tmp_path / "_entropy_cpu.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(native_cpu, "LIBRARY", library)
    native_cpu._load.cache_clear()
    try:
        assert reason in str(native_cpu.unavailable_reason())
        with pytest.raises(RuntimeError, match=reason):
            native_cpu.row_sums(torch.zeros(1, 1, 4), None, 1.0)
    finally:
        native_cpu._load.cache_clear()
