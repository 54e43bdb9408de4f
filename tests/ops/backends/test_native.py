"""The compiled CPU kernels against float64, on every instruction set that this machine has."""

import ctypes

import pytest
import torch
from native_rows import (
    EVERYTHING,
    INF,
    NAN,
    assert_entropy_close,
    assert_gradient_close,
    capped,
    entropy_with_gradient,
    exact,
    finite,
    row_gradient,
    row_statistics,
    rows,
    saved_of,
    slope_of_cap,
    tensors,
)
from torch import Tensor

from em_kernels.ops.backends import native
from em_kernels.ops.types import Divisor, Temperature, Upstream, Wanted

CPU = torch.device("cpu")
REASON = native.unavailable_reason(CPU, torch.float32)
pytestmark = pytest.mark.skipif(REASON is not None, reason=str(REASON))

INSTRUCTIONS = ("baseline", "avx2", "avx512")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# One element, less than a vector of any instruction set, one whole vector, a few elements more than two blocks, many
# blocks.
VOCABS = (1, 7, 16, 4099, 49152)


@pytest.fixture(params=INSTRUCTIONS)
def instructions(request):
    library = ctypes.CDLL(str(native.LIBRARY))
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


# 16-bit logits are none but numbers of float32, whose offsets these test.
INPUTS = [
    *((torch.float32, offset, temperature) for offset in (0.0, 1e4, -1e4) for temperature in (0.01, 0.7, 1.0, 100.0)),
    *((dtype, 0.0, temperature) for dtype in (torch.bfloat16, torch.float16) for temperature in (0.01, 0.7)),
]


@pytest.mark.parametrize(("dtype", "offset", "temperature"), INPUTS, ids=str)
@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_entropy_and_gradient_are_accurate(instructions, vocab, dtype, offset, temperature):
    logits = rows(vocab, offset, temperature).to(dtype)
    weight = torch.linspace(0.5, 2, len(logits))
    statistics, saved = row_statistics(logits[None], temperature)
    loss, grad = entropy_with_gradient(logits[None], weight, temperature)
    from_saved = row_gradient(logits[None], saved, Upstream(entropy=weight))
    expected = exact(logits, 1 / temperature)
    assert_entropy_close(statistics.entropy, expected.entropy)
    torch.testing.assert_close(loss.double(), (weight * expected.entropy).sum(), rtol=2e-6, atol=5e-6)
    gradient = weight[:, None] * expected.entropy_gradient(1 / temperature)
    assert_gradient_close(grad[0], gradient, 1 / temperature)
    assert_gradient_close(from_saved[0], gradient, 1 / temperature)


