"""Time, memory and error of the entropy loss on hidden states, beside its three matmuls and the losses on logits.

Each measurement is a row of FOLDER/linear_entropy.jsonl, forward + backward of the mean at temperature 0.5: `seconds`
(median, with `p20` and `p80`), `over_matmuls` = seconds over those of the three plain matmuls of 2 N V D that any dense
path needs, `extra_bytes` of memory beyond the operands (their gradients included), and errors against float64 on the
very operands: of the loss relative to it plus 0.15, of the gradients as the norm of the error over the norm.
`rows_kept` and `columns_kept` are the shares of the first 512 tokens, and of the vocabulary in these, with an entry of
the logits' gradient above 1e-6.

On the CPU the operands are a real model's: the output projection of SmolLM2-135M-Instruct and the hidden states of its
own completions. Elsewhere they are drawn so that the distributions are about as peaked.
"""

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from entropy_loss import clean, eager
from memory import extra_bytes_in_fresh_process, extra_bytes_on_gpu
from timing import Arguments, Call, Timing, error_text, measure, run_all, slots_beyond_cache
from torch import Tensor

from em_kernels import entropy_loss, linear_entropy_loss
from em_kernels.ops import reference

_TEMPERATURE = 0.5
_TOLERANCE = 1e-6
_REFERENCE_ROWS = 128
# (D, V) of models that people train.
_MODELS = {
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3.1-8B": (4096, 128256),
    "Gemma-3-270M": (640, 262144),
    "SmolLM2-135M": (576, 49152),
}


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    model: str
    rows: int
    dim: int
    vocab: int
    compiled: bool = True
    time: bool = True
    budget: float = 8.0


class Operands(NamedTuple):
    hidden: Tensor
    weight: Tensor


# Returns the loss and the gradients of hidden and of weight, None where it makes none.
Contender = Callable[[Operands], tuple[Tensor | None, ...]]


def configurations(size: str, device: str) -> Iterator[Configuration]:
    if size == "tiny":
        yield Configuration(device, "float32", "drawn", 24, 16, 1000, budget=0.1)
        return
    if device == "cpu":
        yield Configuration(device, "float32", "SmolLM2-135M", 2048, *_MODELS["SmolLM2-135M"], budget=150)
        for rows in (512, 1024, 2048, 4096, 8192):
            yield Configuration(device, "float32", "drawn", rows, *_MODELS["SmolLM2-135M"], compiled=False, time=False)
        return
    for model in _MODELS if size == "full" else ("Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3.1-8B"):
        yield Configuration(device, "bfloat16", model, 8192, *_MODELS[model], compiled=size == "full", budget=6)
    for rows in (4096, 8192, 16384, 32768):
        yield Configuration(device, "bfloat16", "Qwen2.5-0.5B", rows, *_MODELS["Qwen2.5-0.5B"], False, time=False)


