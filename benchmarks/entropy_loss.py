"""This suite measures the entropy loss on logits beside a copy of the logits and the losses that people use.

Each measurement is a row. `seconds` is the median time, with the percentiles `p20` and `p80`. `bytes` is the least
traffic by the formulas below. `over_floor` is the time over that of a copy of the logits in the same run, and
`over_bytes` the time over that in which a copy moves that many bytes. `extra_bytes` is the memory beyond the logits,
with the gradient. The errors are against float64, as accuracy.py defines them. `computes` names the loss: peers.py says
what is compared with what.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accuracy import SEED, Reference, demand, draw_logits, draw_targets
from memory import extra_bytes_in_fresh_process, extra_bytes_on_gpu
from peers import peers
from rows import error_text
from suite import Prepared, rows_of
from timing import Call, copier, slots_beyond_cache
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from em_kernels import entropy_loss
from em_kernels.ops import backend

_VOCABS = (32000, 49152, 128256, 151936, 262144)
_PAPER_VOCAB = 152064  # Qwen2.5-Math-7B
# The logits are several times as large as the second-level cache: 50 to 60 MB on an H100 or H200, less on a CPU.
_LOGITS_BYTES = {"cuda": 512 << 20, "cpu": 96 << 20}
# float16 gradients of a mean underflow without a loss scale. This one is the upstream gradient of every contender.
_FLOAT16_SCALE = 2.0**14


# Memory seldom runs out in the forward alone, and a mask does not change it.
_MEASURED_IN_MEMORY = ("copy", "forward+backward", "inplace_backward")


# These are the bounds on our own errors. In float32 a bound is twice what is promised of a gradient and of a loss,
# because the means and factors here round once more. In 16 bits it is one unit in the last place of the row's largest
# entry.
_BOUNDS = {
    torch.float32: {"loss_error": 4e-6, "gradient_error": 4e-6},
    torch.bfloat16: {"loss_error": 4e-6, "gradient_error": 2**-7},
    torch.float16: {"loss_error": 4e-6, "gradient_error": 2**-9},
}


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    rows: int
    vocab: int
    logits: str = "peaked"
    # The part is the question that the shape helps to answer: "vocabularies", "tokens", "dtypes" or "distributions".
    part: str = "vocabularies"
    compiled: bool = True
    memory: bool = False
    budget: float = 2.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Contender(NamedTuple):
    """A loss whose `call(logits)` returns a pair: the loss or None, and the gradient or None.

    Attributes:
        traffic: the least bytes to and from memory, in units of the logits' bytes; None where the number is unknown.
        loss: "entropy", "cross entropy", or None for a copy.
        loss_weights: (rows,): the loss is the sum of the rows' losses with these weights; None where it is not reduced.
        gradient_weights: (rows,): the gradient is each row's own gradient times its factor.
        overwrites: whether the gradient is written into the logits.
    """

    call: Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
    traffic: float | None
    loss: str | None = "entropy"
    loss_weights: Tensor | None = None
    gradient_weights: Tensor | None = None
    overwrites: bool = False


def configurations(size: str, device: str) -> Iterator[Configuration]:
    """Yield the shapes to measure. The first two say most, and docs/benchmarks.md shows them in full."""
    main, full = "float32" if device == "cpu" else "bfloat16", size == "full"
    # On a shared CPU the median of fifteen rounds, which take 15 seconds, has moved by a third from run to run.
    budget = 2.0 if device == "cuda" else 45.0 if full else 6.0

    def of(dtype: str, vocab: int, tokens: int | None = None, **how: Any) -> Configuration:
        rows = tokens or _LOGITS_BYTES[device] // (vocab * getattr(torch, dtype).itemsize)
        return Configuration(device, dtype, rows, vocab, **{"budget": budget, **how})

    if size == "tiny":
        yield of("float32", 1000, 8, memory=True, budget=0.1)
        yield of("float32", 1000, 8, logits="flat", part="distributions", compiled=False, budget=0.1)
        return
    if size == "paper":
        yield of("float32", _PAPER_VOCAB, memory=True)
        yield of("bfloat16", _PAPER_VOCAB, part="dtypes", memory=True)
        return
    yield of(main, 49152)
    yield of(main, 151936, memory=True)
    if not full and device == "cpu":
        return
    # torch.compile compiles each shape anew, which on a GPU takes most of the time.
    for vocab in (32000, 128256, 262144):
        yield of(main, vocab, compiled=full)
    yield of(main, 151936, logits="flat", part="distributions", compiled=full)
    for dtype in sorted({"float32", "bfloat16", "float16"} - {main}):
        for vocab in _VOCABS if full and device == "cuda" else (49152,):
            yield of(dtype, vocab, part="dtypes", compiled=full)
    for tokens in (64, 1024, 4096, 16384) if device == "cuda" else (64, 2048):
        yield of(main, 151936 if device == "cuda" else 49152, tokens, part="tokens", compiled=False, memory=True)
    if device == "cuda":
        # A decoding step has too few rows to give every multiprocessor one.
        for tokens in (1, 2, 4, 8, 16, 32) if full else (1, 8):
            yield of(main, 262144, tokens, part="tokens", compiled=False)


def eager(logits: Tensor) -> Tensor:
    """Return the loss as it is published, in the dtype of the logits."""
    probabilities = softmax(logits, dim=-1)
    return -(probabilities * torch.log(probabilities + 1e-12)).sum(dim=-1).mean()


def clean(logits: Tensor) -> Tensor:
    """Return the loss as one would write it for a compiler that fuses: float32 inside, and a single softmax."""
    log_probabilities = log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


def contenders(c: Configuration, target: Tensor, only: str | None = None) -> dict[str, Contender]:
    """Return the contenders by "name | variant". With `only`, peers other than that one are not imported.

    With S the bytes of the logits, N V b, the least traffic is:

    copy              S + S                      the logits are read and written
    ours
      forward         S                          the logits are read
      mean            S + S                      the gradient is written too; the second reading finds the row in cache
      upstream        2 S + 2 S                  the gradient is also read, scaled, and written again
      none            S + (S + S)                the logits are read again in the backward, which writes the gradient
      float16         S + (S + S)                mean and upstream are like "none": the loss scale is known only then
      mask, share m   (1 - m) S + S              a masked row is not read, and its gradient is written all the same
    eager
      forward         (2 + 2 + 2 + 3 + 1) S      softmax, adding 1e-12, log, product, sum
      backward        (4 + 3 + 3 + 3) S          gradients of product, log, their sum, softmax (two reads)
    cross_entropy
      forward         2 S                        log_softmax; its result is read at one element a row
      backward        (1 + 3) S                  zeros but for the targets; gradient of log_softmax (two reads)
    """
    device, dtype = torch.device(c.device), c.torch_dtype
    scale = _FLOAT16_SCALE if dtype == torch.float16 else 1.0
    mean = torch.full((c.rows,), 1 / c.rows, dtype=torch.float64, device=device)
    generator = torch.Generator(device).manual_seed(SEED + 1)
    upstream = torch.rand(c.rows, generator=generator, device=device) * scale
    other_scale = 0.5 * scale
    order = torch.randperm(c.rows, generator=generator, device=device)
    three_passes = dtype == torch.float16

    def forward(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, None]]:
        def call(logits: Tensor) -> tuple[Tensor, None]:
            # The logits are detached, because some losses make their gradient whenever the logits ask for one, even in
            # no_grad.
            with torch.no_grad():
                return loss(logits.detach()), None

        return call

    def both(loss: Callable[[Tensor], Tensor], factor: float | Tensor = scale):
        # The factors are on the device beforehand, in both dtypes that a loss may have. None means 1, as in a
        # backward() without argument.
        factors = {x: torch.as_tensor(factor, dtype=x, device=device) for x in (torch.float32, dtype)}

        def call(logits: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(logits)
            grad = None if isinstance(factor, float) and factor == 1 else factors[value.dtype]
            # .backward() would copy the gradient into a leaf. In a model the logits are no leaf and do not pay for
            # that.
            (gradient,) = torch.autograd.grad(value, logits, grad)
            return value.detach(), gradient

        return call

    copy = copier(c.rows, c.vocab, dtype, device)
    found = {"copy | copy": Contender(lambda logits: (None, copy(logits)), 2, None)}

    def add(
        name: str,
        loss: Callable[[Tensor], Tensor],
        traffic: tuple[float | None, float | None],
        kind: str = "entropy",
        overwrites: bool = False,
    ) -> None:
        found[f"{name} | forward"] = Contender(forward(loss), traffic[0], kind, mean)
        found[f"{name} | forward+backward"] = Contender(both(loss), traffic[1], kind, mean, mean * scale, overwrites)

    add("eager", eager, (10, 23))
    if c.compiled:
        add("torch.compile", torch.compile(clean, dynamic=False), (None, None))
    add("cross_entropy", lambda z: cross_entropy(z, target), (2, 6), "cross entropy")
    for peer, function in peers("logits", _GIVES, device, only and only.partition(" | ")[0])[0].items():
        loss = partial(_with_target, function, target)
        add(peer.name, loss, (None, None), peer.gives, peer.overwrites)
        if c.device not in peer.differentiable:
            del found[f"{peer.name} | forward+backward"]
    add("ours", entropy_loss, (1, 3 if three_passes else 2))
    if backend.choose(device, dtype) == "native":
        add("ours, backend torch", partial(entropy_loss, backend="torch"), (1, 2))

    ours: dict[str, Contender] = {
        "inplace_backward": Contender(
            both(lambda z: entropy_loss(z, inplace_backward=True)),
            3 if three_passes else 2,
            "entropy",
            mean,
            mean * scale,
            overwrites=True,
        ),
        "reduction none": Contender(
            both(lambda z: entropy_loss(z, reduction="none"), upstream), 3, "entropy", None, upstream
        ),
        "upstream not 1": Contender(
            both(entropy_loss, other_scale), 3 if three_passes else 4, "entropy", mean, mean * other_scale
        ),
    }
    for share in (0.0, 0.5, 0.9):
        masked = int(share * c.rows)
        kept = order >= masked
        weights = kept.double() / (c.rows - masked)
        ours[f"masked {share:g}"] = Contender(
            both(partial(entropy_loss, mask=kept)),
            (1 - masked / c.rows) * (2 if three_passes else 1) + 1,
            "entropy",
            weights,
            weights * scale,
        )
    return found | {f"ours | {variant}": contender for variant, contender in ours.items()}


_GIVES = ("entropy", "cross entropy")


def _with_target(function: Callable[[Tensor, Tensor], Tensor], target: Tensor, logits: Tensor) -> Tensor:
    return function(logits, target)


def missing(device: torch.device) -> dict[str, str]:
    return peers("logits", _GIVES, device)[1]


def names(c: Configuration) -> list[str]:
    return list(contenders(c, torch.zeros(c.rows, dtype=torch.int64, device=c.device)))


def prepare(c: Configuration, only: str | None = None) -> Prepared:
    """Return the contenders on the same logits. With `only`, peers other than that one are left out."""
    device = torch.device(c.device)
    logits = draw_logits(c.logits, c.rows, c.vocab, c.torch_dtype, device)
    target = draw_targets(logits)
    exact = Reference(logits, target)
    mean_entropy = exact.values["entropy"].mean().item()
    logits_bytes = logits.numel() * logits.element_size()
    # The slots hold the same values, so that one reference serves for all.
    slots = [logits.clone().requires_grad_() for _ in range(slots_beyond_cache(logits_bytes, device))]
    torch.compiler.reset()
    every = contenders(c, target, only)

    def check(name: str, result: tuple[Tensor | None, Tensor | None]) -> dict[str, float | None]:
        contender, (loss, gradient) = every[name], result
        if not contender.overwrites and not all(torch.equal(slot, logits) for slot in slots):
            raise ArithmeticError("the logits have been overwritten, by this contender or by one before it")
        if contender.loss is None:
            if gradient is None or not torch.equal(gradient, logits):
                raise ArithmeticError("the copy is not equal to what was copied")
            return {"loss_error": 0.0, "gradient_error": None}
        assert loss is not None
        gradient_error = None
        if gradient is not None and contender.gradient_weights is not None:
            gradient_error = exact.gradient_error(contender.loss, gradient, contender.gradient_weights)
        loss_error = exact.loss_error(contender.loss, loss, contender.loss_weights)
        return demand(name, {"loss_error": loss_error, "gradient_error": gradient_error}, _BOUNDS[c.torch_dtype])

    def on_slot(call: Callable[[Tensor], Any], slot: int) -> Any:
        return call(slots[slot])

    def restore(slot: int) -> None:
        with torch.no_grad():
            slots[slot].copy_(logits)

    calls = {
        name: Call(partial(on_slot, contender.call), restore if contender.overwrites else None)
        for name, contender in every.items()
    }
    notes = {
        name: {
            "computes": contender.loss,
            "mean_entropy": mean_entropy,
            "bytes": None if contender.traffic is None else round(contender.traffic * logits_bytes),
        }
        for name, contender in every.items()
    }
    return Prepared(calls, len(slots), check, notes, "copy | copy")


def timed_rows(benchmark: str, c: Configuration, prepared: Prepared) -> Iterator[dict[str, Any]]:
    """Measure the contenders and yield a row for each, without its memory."""
    logits_bytes = c.rows * c.vocab * c.torch_dtype.itemsize
    for row in rows_of(benchmark, c, prepared):
        if "over_floor" in row and row["bytes"] is not None:
            row["over_bytes"] = row["over_floor"] * 2 * logits_bytes / row["bytes"]
        yield row


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    prepared = prepare(c)
    for row in timed_rows("entropy_loss", c, prepared):
        if c.memory and "seconds" in row and row["variant"] in _MEASURED_IN_MEMORY:
            try:
                row["extra_bytes"] = _extra_bytes(c, prepared, f"{row['contender']} | {row['variant']}")
            except Exception as error:
                row["memory_error"] = error_text(error)
        yield row


def _extra_bytes(c: Configuration, prepared: Prepared, name: str) -> int:
    if c.device == "cpu":
        return extra_bytes_in_fresh_process(_in_fresh_process, c, name)
    call = prepared.calls[name]
    extra = extra_bytes_on_gpu(partial(call.run, 0))
    if call.restore is not None:
        call.restore(0)
    return extra


def _in_fresh_process(c: Configuration, name: str) -> Callable[[], Any]:
    target = torch.zeros(c.rows, dtype=torch.int64)
    logits = draw_logits(c.logits, c.rows, c.vocab, c.torch_dtype, torch.device("cpu")).requires_grad_()
    return partial(contenders(c, target, only=name)[name].call, logits)


def header(c: Configuration) -> str:
    return (
        f"{c.dtype} {c.rows} x {c.vocab} {c.logits}\n{'':56} {'ms':>9} {'p20':>9} {'p80':>9} {'/ copy':>7} "
        f"{'/ bytes':>7} {'extra MiB':>9} {'loss err':>8} {'grad err':>8}"
    )


def line(row: dict[str, Any]) -> str:
    memory = f"{row['extra_bytes'] / 2**20:9.1f}" if "extra_bytes" in row else f"{'-':>9}"
    gradient = "-" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
    return (
        f"{row['seconds'] * 1e3:9.3f} {row['p20'] * 1e3:9.3f} {row['p80'] * 1e3:9.3f} "
        f"{row.get('over_floor', float('nan')):7.2f} {row.get('over_bytes') or float('nan'):7.2f} {memory} "
        f"{row['loss_error']:8.1e} {gradient:>8}"
    )
