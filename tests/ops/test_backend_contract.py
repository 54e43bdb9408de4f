"""The contract of ops/backend.py, kept by every backend that runs on this machine."""

import itertools
from typing import NamedTuple

import pytest
import reference
import torch
from oracles import assert_entropy, assert_gradient, entropy_gradient, reference_stats
from torch import Tensor

from em_kernels.ops import backend, statistics
from em_kernels.ops.backend import Backend
from em_kernels.ops.backends import triton
from em_kernels.ops.types import EXTRA, Divisor, Sums, Temperature, Upstream, Wanted, statistics_dtype

INF, NAN = float("inf"), float("nan")
TAU_1, UNDIVIDED, EVERYTHING = Temperature(), Divisor(), Wanted(second_moment=True, extra=True)
# Fewer columns than any vector or block holds, and more than a block of the Triton and of the compiled kernels.
VOCABS = (1, 7, 1000, 9001)
ROWS = 6


class Subject(NamedTuple):
    """A backend whose functions take tensors from any device, and what the tests leave out."""

    name: str
    functions: Backend
    device: torch.device

    def place(self, value):
        """The tensor, or the tensors of a named tuple, on the backend's device."""
        if isinstance(value, Tensor):
            return value.to(self.device)
        return type(value)(*map(self.place, value)) if isinstance(value, tuple) else value

    def row_sums(self, logits, kept=None, temperature=TAU_1, target=None, wanted=EVERYTHING, **softcap):
        return self.functions.row_sums(*map(self.place, (logits, kept, temperature, target, wanted)), **softcap)

    def row_statistics(self, logits, kept=None, temperature=TAU_1, target=None, wanted=EVERYTHING, **softcap):
        return self.functions.row_statistics(*map(self.place, (logits, kept, temperature, target, wanted)), **softcap)

    def row_gradient(self, logits, saved, upstream, target=None, inplace=False, out=None, **softcap) -> Tensor:
        logits, target, upstream = map(self.place, (logits, target, upstream))
        if out is None:
            out = logits if inplace else logits.new_full(logits.shape, NAN)
        self.functions.row_gradient(logits, saved, target, upstream, out, **softcap)
        return out

    def entropy_with_gradient(
        self, logits, token_weight=None, divisor=UNDIVIDED, temperature=TAU_1, inplace=False, out=None, **softcap
    ):
        logits, *arguments = map(self.place, (logits, token_weight, divisor, temperature))
        if out is None:
            out = logits if inplace else logits.new_full(logits.shape, NAN)
        return self.functions.entropy_with_gradient(logits, *arguments, out, **softcap), out

    def skip_dtype(self, dtype: torch.dtype) -> None:
        reason = backend.unavailable_reason(self.name, self.device, dtype)
        if reason is not None:
            pytest.skip(reason)


@pytest.fixture(params=backend.NAMES)
def subject(request) -> Subject:
    on_gpu = request.param == "triton" and torch.cuda.is_available()
    device = torch.device("cuda" if on_gpu else "cpu")
    reason = backend.unavailable_reason(request.param, device)
    if reason is not None:
        pytest.skip(reason)
    return Subject(request.param, backend.implementation(request.param), device)


def test_the_interpreter_takes_tensors_of_the_cpu_alone(monkeypatch):
    monkeypatch.setattr(triton, "_interpreted", lambda: True)
    monkeypatch.setattr(triton, "_INSTALLED", True)
    assert triton.unavailable_reason(torch.device("cpu", 0), torch.float32) is None
    assert "the logits are on meta" in str(triton.unavailable_reason(torch.device("meta"), torch.float32))


@pytest.mark.parametrize("device", ["cpu", "cpu:0"])
def test_the_choice_on_the_cpu(device):
    runs = [name for name in ("native", "torch") if backend.unavailable_reason(name, torch.device("cpu")) is None]
    assert backend.choose(torch.device(device), torch.float32) == runs[0]