def draw(c: Configuration) -> Operands:
    """Hidden states along some of the first fiftieth of the weight's rows: most of the vocabulary is unlikely."""
    generator = torch.Generator(c.device).manual_seed(0)
    options = {"generator": generator, "device": c.device}
    weight = torch.randn(c.vocab, c.dim, **options) / c.dim**0.5
    likely = torch.randint(max(3, c.vocab // 50), (c.rows, 3), **options)
    hidden = torch.zeros(c.rows, c.dim, device=c.device)
    for column in likely.unbind(1):
        hidden += 6 * torch.rand(c.rows, 1, **options) * weight[column]
    dtype = getattr(torch, c.dtype)
    return Operands(hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_())


def completions_of_the_model(c: Configuration) -> Operands:
    """Hidden states before the tokens of the built-in model's own completions, and its output projection."""
    from em_kernels.one_shot.config import DEFAULT_PROMPT
    from em_kernels.one_shot.head import find_head
    from em_kernels.one_shot.model import load_model
    from em_kernels.one_shot.objective import completion_hidden
    from em_kernels.one_shot.prompts import encode_chats
    from em_kernels.one_shot.rollout import sample

    model, tokenizer = load_model(None)
    head = find_head(model)
    batch, length = 32, -(-c.rows // 32) + 8
    chats = encode_chats(tokenizer, [DEFAULT_PROMPT] * batch)
    rollout = sample(
        model,
        tokenizer,
        chats,
        temperature=_TEMPERATURE,
        max_new_tokens=length,
        seed=0,
        description="completions",
    )
    with torch.no_grad():
        parts = rollout.micro_batches(8)
        hidden = torch.cat([completion_hidden(model, part, head)[part.completion_mask] for part in parts])
    if len(hidden) < c.rows:
        raise RuntimeError(f"the completions have {len(hidden)} tokens, {c.rows} are wanted")
    # From all completions, long and short.
    chosen = torch.linspace(0, len(hidden) - 1, c.rows).long()
    return Operands(hidden[chosen].clone().requires_grad_(), head.module.weight.detach().clone().requires_grad_())


def contenders(c: Configuration) -> dict[str, Contender]:
    """By name. The matmuls are 2 N V D floating-point operations each; a path through logits needs three as well."""

    def both(loss: Callable[[Tensor, Tensor], Tensor], needs_weight: bool = True) -> Contender:
        def call(operands: Operands) -> tuple[Tensor | None, ...]:
            wanted = operands if needs_weight else operands[:1]
            weight = operands.weight if needs_weight else operands.weight.detach()
            value = loss(operands.hidden, weight)
            return value.detach(), *torch.autograd.grad(value, wanted)

        return call

    # What the forward makes is as large as all logits; the chunked loss needs no such thing, so it is not timed.
    scratch = torch.empty(c.rows, c.vocab, dtype=getattr(torch, c.dtype), device=c.device) if c.time else None

    def matmuls(operands: Operands) -> tuple[None, ...]:
        hidden, weight = (x.detach() for x in operands)
        # Into memory that is there, on the CPU: getting it from the system costs a fifth of a matmul.
        logits = torch.mm(hidden, weight.T, out=scratch)
        return None, logits @ weight, logits.T @ hidden

    ours = partial(linear_entropy_loss, temperature=_TEMPERATURE)
    found = {
        "three matmuls": matmuls,
        "eager": both(lambda h, w: eager((h @ w.T) / _TEMPERATURE)),
    }
    if c.compiled:
        compiled = torch.compile(lambda h, w: clean((h @ w.T) / _TEMPERATURE), dynamic=False)
        found["torch.compile"] = both(compiled)
    found["entropy_loss on logits"] = both(lambda h, w: entropy_loss(h @ w.T, temperature=_TEMPERATURE))
    found["ours"] = both(ours)
    found["ours, grad_tolerance 1e-6"] = both(partial(ours, grad_tolerance=_TOLERANCE))
    if c.dtype != "float32":
        found["ours, float32 logits"] = both(partial(ours, logits_dtype=torch.float32))
    found["ours, frozen weight"] = both(ours, needs_weight=False)
    return found


class Exact:
    """What float64 makes of the operands, a few rows at a time; and how sparse the logits' gradient is."""

    def __init__(self, operands: Operands) -> None:
        hidden, weight = (x.detach().double() for x in operands)
        self.loss, self.hidden = 0.0, torch.empty_like(hidden)
        self.weight = torch.zeros_like(weight)
        rows_kept, columns_kept, counted = 0.0, torch.zeros(len(weight), dtype=torch.bool, device=weight.device), 0
        for start in range(0, len(hidden), _REFERENCE_ROWS):
            index = slice(start, start + _REFERENCE_ROWS)
            logits = (hidden[index] @ weight.T).requires_grad_()
            total = reference.row_statistics(logits, temperature=_TEMPERATURE).entropy.sum()
            (gradient,) = torch.autograd.grad(total, logits)
            self.loss += total.item() / len(hidden)
            self.hidden[index] = gradient @ weight / len(hidden)
            self.weight += gradient.T @ hidden[index] / len(hidden)
            if start < 512:
                above = gradient.abs() > _TOLERANCE
                rows_kept, counted = rows_kept + above.any(1).sum().item(), counted + len(above)
                columns_kept |= above.any(0)
        self.sparsity = {"rows_kept": rows_kept / counted, "columns_kept": columns_kept.double().mean().item()}

    def errors(self, result: tuple[Tensor | None, ...]) -> dict[str, float]:
        loss, *gradients = result
        if loss is None:
            return {}
        found = {"loss_error": abs(loss.item() - self.loss) / (self.loss + 0.15)}
        for name, gradient in zip(("hidden", "weight"), gradients, strict=False):
            exact = getattr(self, name)
            assert gradient is not None
            found[f"{name}_gradient_error"] = ((gradient.double() - exact).norm() / exact.norm()).item()
        return found


def run(c: Configuration) -> Iterator[dict[str, Any]]:
    device = torch.device(c.device)
    every = contenders(c)
    row = {
        "benchmark": "linear_entropy",
        **{k: v for k, v in asdict(c).items() if k not in ("compiled", "time", "budget")},
    }
    timings: dict[str, Timing | Exception] = {}
    errors: dict[str, dict[str, float]] = {}
    slots: list[Operands] = []
    if c.time:
        operands = completions_of_the_model(c) if c.model == "SmolLM2-135M" and c.device == "cpu" else draw(c)
        exact = Exact(operands)
        row |= exact.sparsity
        operand_bytes = sum(x.numel() * x.element_size() for x in operands)
        slots = [
            Operands(*(x.detach().clone().requires_grad_() for x in operands))
            for _ in range(slots_beyond_cache(operand_bytes, device))
        ]
        torch.compiler.reset()
        calls = {name: Call(lambda slot, call=contender: call(slots[slot])) for name, contender in every.items()}

        def check(name: str, result: tuple[Tensor | None, ...]) -> None:
            errors[name] = exact.errors(result)

        timings = measure(calls, device, slots=len(slots), budget=c.budget, check=check)
    elif device.type == "cuda":
        slots = [draw(c)]
    floor = timings.get("three matmuls")
    for name in every:
        found = row | {"contender": name}
        timing = timings.get(name)
        if isinstance(timing, Exception):
            yield found | {"error": error_text(timing)}
            continue
        if timing is not None:
            found |= {**timing._asdict(), **errors.get(name, {})}
            if isinstance(floor, Timing):
                found["over_matmuls"] = timing.seconds / floor.seconds
        try:
            if device.type == "cuda":
                found["extra_bytes"] = extra_bytes_on_gpu(partial(every[name], slots[0]))
            elif c.model == "drawn":
                found["extra_bytes"] = extra_bytes_in_fresh_process(_prepare, c, name)
        except Exception as error:
            found["memory_error"] = error_text(error)
        yield found


def _prepare(c: Configuration, name: str) -> Callable[[], Any]:
    return partial(contenders(c)[name], draw(c))


def header(c: Configuration) -> str:
    return (
        f"{c.model} {c.dtype} {c.rows} tokens, D {c.dim}, V {c.vocab}\n{'':28} {'ms':>9} {'p20':>9} {'p80':>9} "
        f"{'/matmuls':>8} {'extra MiB':>9} {'loss':>8} {'hidden':>8} {'weight':>8}"
    )


def line(row: dict[str, Any]) -> str:
    start = f"{row['contender']:>28}"
    if "error" in row:
        return f"{start} {row['error']}"
    timing = "".join(f" {row[key] * 1e3:9.1f}" if key in row else f" {'-':>9}" for key in ("seconds", "p20", "p80"))
    over = f"{row['over_matmuls']:8.2f}" if "over_matmuls" in row else f"{'-':>8}"
    memory = f"{row['extra_bytes'] / 2**20:9.1f}" if "extra_bytes" in row else f"{'-':>9}"
    names = ("loss_error", "hidden_gradient_error", "weight_gradient_error")
    return f"{start}{timing} {over} {memory}" + "".join(f" {row[k]:8.1e}" if k in row else f" {'-':>8}" for k in names)


def main() -> None:
    folder, size, device = Arguments(__doc__).read()
    run_all("linear_entropy", folder, device, configurations(size, device.type), run, header, line)


if __name__ == "__main__":
    main()
