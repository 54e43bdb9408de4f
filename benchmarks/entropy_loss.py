"""Time, memory and error of the entropy loss on logits, beside a copy of the logits, eager PyTorch and torch.compile.

Each measurement is a row of FOLDER/entropy_loss.jsonl: `seconds` (median, with `p20` and `p80`), `bytes` by the
formulas below, `over_copy` = seconds over those of a copy of the logits in the same run, `over_bytes` = seconds over
the time a copy takes for that many bytes, `extra_bytes` of memory beyond the logits (the gradient included), and the
errors against float64 as defined in accuracy.py. `torch.nn.functional.cross_entropy` computes less, one logit of a row
and a normaliser, no sum over the distribution: it is there as the loss that everyone knows the cost of.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from accuracy import Reference, draw_logits
from memory import extra_bytes_in_fresh_process, extra_bytes_on_gpu
from timing import Arguments, Call, Timing, error_text, measure, run_all, slots_beyond_cache
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax, softmax

from em_kernels import entropy_loss
from em_kernels.ops import blocked, native_cpu

# Several times the 50 to 60 MB of second-level cache of an H100 or H200.
_GPU_LOGITS_BYTES = 512 << 20
_GPU_VOCABS = (32000, 49152, 128256, 151936, 262144)
_DECODE_VOCAB = 262144
# float16 gradients of a mean underflow without a loss scale; every contender gets this one as its upstream gradient.
_FLOAT16_SCALE = 2.0**14


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    rows: int
    vocab: int
    logits: str
    compiled: bool = True
    memory: bool = True
    budget: float = 8.0

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)


class Contender(NamedTuple):
    """`call(logits)` returns the loss, or None, and the gradient, or None.

    traffic: the least bytes to memory, in units of the logits' bytes; None where a compiler decides.
    loss: "entropy", "cross_entropy", or None for a copy.
    loss_weights: (rows,), the loss is their sum with the rows' losses; None: the loss is not reduced.
    gradient_weights: (rows,), the gradient is the rows' own gradients times these.
    """

    call: Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
    traffic: float | None
    loss: str | None = "entropy"
    loss_weights: Tensor | None = None
    gradient_weights: Tensor | None = None
    overwrites: bool = False


def configurations(size: str, device: str) -> Iterator[Configuration]:
    if size == "tiny":
        yield Configuration(device, "float32", 8, 1000, "peaked", budget=0.1)
        yield Configuration(device, "float32", 8, 1000, "flat", compiled=False, memory=False, budget=0.1)
        return
    full = size == "full"
    if device == "cpu":
        for rows, vocab in ((512, 49152), (256, 151936)):
            yield Configuration(device, "float32", rows, vocab, "peaked", budget=30)
            yield Configuration(device, "float32", rows, vocab, "flat", memory=False, budget=30)
        return
    for dtype in ("bfloat16", "float32", "float16"):
        # Each shape is compiled anew: without --size full only where it says most.
        for vocab in _GPU_VOCABS:
            rows = _GPU_LOGITS_BYTES // (vocab * getattr(torch, dtype).itemsize)
            yield Configuration(device, dtype, rows, vocab, "peaked", compiled=full or dtype == "bfloat16", budget=2)
            if full or (dtype == "bfloat16" and vocab == 151936):
                yield Configuration(device, dtype, rows, vocab, "flat", compiled=full, memory=False, budget=2)
        if full or dtype == "bfloat16":
            for rows in (1, 2, 4, 8, 16, 32, 64) if full else (1, 8, 64):
                yield Configuration(device, dtype, rows, _DECODE_VOCAB, "peaked", compiled=full, memory=False, budget=2)


def eager(logits: Tensor) -> Tensor:
    """The loss as it is published, in the dtype of the logits."""
    probabilities = softmax(logits, dim=-1)
    log_probabilities = log_softmax(logits, dim=-1)
    return -(probabilities * log_probabilities).sum(dim=-1).mean()


def clean(logits: Tensor) -> Tensor:
    """The loss as one would write it for a compiler that fuses: float32 inside, one softmax."""
    log_probabilities = log_softmax(logits.float(), dim=-1)
    return -(log_probabilities.exp() * log_probabilities).sum(dim=-1).mean()


def contenders(c: Configuration, target: Tensor) -> dict[tuple[str, str], Contender]:
    """By name and variant. With S the bytes of the logits, N V b, the least traffic is:

    copy              S + S                      read the logits, write them
    ours
      forward         S                          read
      mean            S + S                      read, write the gradient; the second reading finds the row in cache
      upstream        2 S + 2 S                  and the gradient is read, scaled, and written again
      none            S + (S + S)                read; read again and write the gradient
      float16         S + (S + S)                all three as "none": the gradient is made once the loss scale is known
      mask, share m   (1 - m) S + S              a masked row is not read, its gradient is written all the same
    eager
      forward         (2 + 2 + 3 + 1) S          softmax, log_softmax, product, sum
      backward        (4 + 3 + 3 + 3) S          of the product, of each softmax (two reads), and adding the two up
    cross_entropy
      forward         2 S                        log_softmax; one element a row of it is read
      backward        (1 + 3) S                  zeros but for the targets; of log_softmax (two reads)
    """
    device, dtype = torch.device(c.device), c.torch_dtype
    scale = _FLOAT16_SCALE if dtype == torch.float16 else 1.0
    mean = torch.full((c.rows,), 1 / c.rows, dtype=torch.float64, device=device)
    generator = torch.Generator(device).manual_seed(1)
    upstream = torch.rand(c.rows, generator=generator, device=device) * scale
    other_scale = 0.5 * scale
    order = torch.randperm(c.rows, generator=generator, device=device)
    three_passes = dtype == torch.float16

    def forward(loss: Callable[[Tensor], Tensor]) -> Callable[[Tensor], tuple[Tensor, None]]:
        def call(logits: Tensor) -> tuple[Tensor, None]:
            with torch.no_grad():
                return loss(logits), None

        return call

    def both(loss: Callable[[Tensor], Tensor], factor: float | Tensor = scale):
        # On the device beforehand, in either dtype that a loss may have; None, a backward() without argument, is 1.
        factors = {x: torch.as_tensor(factor, dtype=x, device=device) for x in (torch.float32, dtype)}

        def call(logits: Tensor) -> tuple[Tensor, Tensor]:
            value = loss(logits)
            grad = None if isinstance(factor, float) and factor == 1 else factors[value.dtype]
            # Not .backward(): accumulating in a leaf copies the gradient, which logits in a model, no leaf, do not pay.
            (gradient,) = torch.autograd.grad(value, logits, grad)
            return value.detach(), gradient

        return call

    def copy(logits: Tensor) -> tuple[None, Tensor]:
        # On the CPU into memory that is there: there, getting it from the system costs as much as the copy.
        return None, logits.detach().clone() if copied is None else copied.copy_(logits.detach())

    copied = None if device.type == "cuda" else torch.empty(c.rows, c.vocab, dtype=dtype, device=device)
    found: dict[tuple[str, str], Contender] = {("copy", "copy"): Contender(copy, 2, None)}

    def add(name: str, loss: Callable[[Tensor], Tensor], traffic: tuple[float | None, float | None], kind="entropy"):
        found[name, "forward"] = Contender(forward(loss), traffic[0], kind, mean)
        found[name, "forward+backward"] = Contender(both(loss), traffic[1], kind, mean, mean * scale)

    add("eager", eager, (8, 21))
    if c.compiled:
        add("torch.compile", torch.compile(clean, dynamic=False), (None, None))
    add("cross_entropy", lambda z: cross_entropy(z, target), (2, 6), "cross_entropy")
    add("ours", entropy_loss, (1, 3 if three_passes else 2))
    if c.device == "cpu" and native_cpu.unavailable_reason() is None:
        add("ours without compiled kernels", _without_compiled_kernels, (1, 2))

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
    return found | {("ours", variant): contender for variant, contender in ours.items()}


def _without_compiled_kernels(logits: Tensor) -> Tensor:
    compiled = blocked._runs_compiled
    blocked._runs_compiled = lambda logits: False
    try:
        return entropy_loss(logits)
    finally:
        blocked._runs_compiled = compiled


def run(c: Configuration) -> Iterator[dict[str, Any]]:
    """The rows of one configuration: every contender on the same logits."""
    device = torch.device(c.device)
    logits = draw_logits(c.logits, c.rows, c.vocab, c.torch_dtype, device)
    generator = torch.Generator(device).manual_seed(2)
    target = torch.randint(c.vocab, (c.rows,), generator=generator, device=device)
    exact = Reference(logits, target)
    mean_entropy = exact.values["entropy"].mean().item()
    logits_bytes = logits.numel() * logits.element_size()
    slots = [
        logits.clone().requires_grad_() for _ in range(slots_beyond_cache(logits_bytes, device))
    ]  # the same values in each: one reference serves for all
    torch.compiler.reset()
    every = contenders(c, target)
    errors: dict[str, tuple[float, float | None]] = {}
    keys = {f"{name} | {variant}": (name, variant) for name, variant in every}

    def check(key: str, result: tuple[Tensor | None, Tensor | None]) -> None:
        contender, (loss, gradient) = every[keys[key]], result
        if contender.loss is None:
            errors[key] = (0.0 if gradient is not None and torch.equal(gradient, logits) else float("inf"), None)
            return
        assert loss is not None
        gradient_error = None
        if gradient is not None and contender.gradient_weights is not None:
            gradient_error = exact.gradient_error(contender.loss, gradient, contender.gradient_weights)
        errors[key] = exact.loss_error(contender.loss, loss, contender.loss_weights), gradient_error

    def on_slot(call: Callable[[Tensor], Any], slot: int) -> Any:
        return call(slots[slot])

    def restore(slot: int) -> None:
        with torch.no_grad():
            slots[slot].copy_(logits)

    calls = {
        key: Call(partial(on_slot, every[name].call), restore if every[name].overwrites else None)
        for key, name in keys.items()
    }
    timings = measure(calls, device, slots=len(slots), budget=c.budget, check=check)
    copy = timings["copy | copy"]
    for key, (name, variant) in keys.items():
        timing, traffic = timings[key], every[name, variant].traffic
        row: dict[str, Any] = {
            "benchmark": "entropy_loss",
            **{k: v for k, v in asdict(c).items() if k in ("device", "dtype", "rows", "vocab", "logits")},
            "mean_entropy": mean_entropy,
            "contender": name,
            "variant": variant,
        }
        if not isinstance(timing, Timing):
            yield row | {"error": error_text(timing)}
            continue
        row |= {**timing._asdict(), "bytes": None if traffic is None else round(traffic * logits_bytes)}
        row["loss_error"], row["gradient_error"] = errors[key]
        if isinstance(copy, Timing):
            row["over_copy"] = timing.seconds / copy.seconds
            row["over_bytes"] = None if traffic is None else timing.seconds / (copy.seconds * traffic / 2)
        if c.memory:
            try:
                if device.type == "cuda":
                    row["extra_bytes"] = extra_bytes_on_gpu(partial(every[name, variant].call, slots[0]))
                    restore(0)
                else:
                    row["extra_bytes"] = extra_bytes_in_fresh_process(_prepare, c, (name, variant))
            except Exception as error:
                row["memory_error"] = error_text(error)
        yield row


def _prepare(c: Configuration, name: tuple[str, str]) -> Callable[[], Any]:
    target = torch.zeros(c.rows, dtype=torch.int64)
    logits = draw_logits(c.logits, c.rows, c.vocab, c.torch_dtype, torch.device("cpu")).requires_grad_()
    return partial(contenders(c, target)[name].call, logits)


def header(c: Configuration) -> str:
    return (
        f"{c.dtype} {c.rows} x {c.vocab} {c.logits}\n{'':48} {'ms':>9} {'p20':>9} {'p80':>9} {'/ copy':>7} "
        f"{'/ bytes':>7} {'extra MiB':>9} {'loss err':>8} {'grad err':>8}"
    )


def line(row: dict[str, Any]) -> str:
    start = f"{row['contender']:>30} {row['variant']:<17}"
    if "error" in row:
        return f"{start} {row['error']}"
    memory = f"{row['extra_bytes'] / 2**20:9.1f}" if "extra_bytes" in row else f"{'-':>9}"
    gradient = "-" if row["gradient_error"] is None else f"{row['gradient_error']:.1e}"
    return (
        f"{start} {row['seconds'] * 1e3:9.3f} {row['p20'] * 1e3:9.3f} {row['p80'] * 1e3:9.3f} "
        f"{row.get('over_copy', float('nan')):7.2f} {row.get('over_bytes') or float('nan'):7.2f} {memory} "
        f"{row['loss_error']:8.1e} {gradient:>8}"
    )


def main() -> None:
    folder, size, device = Arguments(__doc__).read()
    run_all("entropy_loss", folder, device, configurations(size, device.type), run, header, line)


if __name__ == "__main__":
    main()