def draw(vocab: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows of several shapes, (2, 3, V), with a target and a temperature of each."""
    z = torch.randn(ROWS, vocab)
    z[1] *= 4
    z[2] += 1e4
    z[3, ::2] = -INF
    z[3, -1] = 0.5
    z[4] = 0.25
    target = torch.randint(vocab, (ROWS,))
    target[1], target[3] = z[1].argmax(), vocab - 1
    return z.view(2, 3, vocab), target, torch.tensor([1.0, 0.5, 2.0, 0.7, 1.0, 3.0])


def exact_sums(z: Tensor, temperature: Tensor) -> Sums:
    z = z.double()
    m = z.amax(-1)
    d = (z - m.unsqueeze(-1)) / temperature.double().unsqueeze(-1)
    e, finite = d.exp(), d.clamp(min=-1e100)
    count = torch.full_like(m, z.shape[-1])
    return Sums(m, e.sum(-1), (finite * e).sum(-1), (finite**2 * e).sum(-1), count, d.sum(-1), e.square().sum(-1))


def assert_close(actual: Tensor | None, expected: Tensor | None, rtol: float = 2e-6, atol: float = 1e-6) -> None:
    assert (actual is None) == (expected is None)
    if actual is not None:
        torch.testing.assert_close(actual.cpu().double(), expected.cpu().double(), rtol=rtol, atol=atol, equal_nan=True)


# Each choice of what is wanted at one vocabulary, and everything at each.
SIZES = [(v, EVERYTHING) for v in VOCABS] + [
    (130, w) for w in (Wanted(), Wanted(second_moment=True), Wanted(extra=True))
]
vocab_and_wanted = pytest.mark.parametrize(("vocab", "wanted"), SIZES, ids=str)


@vocab_and_wanted
@pytest.mark.parametrize("target", ["none", "elsewhere", "left out"])
def test_sums_are_those_of_every_column_but_the_targets(subject, vocab, target, wanted):
    if vocab == 1 and target == "left out":
        vocab = 2
    z, of_row, temperature = draw(vocab)
    left_out = {"none": None, "elsewhere": torch.where(of_row < vocab // 2, -1 - of_row, vocab + of_row)}
    actual = subject.row_sums(z, None, Temperature(temperature), left_out.get(target, of_row), wanted)
    columns = z.view(ROWS, vocab)
    if target == "left out":
        columns = columns[torch.arange(vocab) != of_row.unsqueeze(-1)].view(ROWS, vocab - 1)
    expected = exact_sums(columns, temperature)
    made = {"m", "s", "a", *["b"] * wanted.second_moment, *["columns", "sum_d", "sum_e2"] * wanted.extra}
    for name, sums, truth in zip(Sums._fields, actual, expected, strict=True):
        assert (sums is not None) == (name in made), name
        if sums is not None:
            assert sums.dtype == torch.float32
            # A row that is all -inf without its target is tested below.
            assert_close(sums, torch.where(expected.m == -INF, sums.cpu(), truth))


@pytest.mark.parametrize("vocab", [1, 2500], ids="V{}".format)
@pytest.mark.parametrize("first", [-INF, 1.0], ids=["banned", "the target alone is not banned"])
def test_a_row_of_banned_columns_has_the_sums_of_no_column(subject, vocab, first):
    z = torch.full((1, 2, vocab), -INF)
    z[..., 0] = first
    sums = subject.row_sums(z, target=torch.zeros(2, dtype=torch.int64))
    assert (sums.m == -INF).all()
    assert all((x == 0).all() for x in (sums.s, sums.a, sums.b, sums.sum_d, sums.sum_e2))
    assert (sums.columns == vocab - 1).all()


@pytest.mark.parametrize("culprit", [NAN, INF], ids=str)
@pytest.mark.parametrize("vocab", [1, 2500], ids="V{}".format)
def test_sums_over_nan_or_infinity_are_nan(subject, vocab, culprit):
    z = torch.zeros(1, 3, vocab)
    z[0, 1, vocab // 2] = culprit
    sums = subject.row_sums(z)
    for result in (sums.s, sums.a, sums.b, sums.sum_e2):
        assert result[1].isnan()
        assert result[::2].isfinite().all()


@pytest.mark.parametrize("wanted", [Wanted(), EVERYTHING], ids=["entropy", "everything"])
@pytest.mark.parametrize("ends", [(3, 1000), (500, 1000), (1, 400, 1000)], ids=str)
def test_shards_combine_into_the_whole(subject, ends, wanted):
    z, target, tau = draw(1000)
    z[0, 0, : ends[0]] = -INF  # a shard of banned columns
    target[0] = 999
    temperature = Temperature(tau)
    starts = (0, *ends[:-1])
    shards = [
        subject.row_sums(z[..., start:end].contiguous(), None, temperature, target - start, wanted)
        for start, end in zip(starts, ends, strict=True)
    ]
    parts = Sums(*(None if field[0] is None else torch.stack(field) for field in zip(*shards, strict=True)))
    temperature = subject.place(temperature)
    combined = statistics.combine(parts, temperature)
    for actual, of_whole in zip(combined, subject.row_sums(z, None, temperature, target, wanted), strict=True):
        assert_close(actual, of_whole)
    target_logit = statistics.target_logits(subject.place(z), subject.place(target))
    finished, _ = statistics.finish(combined, target_logit, None, temperature, torch.float32)
    expected, _ = subject.row_statistics(z, None, temperature, target, wanted)
    for actual, of_whole in zip(finished, expected, strict=True):
        assert_close(actual, of_whole, rtol=4e-6, atol=4e-6)


@vocab_and_wanted
@pytest.mark.parametrize("has_target", [False, True], ids=["no target", "target"])
def test_statistics_are_the_definitions(subject, vocab, has_target, wanted):
    z, target, tau = draw(vocab)
    check_statistics(subject, z, target if has_target else None, tau, wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_statistics_of_other_dtypes(subject, dtype):
    subject.skip_dtype(dtype)
    z, target, tau = draw(1000)
    check_statistics(subject, z.to(dtype), target, tau, EVERYTHING)


def check_statistics(subject: Subject, z: Tensor, target: Tensor | None, tau: Tensor, wanted: Wanted) -> None:
    actual, saved = subject.row_statistics(z, None, Temperature(tau), target, wanted)
    flat = z.view(ROWS, -1)
    expected = reference.row_statistics(flat, target, temperature=tau)
    assert actual.entropy.dtype == saved.planes.dtype == statistics_dtype(z.dtype)
    assert saved.planes.shape == (7, ROWS)
    assert wanted.second_moment or (saved.varentropy == 0).all()
    assert_entropy(actual.entropy, expected.entropy)
    assert_close(actual.lse, expected.lse)
    assert_close(actual.logprob, expected.logprob)
    assert_close(actual.varentropy, expected.varentropy if wanted.second_moment else None, rtol=1e-5, atol=2e-6)
    assert (actual.extra is not None) == wanted.extra
    if actual.extra is not None:
        extra = reference.extra_statistics(flat, target, temperature=tau)
        for name, statistic in zip(EXTRA, actual.extra, strict=True):
            truth = getattr(extra, name)
            assert_close(statistic, torch.zeros(ROWS) if truth is None else truth)


@pytest.mark.parametrize("gap", [5.0, 20.0, 40.0], ids="{} nats".format)
@pytest.mark.parametrize("vocab", [3, 2000], ids="V{}".format)
def test_a_confident_target_keeps_its_relative_accuracy(subject, vocab, gap):
    z = torch.full((1, 3, vocab), -gap - 30)
    z[..., 1], z[..., 2] = -gap, -gap - 1
    target = torch.tensor([0, vocab - 1, 1])
    z[0, range(3), target] = 0.0
    d = z[0].double()
    d[range(3), target] = -INF
    rest = d.exp().sum(-1)
    actual, saved = subject.row_statistics(z, target=target)
    assert_close(actual.logprob, -rest.log1p(), rtol=1e-5, atol=0)
    grad = subject.row_gradient(z, saved, Upstream(logprob=torch.ones(3)), target)
    assert_close(grad[0, range(3), target], rest / (1 + rest), rtol=1e-5, atol=0)
    assert_gradient(grad[0], torch.where(d == -INF, rest[:, None], -d.exp()) / (1 + rest[:, None]), torch.float32)


@pytest.mark.parametrize("vocab", [1, 2500], ids="V{}".format)
@pytest.mark.parametrize("culprit", [-INF, INF, NAN], ids=str)
@pytest.mark.parametrize("of", ["target", "another"])
def test_a_row_without_a_distribution_is_nan_in_every_result(subject, vocab, culprit, of):
    z = torch.zeros(1, 3, vocab)
    z[0, 1, slice(None) if culprit == -INF else -1] = culprit
    target = torch.full((3,), vocab - 1 if of == "target" else 0)
    one = torch.ones(3)
    actual, saved = subject.row_statistics(z, target=target)
    gradients = [subject.row_gradient(z, saved, Upstream(**{x: one}), target)[0].T for x in Upstream._fields]
    for result in (*actual, *gradients, subject.entropy_with_gradient(z)[1][0].T):
        assert result[..., 1].isnan().all()
        assert result[..., ::2].isfinite().all()
    assert subject.entropy_with_gradient(z)[0].isnan()


@pytest.mark.parametrize("target", [-1, 50, -100, 2**40])
def test_a_row_whose_target_does_not_exist_is_nan_in_every_statistic(subject, target):
    actual, _ = subject.row_statistics(torch.randn(1, 3, 50), target=torch.tensor([0, target, 49]))
    for result in actual:
        assert result[..., 1].isnan().all()
        assert result[..., ::2].isfinite().all()


@pytest.mark.parametrize("garbage", [NAN, INF, 1e38], ids=str)
@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
def test_masked_rows_are_not_read_and_are_zero(subject, garbage, inplace):
    z, target, tau = draw(100)
    kept = torch.tensor([True, False, True, True, True, False])
    z.view(ROWS, 100)[~kept] = garbage
    target[~kept], tau[~kept] = -5, NAN
    actual, saved = subject.row_statistics(z, kept, Temperature(tau), target)
    upstream = Upstream(*[torch.where(kept, 1.0, NAN)] * 4)
    gradients = [
        subject.row_gradient(z.clone(), saved, upstream, target, inplace),
        subject.entropy_with_gradient(z.clone(), kept, UNDIVIDED, Temperature(tau), inplace)[1],
        subject.entropy_with_gradient(z.clone(), kept.float(), UNDIVIDED, Temperature(tau), inplace)[1],
    ]
    for result in (*actual, saved.planes, *[x.view(ROWS, 100).T for x in gradients]):
        assert (result[..., ~kept] == 0).all()
        assert not result[..., kept].isnan().any()
        assert (result[..., kept] != 0).any()
    assert saved.kept.tolist() == kept.tolist()


def upstream_gradients(used: tuple[str, ...], dtype: torch.dtype = torch.float32) -> Upstream:
    """Gradients of several strides, that of an expanded one included."""
    strides = dict(zip(Upstream._fields, (0, 3, 1, 0), strict=True))
    return Upstream(**{name: torch.randn(20, dtype=dtype).as_strided((ROWS,), (strides[name],)) for name in used})


MIXES = [names for count in range(5) for names in itertools.combinations(Upstream._fields, count)]


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "inplace"])
@pytest.mark.parametrize("used", MIXES, ids=lambda names: "+".join(names) or "nothing")
def test_gradient_of_any_mix_of_the_statistics(subject, used, inplace):
    z, target, tau = draw(130)
    check_gradient(subject, z, target, tau, upstream_gradients(used), inplace)


@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(1000, torch.bfloat16), (1000, torch.float16), (1000, torch.float64), *((v, torch.float32) for v in VOCABS)],
    ids=str,
)
def test_gradient_of_any_vocabulary_and_dtype(subject, vocab, dtype):
    subject.skip_dtype(dtype)
    z, target, tau = draw(vocab)
    upstream = upstream_gradients(Upstream._fields, statistics_dtype(dtype))
    check_gradient(subject, z.to(dtype), target, tau, upstream)


def check_gradient(subject, z: Tensor, target: Tensor, tau: Tensor, upstream: Upstream, inplace: bool = False) -> None:
    wanted = Wanted(second_moment=upstream.varentropy is not None)
    _, saved = subject.row_statistics(z, None, Temperature(tau), target, wanted)
    _, expected = reference_stats(z.view(ROWS, -1), target, None, upstream, tau)
    actual = subject.row_gradient(z, saved, upstream, target, inplace)
    # The parts of a mix, and the two parts of a probability's gradient, may cancel.
    scale = sum(g.abs() for g in upstream if g is not None) / tau
    assert_gradient(actual.view(ROWS, -1), expected, z.dtype, scale=scale)


@pytest.mark.parametrize("ends", [(3, 1000), (400, 800, 1000)], ids=str)
def test_a_shards_gradient_is_that_of_its_columns(subject, ends):
    z, target, tau = draw(1000)
    upstream = upstream_gradients(Upstream._fields)
    _, saved = subject.row_statistics(z, None, Temperature(tau), target)
    whole = subject.row_gradient(z, saved, upstream, target)
    starts = (0, *ends[:-1])
    shards = [
        subject.row_gradient(z[..., start:end].contiguous(), saved, upstream, target - start)
        for start, end in zip(starts, ends, strict=True)
    ]
    assert_gradient(torch.cat(shards, dim=-1), whole.double().cpu(), torch.float32)


@pytest.mark.parametrize("factor", [1.0, 0.0, -2.5])
def test_scale(subject, factor):
    gradient = subject.place(torch.randn(2, 3, 7))
    expected = gradient * factor
    subject.functions.scale_(gradient, subject.place(torch.tensor(factor)))
    assert torch.equal(gradient, expected)


WEIGHTS = [None, torch.tensor([1, 1, 0, 1, 0, 1]) == 1, torch.tensor([0.5, 2, 0, 1, 0.25, 3]), torch.zeros(ROWS)]
DIVISORS = [
    UNDIVIDED,
    Divisor(number=4),
    Divisor(torch.tensor(2.5)),
    Divisor(torch.tensor(7), number=2),
    Divisor(torch.tensor(0.0), number=2),
]


DIVISOR_IDS = ["sum", "count", "total", "integer total and count", "zero"]


@pytest.mark.parametrize("divisor", DIVISORS, ids=DIVISOR_IDS)
@pytest.mark.parametrize("weight", WEIGHTS, ids=["no weight", "bool", "float", "zero"])
def test_loss_and_gradient(subject, weight, divisor):
    z, _, tau = draw(150)
    flat = z.view(ROWS, -1).clone()
    factor = torch.ones(ROWS) if weight is None else weight.double()
    factor = factor / divisor.number / (1 if divisor.total is None else divisor.total.item() or 1)
    loss, grad = subject.entropy_with_gradient(z, weight, divisor, Temperature(tau))
    assert loss.shape == ()
    assert loss.dtype == torch.float32
    assert_close(loss, (factor * reference.row_statistics(flat, temperature=tau).entropy).sum())
    assert_gradient(grad.view(ROWS, -1), factor.unsqueeze(-1) * entropy_gradient(flat.double(), tau), torch.float32)


@pytest.mark.parametrize("softcap", [None, 5.0], ids=["no cap", "cap"])
@pytest.mark.parametrize("divisor", [*DIVISORS, Divisor(of_weights=True)], ids=[*DIVISOR_IDS, "of weights"])
@pytest.mark.parametrize("weight", WEIGHTS, ids=["no weight", "bool", "float", "zero"])
def test_loss_without_a_gradient_is_that_with_one(subject, weight, divisor, softcap):
    if divisor.of_weights and weight is None:
        pytest.skip("there are no weights to sum")
    z, _, tau = draw(150)
    if weight is not None:
        z.view(ROWS, -1)[weight == 0] = NAN
    before = z.clone()
    arguments = map(subject.place, (z, weight, divisor, Temperature(tau)))
    alone = subject.functions.entropy_with_gradient(*arguments, None, softcap)
    assert_close(alone, subject.entropy_with_gradient(z, weight, divisor, Temperature(tau), softcap=softcap)[0])
    assert alone.shape == ()
    assert alone.dtype == torch.float32
    assert alone.isfinite()
    assert torch.equal(z.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize("vocab", VOCABS, ids="V{}".format)
@pytest.mark.parametrize("common", [0.5, 1.0, 30.0], ids="tau{}".format)
def test_loss_and_gradient_of_any_vocabulary_at_one_temperature(subject, vocab, common):
    z, *_ = draw(vocab)
    flat = z.view(ROWS, -1)
    loss, grad = subject.entropy_with_gradient(z, temperature=Temperature(common=common))
    assert_close(loss, reference.row_statistics(flat, temperature=common).entropy.sum())
    assert_gradient(grad.view(ROWS, -1), entropy_gradient(flat.double(), common), torch.float32)


@pytest.mark.parametrize("layout", ["without the last token", "transposed", "expanded", "no rows"])
def test_rows_of_any_strides_are_those_of_the_contiguous_copy(subject, layout):
    whole = subject.place(torch.randn(2, 3, 77))
    z = {
        "without the last token": whole[:, :-1, :70],
        "transposed": whole.transpose(0, 1)[..., 3:],
        "expanded": whole[:1].expand(2, 3, 77),
        "no rows": whole[:0],
    }[layout]
    rows = z.shape[0] * z.shape[1]
    target, weight = torch.arange(rows) % 70, torch.linspace(1, 2, rows)
    results = []
    for logits in (z, z.contiguous()):
        actual, saved = subject.row_statistics(logits, target=target)
        gradient = subject.row_gradient(logits, saved, Upstream(*[weight] * 4), target)
        assert gradient.shape == z.shape
        sums = subject.row_sums(logits, target=target)
        results.append((*actual, *saved.planes, *sums, gradient, *subject.entropy_with_gradient(logits, weight)))
    for actual, expected in zip(*results, strict=True):
        # Rows that begin elsewhere between two boundaries are summed in another order.
        assert_close(actual, expected, rtol=4e-6, atol=1e-6)


def test_in_place_gradients_leave_the_memory_between_rows_alone(subject):
    whole = subject.place(torch.randn(2, 3, 77))
    before = whole.clone()
    for z in (whole[:, :-1], whole[:, :-1, :70]):
        expected = subject.entropy_with_gradient(z)[1]
        assert subject.entropy_with_gradient(z, inplace=True)[1].data_ptr() == whole.data_ptr()
        assert_close(z, expected)
        _, saved = subject.row_statistics(z)
        upstream = Upstream(entropy=torch.ones(4))
        expected = subject.row_gradient(z, saved, upstream)
        subject.row_gradient(z, saved, upstream, inplace=True)
        assert_close(z, expected)
    assert torch.equal(whole[:, -1], before[:, -1])


# ------------------------------------------------------------------------------------------------------------- softcap


def capped(z: Tensor, softcap: float) -> Tensor:
    z = z.double()
    return torch.where(z.isinf(), z, softcap * torch.tanh(z / softcap))


# A float32 logit next to the cap is rounded to a few millionths of its distance from the others.
CAPPED = {"rtol": 1e-5, "atol": 1e-5}


@pytest.mark.parametrize(("vocab", "softcap"), [(7, 5.0), (9001, 30.0)])
def test_softcap_in_sums_and_statistics(subject, vocab, softcap):
    z, target, tau = draw(vocab)
    expected_logits = capped(z, softcap).view(ROWS, vocab)
    sums = subject.row_sums(z, None, Temperature(tau), softcap=softcap)
    for actual, truth in zip(sums, exact_sums(expected_logits, tau), strict=True):
        assert_close(actual, truth, **CAPPED)
    actual, _ = subject.row_statistics(z, None, Temperature(tau), target, softcap=softcap)
    expected = reference.row_statistics(expected_logits, target, temperature=tau)
    for statistic, truth in zip(actual, expected, strict=False):
        assert_close(statistic, truth, **CAPPED)
    extra = reference.extra_statistics(expected_logits, target, temperature=tau)
    for name, statistic in zip(EXTRA, actual.extra, strict=True):
        assert_close(statistic, getattr(extra, name), **CAPPED)


@pytest.mark.parametrize(
    ("vocab", "dtype", "inplace"),
    [
        (7, torch.float32, True),
        (9001, torch.float32, False),
        (9001, torch.float32, True),
        (1000, torch.bfloat16, False),
        (1000, torch.float16, True),
    ],
    ids=str,
)
def test_softcap_in_gradients(subject, vocab, dtype, inplace):
    subject.skip_dtype(dtype)
    softcap = 5.0
    z, target, tau = draw(vocab)
    z = z.to(dtype)
    flat = z.view(ROWS, vocab)
    expected_logits, slope = capped(flat, softcap), torch.cosh(flat.double() / softcap) ** -2
    upstream = upstream_gradients(Upstream._fields)
    _, saved = subject.row_statistics(z, None, Temperature(tau), target, softcap=softcap)
    _, expected = reference_stats(expected_logits, target, None, upstream, tau)
    actual = subject.row_gradient(z.clone(), saved, upstream, target, inplace, softcap=softcap)
    scale = 10 * sum(g.abs() for g in upstream) / tau
    assert_gradient(actual.view(ROWS, vocab), expected * slope, dtype, scale=scale)

    loss, actual = subject.entropy_with_gradient(z.clone(), None, UNDIVIDED, Temperature(tau), inplace, softcap=softcap)
    assert_close(loss, reference.row_statistics(expected_logits, temperature=tau).entropy.sum(), **CAPPED)
    assert_gradient(actual.view(ROWS, vocab), entropy_gradient(expected_logits, tau) * slope, dtype, scale=10 / tau)


def test_softcaps_slope_keeps_its_relative_accuracy_next_to_the_cap(subject):
    # From 1e-5 down to 1e-7, where 1 - tanh^2 in float32 has a digit left, or none.
    z = torch.linspace(6, 8.5, 300).repeat(2).view(1, 2, 300) * 5.0
    _, saved = subject.row_statistics(z, softcap=5.0)
    actual = subject.row_gradient(z, saved, Upstream(lse=torch.ones(2)), softcap=5.0)
    expected = capped(z, 5.0).softmax(-1) * torch.cosh(z.double() / 5.0) ** -2
    assert_close(actual, expected, rtol=2e-5, atol=0)


@pytest.mark.parametrize("vocab", [3, 2500], ids="V{}".format)
def test_softcap_leaves_infinite_logits_alone(subject, vocab):
    z = torch.randn(1, 5, vocab)
    z[0, 0, -1] = -INF  # banned
    z[0, 1], z[0, 2, 0], z[0, 3, -1] = -INF, INF, NAN
    target, one = torch.zeros(5, dtype=torch.int64), torch.ones(5)
    actual, saved = subject.row_statistics(z, target=target, softcap=5.0)
    gradients = [
        *(subject.row_gradient(z, saved, Upstream(**{x: one}), target, softcap=5.0) for x in Upstream._fields),
        subject.entropy_with_gradient(z, softcap=5.0)[1],
    ]
    banned = subject.row_statistics(z[:, :1, :-1].contiguous(), target=target[:1], softcap=5.0)[0]
    assert_close(actual.entropy[:1], banned.entropy)
    for result in (*actual[:4], *[x[0].T for x in gradients]):
        assert result[..., 1:4].isnan().all()
        assert result[..., [0, 4]].isfinite().all()
    assert all((x[0, 0, -1] == 0).all() for x in gradients)


# ------------------------------------------------------------------------------------- gradients in memory of their own


@pytest.mark.parametrize(
    ("vocab", "dtype", "padded", "softcap"),
    [
        (7, torch.float32, True, None),
        (7, torch.bfloat16, True, 5.0),
        (7, torch.float16, False, None),
        (2500, torch.float32, True, 5.0),
        (2500, torch.bfloat16, False, 5.0),
        (9001, torch.bfloat16, True, None),
        (2500, torch.float16, True, None),
    ],
    ids=str,
)
def test_gradients_in_a_narrower_dtype_and_in_padded_rows(subject, vocab, dtype, padded, softcap):
    z, target, tau = draw(vocab)
    options = {} if softcap is None else {"softcap": softcap}
    z, temperature = z.reshape(1, ROWS, vocab), Temperature(tau)
    kept = torch.tensor([True, True, True, False, True, True])
    upstream = upstream_gradients(Upstream._fields)
    _, saved = subject.row_statistics(z, kept, temperature, target, **options)

    def out() -> tuple[Tensor, Tensor]:
        whole = subject.place(torch.full((ROWS, -(-vocab // 64) * 64 if padded else vocab), 7.0, dtype=dtype))
        return whole, whole[None, :, :vocab]

    for function, arguments in (
        (subject.row_gradient, (saved, upstream, target)),
        (lambda *a, **k: subject.entropy_with_gradient(*a, **k)[1], (kept, Divisor(number=3), temperature)),
    ):
        in_float32 = function(z, *arguments, **options)
        whole, actual = out()
        function(z, *arguments, out=actual, **options)
        # Rounded once, so to the neighbour that is next: another order of the sums may decide between two.
        assert_gradient(actual[0], in_float32[0].cpu().double(), dtype)
        assert (actual[0, 3] == 0).all()
        assert (whole[:, vocab:] == 7).all()


def test_padded_rows_of_16_bits(subject):
    subject.skip_dtype(torch.bfloat16)
    z = subject.place(torch.randn(1, ROWS, 192).bfloat16())[..., :130]
    expected = subject.entropy_with_gradient(z)[1]
    whole = subject.place(torch.full((ROWS, 256), 7.0, dtype=torch.bfloat16))
    assert torch.equal(subject.entropy_with_gradient(z, out=whole[None, :, :130])[1], expected)
    assert (whole[:, 130:] == 7).all()
