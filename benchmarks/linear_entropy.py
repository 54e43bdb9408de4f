"""This suite measures the entropy loss on hidden states beside three matmuls and the losses that people use.

Each measurement is a row: forward + backward of the mean at temperature 0.5. `seconds` is the median time, with the
percentiles `p20` and `p80`. `over_floor` is the time over that of the three plain matmuls that any dense path needs, of
2 N V D floating-point operations each; `flops` counts all three. `extra_bytes` is the memory beyond the operands, with
their gradients. The errors are against float64 on the very operands: the loss's error over its size plus 0.15, and the
norm of a gradient's error over the gradient's norm. `rows_kept` is the share of the first 512 tokens that have an entry
of the logits' gradient above 1e-6, and `columns_kept` the share of the vocabulary that has one in these tokens.
`computes` names the loss: peers.py says what is compared with what. On a GPU that linear_estimate.py knows, rows of
ours have the estimate that was made there without measuring: `estimated_seconds_low` and `_high`.

On the CPU the operands of SmolLM2-135M are real: its output projection and the hidden states of its own completions.
All others are drawn, with distributions that are about as peaked.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accuracy import (
    SEED,
    TOLERANCE,
    LinearReference,
    Operands,
    demand,
    draw_linear_targets,
    draw_operands,
    relative_error,
)
from entropy_loss import clean, eager
from linear_estimate import estimated
from memory import extra_bytes_in_fresh_process, extra_bytes_on_gpu
from peers import all_peers, peers
from rows import error_text
from suite import Prepared, rows_of
from timing import Call, slots_beyond_cache
from torch import Tensor

from em_kernels import entropy_loss, linear_entropy_loss
from em_kernels.one_shot.config import DEFAULT_PROMPT
from em_kernels.one_shot.errors import UsageError

TEMPERATURE = 0.5
# The tolerances on both sides of TOLERANCE show how time depends on it.
_TOLERANCES = (1e-7, TOLERANCE, 1e-5)
_GIVES = ("statistics", "cross entropy")
# The models are some that people train, each with its hidden size D and its vocabulary V.
MODELS = {
    "Qwen2.5-0.5B": (896, 151936),
    "Qwen2.5-1.5B": (1536, 151936),
    "Qwen2.5-7B": (3584, 152064),
    "Llama-3.1-8B": (4096, 128256),
    "Gemma-3-270M": (640, 262144),
    "Gemma-3-4B": (2560, 262208),
    "SmolLM2-135M": (576, 49152),
}


_ERRORS = ("loss_error", "logprob_error", "entropy_error", "hidden_gradient_error", "weight_gradient_error")
# These are the bounds on our own errors, above what rounded logits and grad_tolerance add. Wrong weights, a wrong
# divisor or a wrong sign would give an error of order 1.
LINEAR_BOUNDS = {
    dtype: dict.fromkeys(_ERRORS, bound) for dtype, bound in (("float32", 1e-3), ("bfloat16", 0.1), ("float16", 0.1))
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
    memory: bool = False
    budget: float = 6.0


# These contenders give statistics of each token, for any upstream gradient, which is more than a mean.
_PER_TOKEN = {"ours, reduction none"} | {peer.name for peer in all_peers("hidden", "statistics")}
# A contender returns the loss and the gradients of hidden and of weight, None where it makes none.
Contender = Callable[[Operands], tuple[Tensor | None, ...]]


def configurations(size: str, device: str) -> Iterator[Configuration]:
    def of(model: str, rows: int, **how: Any) -> Configuration:
        return Configuration(device, "float32" if device == "cpu" else "bfloat16", model, rows, *MODELS[model], **how)

    def memory(model: str, *tokens: int) -> Iterator[Configuration]:
        return (of(model, rows, compiled=False, time=False, memory=True) for rows in tokens)

    if size == "tiny":
        yield Configuration(device, "float32", "drawn", 24, 16, 1000, memory=True, budget=0.1)
    elif size == "paper":
        # Qwen2.5-Math-7B has the shape of Qwen2.5-7B, and a micro-batch of the paper is four completions.
        yield of("Qwen2.5-7B", 128 if device == "cpu" else 8192, compiled=device == "cuda")
    elif device == "cpu":
        yield of("SmolLM2-135M", 512 if size == "small" else 2048, budget=6 if size == "small" else 60)
        if size == "full":
            yield of("Qwen2.5-0.5B", 256, compiled=False, budget=1)
        yield from memory("SmolLM2-135M", *((512, 2048) if size == "small" else (512, 2048, 8192)))
    else:
        for model in MODELS if size == "full" else ("Qwen2.5-0.5B", "Qwen2.5-7B", "Llama-3.1-8B"):
            yield of(model, 8192, compiled=size == "full" or model == "Qwen2.5-0.5B", memory=True)
        if size == "full":
            yield from (of("Qwen2.5-0.5B", rows, compiled=False) for rows in (1024, 32768))
        yield from memory("Qwen2.5-0.5B", 2048, 4096, 16384, 32768)


def completions_of_the_model(tokens: int) -> Operands:
    """Return the hidden states before the tokens of the built-in model's own completions, and its output projection."""
    from em_kernels import find_head
    from em_kernels.one_shot.policy import Policy
    from em_kernels.one_shot.policy.model import load_model
    from em_kernels.one_shot.policy.sampling import Sampling

    model, tokenizer = load_model(None)
    head = find_head(model)
    policy = Policy(model, tokenizer, head)
    batch, length = 32, -(-tokens // 32) + 8
    rollout = policy.sample(
        [DEFAULT_PROMPT] * batch,
        Sampling(TEMPERATURE, length),
        seed=SEED,
        description="completions",
        show_progress=sys.stderr.isatty(),
    )
    with torch.no_grad():
        parts = rollout.micro_batches(8)
        hidden = torch.cat([policy.completion_hidden(part)[part.completion_mask] for part in parts])
    if len(hidden) < tokens:
        raise RuntimeError(f"the completions have {len(hidden)} tokens, {tokens} are wanted")
    # The tokens are taken from all completions, long and short.
    chosen = torch.linspace(0, len(hidden) - 1, tokens).long()
    return Operands(hidden[chosen].clone().requires_grad_(), head.module.weight.detach().clone().requires_grad_())


def contenders(c: Configuration, target: Tensor, only: str | None = None) -> dict[str, tuple[Contender, str | None]]:
    """Return the contenders by name, with the loss that each computes. With `only`, no peer but that one is imported.

    A matmul is 2 N V D floating-point operations. Ours makes three as long as the weights of the tokens are known
    beforehand, and so does every path that keeps all logits. Statistics of each token may get any upstream gradient, so
    that verl, TRL, Liger, and ours with "none" make the logits a second time, and four matmuls in all.
    """

    def both(loss: Callable[[Tensor, Tensor], Tensor], needs_weight: bool = True) -> Contender:
        def call(operands: Operands) -> tuple[Tensor | None, ...]:
            wanted = operands if needs_weight else operands[:1]
            weight = operands.weight if needs_weight else operands.weight.detach()
            value = loss(operands.hidden, weight)
            return value.detach(), *torch.autograd.grad(value, wanted)

        return call

    ours = partial(linear_entropy_loss, temperature=TEMPERATURE)
    found: dict[str, Contender] = {
        "three matmuls": three_matmuls(),
        "eager": both(lambda h, w: eager((h @ w.T) / TEMPERATURE)),
    }
    if c.compiled:
        found["torch.compile"] = both(torch.compile(lambda h, w: clean((h @ w.T) / TEMPERATURE), dynamic=False))
    found["entropy_loss on logits"] = both(lambda h, w: entropy_loss(h @ w.T, temperature=TEMPERATURE))
    computes: dict[str, str] = {}
    for peer, function in peers("hidden", _GIVES, target.device, only)[0].items():
        computes[peer.name] = "cross entropy" if peer.gives == "cross entropy" else "entropy"
        found[peer.name] = both(partial(_mean, function, target))
    found["ours"] = both(ours)
    for tolerance in _TOLERANCES:
        found[f"ours, grad_tolerance {tolerance:.0e}"] = both(partial(ours, grad_tolerance=tolerance))
    found["ours, reduction none"] = both(lambda h, w: ours(h, w, reduction="none").mean())
    if c.dtype != "float32":
        found["ours, float32 logits"] = both(partial(ours, logits_dtype=torch.float32))
    found["ours, frozen weight"] = both(ours, needs_weight=False)
    return {
        name: (call, None if name == "three matmuls" else computes.get(name, "entropy")) for name, call in found.items()
    }


def three_matmuls() -> Contender:
    """Return the contender that makes the plain matmuls.

    The last two are given numbers as peaked as a gradient: on a GPU, matmuls of dense numbers take longer.
    """
    held: list[Tensor] = []

    def call(operands: Operands) -> tuple[None, ...]:
        hidden, weight = (x.detach() for x in operands)
        if not held:
            logits = hidden @ weight.T
            held.extend((logits, (logits / TEMPERATURE).softmax(-1) / len(logits)))
        scratch, gradient = held
        # On the CPU the result goes into memory that exists, because getting memory from the system takes a fifth of a
        # matmul.
        torch.mm(hidden, weight.T, out=scratch)
        return None, gradient @ weight, gradient.T @ hidden

    return call


def _mean(function: Callable[..., Any], target: Tensor, hidden: Tensor, weight: Tensor) -> Tensor:
    result = function(hidden, weight, target, TEMPERATURE)
    return result[1].mean() if isinstance(result, tuple) else result


def missing(device: torch.device) -> dict[str, str]:
    return peers("hidden", _GIVES, device)[1]


def draw(c: Configuration) -> Operands:
    return draw_operands(c.rows, c.dim, c.vocab, getattr(torch, c.dtype), torch.device(c.device))


def names(c: Configuration) -> list[str]:
    return list(contenders(c, _no_targets(c))) if c.time else []


def _no_targets(c: Configuration) -> Tensor:
    """Return targets for callers that do not use the result."""
    return torch.zeros(c.rows, dtype=torch.int64, device=c.device)


def prepare(c: Configuration) -> Prepared:
    device = torch.device(c.device)
    operands = None
    if c.model == "SmolLM2-135M" and c.device == "cpu":
        # The model's package may be absent.
        with contextlib.suppress(UsageError):
            operands = completions_of_the_model(c.rows)
    drawn = operands is None
    operands = operands or draw(c)
    target = draw_linear_targets(operands, TEMPERATURE)
    exact = LinearReference(operands, target, TEMPERATURE)
    exact.exact("entropy")
    operand_bytes = sum(x.numel() * x.element_size() for x in operands)
    slots = [operands.clone() for _ in range(slots_beyond_cache(operand_bytes, device))]
    torch.compiler.reset()
    every = contenders(c, target)

    def check(name: str, result: tuple[Tensor | None, ...]) -> dict[str, float | None]:
        computes, (loss, *gradients) = every[name][1], result
        if computes is None or loss is None:
            return {}
        errors = {"loss_error": relative_error(loss.cpu(), exact.loss(computes))}
        return demand(name, errors | exact.gradient_errors(computes, tuple(gradients)), LINEAR_BOUNDS[c.dtype])

    calls = {name: Call(lambda slot, call=call: call(slots[slot])) for name, (call, _) in every.items()}
    notes = {
        name: {
            "computes": computes,
            "drawn": drawn,
            "per_token": name in _PER_TOKEN,
            "flops": 6 * c.rows * c.vocab * c.dim,
            **exact.sparsity,
        }
        for name, (_, computes) in every.items()
    }
    return Prepared(calls, len(slots), check, notes, "three matmuls")


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    if c.time:
        prepared = prepare(c)
        for row in rows_of("linear_entropy", c, prepared):
            name = row["contender"]
            on = torch.cuda.get_device_name() if c.device == "cuda" else ""
            row |= estimated(name, c.rows, c.dim, c.vocab, c.dtype, on)
            yield row | (
                _memory(c, name, partial(prepared.calls[name].run, 0)) if c.memory and "seconds" in row else {}
            )
    else:
        operands = draw(c) if c.device == "cuda" else None
        for name, (call, computes) in contenders(c, _no_targets(c)).items():
            # Only contenders that the plots show are measured here, because the losses on more tokens take long.
            if name != "three matmuls" and computes == "entropy" and not name.startswith("ours,"):
                shape = {"dtype": c.dtype, "model": c.model, "rows": c.rows, "dim": c.dim, "vocab": c.vocab}
                row = {"benchmark": "linear_entropy", "device": c.device, **shape, "contender": name, "variant": ""}
                yield row | {"computes": computes} | _memory(c, name, partial(call, operands))


def _memory(c: Configuration, name: str, call: Callable[[], Any]) -> dict[str, Any]:
    """Measure the memory of `call` on a GPU, or of the same contender in a process of its own on the CPU."""
    try:
        if c.device == "cuda":
            # Compiling and tuning take memory of their own.
            call()
            return {"extra_bytes": extra_bytes_on_gpu(call)}
        return {"extra_bytes": extra_bytes_in_fresh_process(_in_fresh_process, c, name)}
    except Exception as error:
        return {"memory_error": error_text(error)}


def _in_fresh_process(c: Configuration, name: str) -> Callable[[], Any]:
    return partial(contenders(c, _no_targets(c), name)[name][0], draw(c))


def header(c: Configuration) -> str:
    return (
        f"{c.model} {c.dtype} {c.rows} tokens, D {c.dim}, V {c.vocab}\n{'':56} {'ms':>9} {'p20':>9} {'p80':>9} "
        f"{'/matmuls':>8} {'extra MiB':>9} {'loss':>8} {'hidden':>8} {'weight':>8} {'estimated ms':>13}"
    )


def line(row: dict[str, Any]) -> str:
    timing = "".join(f"{row[key] * 1e3:9.1f} " if key in row else f"{'-':>9} " for key in ("seconds", "p20", "p80"))
    over = f"{row['over_floor']:8.2f}" if "over_floor" in row else f"{'-':>8}"
    memory = f"{row['extra_bytes'] / 2**20:9.1f}" if "extra_bytes" in row else f"{'-':>9}"
    names = ("loss_error", "hidden_gradient_error", "weight_gradient_error")
    errors = "".join(f" {row[k]:8.1e}" if k in row else f" {'-':>8}" for k in names)
    estimate = "-"
    if "estimated_on" in row:
        estimate = f"{row['estimated_seconds_low'] * 1e3:.1f}-{row['estimated_seconds_high'] * 1e3:.1f}"
    return f"{timing}{over} {memory}{errors} {estimate:>13}"