@pytest.mark.parametrize("temperature", [1e-29, 1e-20, 1e20, 1e29])
def test_gradient_is_accurate_where_the_square_of_the_temperature_is_no_float(instructions, temperature):
    logits = torch.randn(1, 3, 4099) * temperature
    _, grad = entropy_with_gradient(logits, temperature=temperature)
    assert_gradient_close(grad[0], exact(logits[0], 1 / temperature).entropy_gradient(1 / temperature))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_capped_logits_are_accurate(instructions, vocab, dtype):
    # Capped logits are rounded to float32. In a nearly uniform row, the gradient is made of their small differences.
    cap, tau, relative = 2.0, 0.7, 4e-6
    logits = rows(vocab, 0.5, 3.0).to(dtype)
    weight, target = torch.linspace(0.5, 2, len(logits)), torch.full((len(logits),), vocab // 2)
    statistics, saved = row_statistics(logits[None], tau, target=target, softcap=cap)
    loss, grad = entropy_with_gradient(logits[None], weight, tau, softcap=cap)
    from_saved = row_gradient(logits[None], saved, Upstream(entropy=weight), softcap=cap)
    expected = exact(logits, 1 / tau, cap)
    assert_entropy_close(statistics.entropy, expected.entropy)
    torch.testing.assert_close(loss.double(), (weight * expected.entropy).sum(), rtol=2e-6, atol=5e-6)
    slope = slope_of_cap(logits, cap)
    gradient = slope * weight[:, None] * expected.entropy_gradient(1 / tau)
    assert_gradient_close(grad[0], gradient, relative=relative)
    assert_gradient_close(from_saved[0], gradient, relative=relative)

    p, is_target = expected.d.exp() / expected.s[:, None], torch.nn.functional.one_hot(target, vocab).bool()
    logprob = expected.d[is_target] - expected.s.log()
    torch.testing.assert_close(statistics.logprob.double(), logprob, rtol=1e-6, atol=1e-6)
    grad = row_gradient(logits[None], saved, Upstream(logprob=weight), target, softcap=cap)[0]
    assert_gradient_close(grad, slope * weight[:, None] / tau * (is_target.double() - p), relative=relative)


@pytest.mark.parametrize("cap", [1.0, 30.0], ids="cap{}".format)
def test_soft_cap_and_its_slope_are_accurate(instructions, cap):
    z = torch.cat([torch.linspace(-4, 4, 200_003), torch.logspace(-8, 1.5, 20_000)]) * cap
    # Rows of one logit: the maximum is that logit, and the gradient of the log-sum-exp its slope.
    sums = native.row_sums(z[None, :, None], None, Temperature(), None, Wanted(), cap)
    expected = capped(z.double(), cap)
    unit = expected.abs().frexp().exponent.double().sub(24).exp2()
    assert ((sums.m.double() - expected).abs() / unit).max() < 1.5
    slope = row_gradient(z[None, :, None], saved_of(sums.m), Upstream(lse=torch.ones(len(z))), softcap=cap)
    torch.testing.assert_close(slope[0, :, 0].double(), slope_of_cap(z, cap), rtol=5e-7, atol=1e-37)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits_is_read_as_it_is(instructions, dtype):
    z = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    m = native.row_sums(z[None, :, None], None, Temperature(), None, Wanted()).m
    # Infinity makes its row NaN.
    expected = torch.where(z == INF, NAN, z.float())
    torch.testing.assert_close(m, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradients_of_16_bits_are_rounded_to_the_nearest(instructions, dtype):
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    here, after = bits.view(dtype).float(), (bits + 1).view(dtype).float()
    between = (here + after) / 2
    values = torch.cat([here, between, torch.nextafter(between, here), torch.nextafter(between, after)])
    values = values[values.isfinite()]
    values = torch.cat([values, torch.tensor([65519.9, 65520.0, 1e6, -3.4e38, INF, NAN])])
    # The gradient of the log-sum-exp in a row of maxima is the upstream gradient.
    logits, saved = torch.zeros(1, len(values), 17), saved_of(torch.zeros(len(values)))
    grad = row_gradient(logits, saved, Upstream(lse=values), out=torch.empty_like(logits, dtype=dtype))
    expected = values.to(dtype)[:, None].expand(-1, 17)
    torch.testing.assert_close(grad[0], expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("softcap", [None, 3.0], ids="cap{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [1, 7, 4099], ids="V{}".format)
def test_narrower_gradient_in_a_padded_scratch_is_the_float32_gradient_rounded_once(
    instructions, vocab, dtype, softcap
):
    logits = rows(vocab, 0.5, 1.0)[None]
    count = logits.shape[1]
    weight, target = torch.linspace(1, 2, count), torch.arange(count) % vocab
    scratch = torch.full((1, count, vocab + 5), 7.0, dtype=dtype)
    out = scratch[..., :vocab]
    loss, grad = entropy_with_gradient(logits, weight, softcap=softcap)
    narrow_loss, _ = entropy_with_gradient(logits, weight, softcap=softcap, out=out)
    assert torch.equal(loss, narrow_loss)
    assert torch.equal(out, grad.to(dtype))
    _, saved = row_statistics(logits, target=target, softcap=softcap)
    grad = row_gradient(logits, saved, Upstream(*[weight] * 4), target, softcap=softcap)
    row_gradient(logits, saved, Upstream(*[weight] * 4), target, softcap=softcap, out=out)
    assert torch.equal(out, grad.to(dtype))
    assert (scratch[..., vocab:] == 7).all()


@pytest.mark.parametrize("wanted", [Wanted(), Wanted(second_moment=True), Wanted(extra=True), EVERYTHING], ids=str)
@pytest.mark.parametrize(("vocab", "left_out"), [(v, v) for v in VOCABS] + [(v, v // 2) for v in VOCABS[1:]])
def test_sums_are_accurate(instructions, vocab, left_out, wanted):
    logits = rows(vocab, 3.0, 1.0)
    target = torch.full((len(logits),), left_out)
    sums = native.row_sums(logits[None], None, Temperature(common=1 / 0.7), target, wanted)
    summed = torch.cat([logits[:, :left_out], logits[:, left_out + 1 :]], dim=-1)
    expected = exact(summed, 0.7)
    assert torch.equal(sums.m, summed.amax(-1))
    torch.testing.assert_close(sums.s.double(), expected.s, rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.a.double(), expected.a, rtol=1e-6, atol=1e-20)
    assert (sums.b is not None) == wanted.second_moment
    if sums.b is not None:
        torch.testing.assert_close(sums.b.double(), expected.b, rtol=1e-6, atol=1e-20)
    assert all((x is not None) == wanted.extra for x in (sums.columns, sums.sum_d, sums.sum_e2))
    if sums.columns is not None:
        assert (sums.columns == summed.shape[-1]).all()
        torch.testing.assert_close(sums.sum_d.double(), expected.sum_d, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(sums.sum_e2.double(), expected.sum_e2, rtol=1e-6, atol=0)


def test_logits_banned_by_the_lowest_float_do_not_overflow_the_sum(instructions):
    lowest = torch.finfo(torch.float32).min
    logits = torch.cat([torch.full((1, 1, 900), lowest), torch.zeros(1, 1, 100)], dim=-1)
    statistics, _ = row_statistics(logits)
    torch.testing.assert_close(statistics.extra[2], torch.tensor([0.9 * lowest]))


@pytest.mark.parametrize("which", ["peak", "first", "last"])
@pytest.mark.parametrize("vocab", VOCABS[1:], ids="V{}".format)
def test_targets_are_accurate(instructions, vocab, which):
    logits = rows(vocab, 1e4, 0.7)
    target = torch.full((len(logits),), {"peak": vocab // 2, "first": 0, "last": vocab - 1}[which])
    statistics, saved = row_statistics(logits[None], 0.7, target=target)
    expected = exact(logits, 1 / 0.7)
    assert_entropy_close(statistics.entropy, expected.entropy)
    is_target = torch.nn.functional.one_hot(target, vocab).bool()
    of_others = expected.d.exp().masked_fill(is_target, 0).sum(-1)
    logprob = expected.d[is_target] - torch.where(expected.d[is_target] == 0, of_others.log1p(), expected.s.log())
    torch.testing.assert_close(statistics.logprob.double(), logprob, rtol=1e-6, atol=1e-37)

    grad = row_gradient(logits[None], saved, Upstream(logprob=torch.ones(len(logits))), target)[0]
    at_target = of_others / expected.s / 0.7
    gradient = torch.where(is_target, at_target[:, None], -expected.d.exp() / expected.s[:, None] / 0.7)
    torch.testing.assert_close(grad[is_target].double(), at_target, rtol=1e-6, atol=1e-37)
    assert_gradient_close(grad, gradient)
    assert_gradient_close(
        row_gradient(logits[None], saved, Upstream(entropy=torch.ones(len(logits))))[0],
        expected.entropy_gradient(1 / 0.7),
    )


def test_exponential_is_accurate(instructions):
    d = torch.cat([torch.linspace(-87.3, 0, 200_003), -torch.logspace(-30, 1.9, 20_000)])
    exponential = row_gradient(d[None, None], saved_of(torch.zeros(1)), Upstream(lse=torch.ones(1)))[0, 0]
    truth = d.double().exp()
    unit_in_last_place = truth.frexp().exponent.double().sub(24).exp2()
    limit = 2.2 if instructions == "baseline" else 2  # its polynomial has no fused multiply-adds
    assert ((exponential.double() - truth).abs() / unit_in_last_place).max() < limit


@pytest.mark.parametrize(
    ("d", "expected"), [(0.0, 1.0), (-104.0, 0.0), (-200.0, 0.0), (-3e38, 0.0), (-INF, 0.0), (NAN, NAN)], ids=str
)
def test_exponential_at_the_ends_of_its_range(instructions, d, expected):
    one = torch.ones(1)
    result = row_gradient(torch.full((1, 1, 21), d), saved_of(0 * one), Upstream(entropy=one, lse=one))
    torch.testing.assert_close(result, torch.full((1, 1, 21), expected), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
def test_gradient_of_any_coefficients_and_target(instructions, vocab):
    logits = rows(vocab, -2.0, 1.0)
    count = len(logits)
    generator = torch.Generator().manual_seed(0)
    of_entropy, of_lse, of_logprob, of_varentropy, mean_d = torch.randn(5, count, generator=generator).unbind()
    varentropy, miss = torch.rand(2, count, generator=generator).unbind()
    target = torch.randint(vocab, (count,), generator=generator)
    inv_tau = torch.linspace(0.3, 1, count)
    saved = saved_of(logits.amax(-1), mean_d, varentropy, miss, 1 / inv_tau)

    d = finite(exact(logits, 1.0).d * inv_tau[:, None])
    u, e = d - mean_d[:, None], d.exp() * inv_tau[:, None]
    without_square = e * (of_lse[:, None] - of_entropy[:, None] * u)
    # A float32 gradient that cancels has the rounding errors of the largest of its terms.
    grad = row_gradient(logits[None], saved, Upstream(of_entropy, of_lse))[0]
    torch.testing.assert_close(grad.double(), without_square, rtol=0, atol=1e-5)
    expected = without_square + e * of_varentropy[:, None] * (u.square() + 2 * u - varentropy[:, None])
    grad = row_gradient(logits[None], saved, Upstream(of_entropy, of_lse, None, of_varentropy), target)[0]
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-5)
    at_target = expected.gather(-1, target[:, None])[:, 0] + of_logprob * inv_tau * miss
    expected = (expected - e * of_logprob[:, None]).scatter(-1, target[:, None], at_target[:, None])
    grad = row_gradient(logits[None], saved, Upstream(of_entropy, of_lse, of_logprob, of_varentropy), target)[0]
    torch.testing.assert_close(grad.double(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("target", [-1, 16])
def test_target_out_of_range_is_ignored_in_the_gradient_and_touches_no_other_row(target):
    targets = torch.tensor([0, target, 15])
    upstream = Upstream(logprob=torch.ones(3))
    grad = row_gradient(torch.zeros(1, 3, 16), saved_of(torch.zeros(3), miss=2.0), upstream, targets)[0]
    assert grad[0].tolist() == [2.0] + [-1.0] * 15
    assert grad[1].tolist() == [-1.0] * 16
    assert grad[2].tolist() == [-1.0] * 15 + [2.0]
    statistics, _ = row_statistics(torch.zeros(1, 3, 16), target=targets)
    for result in tensors(statistics):
        assert result[..., 1].isnan().all()
        assert result[..., ::2].isfinite().all()


@pytest.mark.parametrize("vocab", [1, 7, 4099, 9001], ids="V{}".format)
@pytest.mark.parametrize("fill", [0.5, -INF], ids=["finite", "banned"])
@pytest.mark.parametrize("culprit", [NAN, INF], ids=str)
@pytest.mark.parametrize("place", ["first", "middle", "last"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_or_infinity_makes_its_row_nan_and_no_other(instructions, vocab, fill, culprit, place, dtype):
    logits = torch.full((1, 3, vocab), fill, dtype=dtype)
    logits[0, ::2] = 1.0
    logits[0, 1, {"first": 0, "middle": vocab // 2, "last": vocab - 1}[place]] = culprit
    check_only_middle_row_is_nan(logits)
    sums = native.row_sums(logits, None, Temperature(), None, EVERYTHING)
    for result in (sums.s, sums.a, sums.b, sums.sum_d, sums.sum_e2):
        assert result[1].isnan()
        assert result[::2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_of_all_ones_is_nan_in_a_narrower_gradient(instructions, dtype):
    logits = torch.full((1, 1, 17), 2**31 - 1, dtype=torch.int32).view(torch.float32)
    _, grad = entropy_with_gradient(logits, out=torch.empty_like(logits, dtype=dtype))
    assert grad.isnan().all()


@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_row_without_any_token_left_is_nan(instructions, vocab, dtype):
    logits = torch.ones(1, 3, vocab, dtype=dtype)
    logits[0, 1] = -INF
    check_only_middle_row_is_nan(logits)


def check_only_middle_row_is_nan(logits: Tensor) -> None:
    last = torch.full((3,), logits.shape[-1] - 1)
    for target, softcap in ((None, None), (0 * last, None), (last, None), (last, 3.0)):
        statistics, saved = row_statistics(logits, target=target, softcap=softcap)
        from_saved = row_gradient(logits, saved, Upstream(entropy=torch.ones(3)), softcap=softcap)
        _, grad = entropy_with_gradient(logits, softcap=softcap)
        for result in (statistics.entropy, statistics.lse, statistics.varentropy, grad[0], from_saved[0]):
            assert result[1].isnan().all()
            assert result[::2].isfinite().all()
        if target is not None:
            of_target = row_gradient(logits, saved, Upstream(logprob=torch.ones(3)), target, softcap=softcap)[0]
            for result in (statistics.logprob, statistics.extra.T, of_target):
                assert result[1].isnan().all()
                assert result[::2].isfinite().all()


@pytest.mark.parametrize("vocab", [7, 4099], ids="V{}".format)
@pytest.mark.parametrize("softcap", [None, 3.0], ids="cap{}".format)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_banned_tokens_get_exactly_nothing(instructions, vocab, dtype, softcap):
    logits = torch.randn(vocab).to(dtype)
    banned = torch.arange(vocab) % 3 == 0
    loss, grad = entropy_with_gradient(torch.where(banned, -INF, logits)[None, None], softcap=softcap)
    assert (grad[0, 0][banned] == 0).all()
    torch.testing.assert_close(loss, entropy_with_gradient(logits[~banned][None, None], softcap=softcap)[0])


def test_certain_rows_have_no_entropy_and_uniform_rows_no_gradient(instructions):
    certain = torch.full((1, 1, 4099), -200.0).index_fill_(-1, torch.tensor(4097), 5.0)
    loss, grad = entropy_with_gradient(certain)
    assert loss.item() == 0
    assert (grad == 0).all()
    _, grad = entropy_with_gradient(torch.full((1, 1, 4099), 7.0))
    assert (grad == 0).all()


@pytest.mark.parametrize("vocab", [7, 16, 4099], ids="V{}".format)
def test_rows_with_two_strides_are_those_of_the_contiguous_copy(vocab):
    whole = torch.randn(3, 5, vocab + 3)
    views = {
        "without the last token": whole[:, :-1, :vocab],
        "transposed": whole.transpose(0, 1)[..., 3:],
        "expanded": whole[:1, :, :vocab].expand(4, 5, vocab),
    }
    for name, logits in views.items():
        weight = torch.linspace(1, 2, logits.shape[0] * logits.shape[1])
        both = []
        for z in (logits, logits.contiguous()):
            statistics, saved = row_statistics(z, target=torch.arange(len(weight)) % vocab)
            gradient = row_gradient(z, saved, Upstream(weight, weight))
            sums = native.row_sums(z, None, Temperature(weight), None, EVERYTHING)
            both.append(list(tensors(statistics, saved, gradient, sums, entropy_with_gradient(z, weight))))
        assert all(map(torch.equal, *both)), name


def test_in_place_gradient_replaces_the_logits_of_a_slice_and_nothing_else():
    whole = torch.randn(3, 5, 4099)
    before = whole.clone()
    weight = torch.linspace(1, 2, 12)
    expected = entropy_with_gradient(whole[:, :-1], weight, 0.5)
    actual = entropy_with_gradient(whole[:, :-1], weight, 0.5, out=whole[:, :-1])
    assert all(map(torch.equal, actual, expected))
    assert actual[1].data_ptr() == whole.data_ptr()
    assert torch.equal(whole[:, -1], before[:, -1])

    target = torch.arange(12)
    _, saved = row_statistics(before[:, :-1], target=target)
    grad = row_gradient(before[:, :-1], saved, Upstream(*[weight] * 4), target)
    row_gradient(before[:, :-1], saved, Upstream(*[weight] * 4), target, out=before[:, :-1])
    assert torch.equal(before[:, :-1], grad)


def test_temperature_of_each_row_is_that_of_the_row_alone():
    logits = torch.randn(1, 3, 4099)
    temperature = torch.tensor([0.5, 1.0, 3.0])
    together = [*tensors(native.row_statistics(logits, None, Temperature(temperature), None, EVERYTHING))]
    for i in range(3):
        alone = tensors(row_statistics(logits[:, i : i + 1], temperature[i].item()))
        for of_all, of_one in zip(together, alone, strict=True):
            torch.testing.assert_close(of_all[..., i : i + 1], of_one, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_results_are_the_same_bits_for_any_number_of_threads(threads, dtype):
    logits = torch.randn(1, 61, 16411).to(dtype)  # enough work for seven threads, in rows that do not divide evenly
    weight, target = torch.rand(61), torch.randint(16411, (61,))
    results = []
    for count in (1, 2, 3, 7):
        threads(count)
        sums = native.row_sums(logits, None, Temperature(common=0.7), target, EVERYTHING)
        statistics, saved = row_statistics(logits, 0.7, target=target)
        gradient = row_gradient(logits, saved, Upstream(*[weight] * 4), target)
        results.append(list(tensors(sums, statistics, saved, gradient, entropy_with_gradient(logits, weight, 0.7))))
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [49152, 49157], ids="V{}".format)
def test_large_gradients_which_bypass_the_cache_are_those_of_small_ones(instructions, vocab, dtype):
    count = (32 << 20) // (dtype.itemsize * vocab) + 1
    logits = torch.randn(1, count, vocab).to(dtype)
    weight = torch.rand(count)
    _, together = entropy_with_gradient(logits, weight)
    for i in range(count):
        _, alone = entropy_with_gradient(logits[:, i : i + 1], weight[i : i + 1])
        assert torch.equal(together[0, i], alone[0, 0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("vocab", [7, 4099, 6157], ids="V{}".format)
@pytest.mark.parametrize("in_place", [False, True], ids=["apart", "in place"])
def test_a_row_has_the_same_gradient_alone_and_beside_others(instructions, vocab, dtype, in_place):
    # A gradient is written beside the next row's sums. Rows of no weight, with a NaN and without tokens stand between.
    some = rows(vocab, 0.5, 1.0)
    odd = torch.full((3, vocab), 1.0)
    odd[0, vocab // 2], odd[1], odd[2, -1] = NAN, -INF, INF
    logits = torch.cat([some, odd, some.flip(0), odd])[None].to(dtype)
    count = logits.shape[1]
    weight = torch.linspace(0.5, 2, count)
    weight[2::5] = 0
    temperature = torch.linspace(0.3, 3, count)
    expected = [
        entropy_with_gradient(logits[:, i : i + 1], weight[i : i + 1], temperature[i].item())[1] for i in range(count)
    ]
    out = logits if in_place else torch.empty_like(logits)
    native.entropy_with_gradient(logits, weight, Divisor(), Temperature(temperature), out)
    torch.testing.assert_close(out, torch.cat(expected, dim=1), rtol=0, atol=0, equal_nan=True)


def test_offsets_beyond_32_bits():
    # Only the pages of the two rows are ever touched.
    stride = 2**31 + 5
    logits = torch.empty(stride + 16).as_strided((2, 1, 16), (stride, 16, 1))
    logits.copy_(torch.randn(2, 1, 16))
    expected = entropy_with_gradient(logits.contiguous())
    actual = entropy_with_gradient(logits, out=logits)
    assert all(map(torch.equal, actual, expected))


def test_a_rank_without_columns_has_the_sums_of_none():
    sums = native.row_sums(torch.empty(1, 3, 0), None, Temperature(), None, EVERYTHING)
    assert (sums.m == -INF).all()
    assert all((x == 0).all() for x in sums[1:])


@pytest.fixture
def load_anew():
    native._load.cache_clear()
    yield
    native._load.cache_clear()


@pytest.mark.usefixtures("load_anew")
@pytest.mark.parametrize(
    ("content", "reason"), [(None, "not built"), (b"not a library", "cannot be loaded")], ids=["missing", "broken"]
)
def test_library_that_cannot_be_loaded_is_a_reason_not_an_error(tmp_path, monkeypatch, content, reason):
    library = tmp_path / "_entropy_cpu.so"
    if content is not None:
        library.write_bytes(content)
    monkeypatch.setattr(native, "LIBRARY", library)
    assert reason in str(native.unavailable_reason(CPU, torch.float32))
    with pytest.raises(RuntimeError, match=reason):
        row_statistics(torch.zeros(1, 1, 4))


@pytest.mark.usefixtures("load_anew")
@pytest.mark.parametrize(
    ("function", "fields"),
    [("em_row_gradient", native._ARGUMENTS["em_row_gradient"] + "q"), ("em_limit_instructions", "q")],
    ids=["other", "older"],
)
def test_library_of_other_sources_is_a_reason_not_a_crash(monkeypatch, function, fields):
    monkeypatch.setitem(native._ARGUMENTS, function, fields)
    assert "other sources than this code" in str(native.unavailable_reason(CPU, torch.float32))
    with pytest.raises(RuntimeError, match="other sources than this code"):
        row_statistics(torch.zeros(1, 1, 4))


def test_a_gradient_has_strides_of_its_own():
    logits = torch.randn(2, 3, 7)
    out = torch.empty(1, 6, 9)[:, :, :7]
    loss, gradient = entropy_with_gradient(logits)
    actual = native.entropy_with_gradient(logits, None, Divisor(), Temperature(), out)
    assert torch.equal(actual, loss)
    assert torch.equal(out.reshape(2, 3, 7), gradient)


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [("cuda", torch.float32, "the logits are on cuda"), ("cpu", torch.float64, "the logits are torch.float64")],
)
def test_what_the_kernels_do_not_take_is_a_reason(device, dtype, reason):
    assert reason in str(native.unavailable_reason(torch.device(device), dtype))


def test_the_choice_of_a_backend_compiles_into_a_constant():
    @torch.compile(fullgraph=True, backend="eager")
    def double_if_it_runs(x: Tensor) -> Tensor:
        return x * 2 if native.unavailable_reason(x.device, x.dtype) is None else x

    assert double_if_it_runs(torch.ones(3)).tolist() == [2.0] * 3
