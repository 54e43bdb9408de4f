"""This suite measures the statistics of each token beside the functions that policy-gradient trainers use for them.

A row is the forward alone, or forward + backward of the mean of -A_t log p_t - 0.01 H_t with an advantage A_t of either
sign. That is a policy-gradient loss with an entropy bonus, in which every token's statistics have an upstream gradient
of their own. `over_floor` is the time over that of a copy of the logits or, for hidden states, over that of the three
plain matmuls. The errors are against float64, as accuracy.py defines them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from accuracy import (
    LinearReference,
    Operands,
    Reference,
    demand,
    draw_advantages,
    draw_linear_targets,
    draw_logits,
    draw_operands,
    draw_targets,
    policy_loss,
    relative_error,
)
from linear_entropy import LINEAR_BOUNDS, MODELS, three_matmuls
from peers import Peer, peers
from suite import Prepared, rows_of
from timing import Call, copier, slots_beyond_cache
from torch import Tensor

from em_kernels import linear_token_stats, token_stats


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    takes: str
    model: str
    rows: int
    dim: int
    vocab: int
    compiled: bool = True
    budget: float = 3.0


# Such a function returns the two statistics of each token, given the inputs and the target.
Statistics = Callable[..., tuple[Tensor, Tensor]]


def configurations(size: str, device: str) -> Iterator[Configuration]:
    if size == "tiny":
        for takes in ("logits", "hidden"):
            yield Configuration(device, "float32", takes, "drawn", 24, 16, 1000, budget=0.1)
        return
    dtype, on_cpu = ("float32", True) if device == "cpu" else ("bfloat16", False)
    models = {
        "small": ("SmolLM2-135M",) if on_cpu else ("Qwen2.5-7B",),
        "paper": ("Qwen2.5-7B",),
        "full": ("SmolLM2-135M", "Qwen2.5-0.5B") if on_cpu else tuple(MODELS),
    }[size]
    for model in models:
        dim, vocab = MODELS[model]
        budget = (8.0 if size == "full" else 4.0) if on_cpu else 3.0
        yield Configuration(device, dtype, "logits", model, 512 if on_cpu else 2048, dim, vocab, budget=budget)
        tokens = (128 if dim > 1000 else 512) if on_cpu else 8192
        yield Configuration(device, dtype, "hidden", model, tokens, dim, vocab, compiled=size == "full", budget=budget)


def eager(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    logp = torch.log_softmax(logits, dim=-1)
    return logp.gather(-1, target.unsqueeze(-1)).squeeze(-1), -(logp.exp() * logp).sum(dim=-1)


def clean(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return eager(logits.float(), target)


def contenders(c: Configuration) -> dict[str, Statistics]:
    """Return the contenders by name: functions of (logits, target) or of (hidden, weight, target)."""
    compiled = torch.compile(clean, dynamic=False)
    found: dict[str, Statistics] = {}
    if c.takes == "logits":
        found["eager"] = eager
        if c.compiled:
            found["torch.compile"] = compiled
        found |= {peer.name: function for peer, function in _peers(c).items()}
        found["ours"] = lambda z, t: _both(token_stats(z, t))
        return found
    found["eager"] = lambda h, w, t: eager(h @ w.T, t)
    if c.compiled:
        found["torch.compile"] = lambda h, w, t: compiled(h @ w.T, t)
    found["token_stats on logits"] = lambda h, w, t: _both(token_stats(h @ w.T, t))
    for peer, function in _peers(c).items():
        found[peer.name] = lambda h, w, t, function=function: function(h, w, t, 1.0)
    found["ours"] = lambda h, w, t: _both(linear_token_stats(h, w, t))
    return found


def _both(stats: Any) -> tuple[Tensor, Tensor]:
    return stats.logprob, stats.entropy


def _peers(c: Configuration) -> dict[Peer, Callable[..., Any]]:
    return peers(c.takes, ("statistics",), torch.device(c.device))[0]


def missing(device: torch.device) -> dict[str, str]:
    return peers("logits", ("statistics",), device)[1] | peers("hidden", ("statistics",), device)[1]


def names(c: Configuration) -> list[str]:
    """Return the names of the calls, the floor first."""
    forward_only = {peer.name for peer in _peers(c) if c.device not in peer.differentiable}
    variants = ("forward", "forward+backward")
    found = [f"{name} | {variant}" for name in contenders(c) for variant in variants[: 1 + (name not in forward_only)]]
    return ["copy" if c.takes == "logits" else "three matmuls", *found]


def prepare(c: Configuration) -> Prepared:
    device, dtype = torch.device(c.device), getattr(torch, c.dtype)
    advantage = draw_advantages(c.rows, device)
    torch.compiler.reset()
    floor = names(c)[0]
    inputs: list[tuple[Tensor, ...]]
    if c.takes == "logits":
        logits = draw_logits("peaked", c.rows, c.vocab, dtype, device)
        target = draw_targets(logits)
        exact = Reference(logits, target, advantage)
        values = exact.values
        wanted = {"logprob": -values["cross entropy"], "entropy": values["entropy"]}
        weights = torch.full((c.rows,), 1 / c.rows, dtype=torch.float64, device=device)
        slots = slots_beyond_cache(logits.numel() * logits.element_size(), device)
        inputs = [(logits.clone().requires_grad_(),) for _ in range(slots)]
        floor_call = copier(c.rows, c.vocab, dtype, device)

        def gradient_errors(gradients: tuple[Tensor, ...]) -> dict[str, float]:
            return {"gradient_error": exact.gradient_error("policy", gradients[0], weights)}

        bounds = {
            "logprob_error": 4e-6,
            "entropy_error": 4e-6,
            "gradient_error": 4e-6 if c.dtype == "float32" else 2**-7,
        }

    else:
        operands = draw_operands(c.rows, c.dim, c.vocab, dtype, device)
        target = draw_linear_targets(operands)
        linear = LinearReference(operands, target, 1.0, advantage)
        wanted = {"logprob": linear.exact("policy").logprob, "entropy": linear.exact("policy").entropy}
        slots = slots_beyond_cache(sum(x.numel() * x.element_size() for x in operands), device)
        inputs = [operands.clone() for _ in range(slots)]
        matmuls = three_matmuls()
        floor_call = lambda hidden, weight: matmuls(Operands(hidden, weight))  # noqa: E731

        def gradient_errors(gradients: tuple[Tensor, ...]) -> dict[str, float]:
            return linear.gradient_errors("policy", gradients)

        bounds = LINEAR_BOUNDS[c.dtype]

    def forward(statistics: Statistics, slot: int) -> tuple[Any, ...]:
        with torch.no_grad():
            return statistics(*inputs[slot], target), ()

    def both(statistics: Statistics, slot: int) -> tuple[Any, ...]:
        logprob, entropy = statistics(*inputs[slot], target)
        loss = policy_loss(logprob, entropy, advantage).mean()
        return (logprob.detach(), entropy.detach()), torch.autograd.grad(loss, inputs[slot])

    def check(name: str, result: Any) -> dict[str, float | None]:
        if name == floor:
            return {}
        (logprob, entropy), gradients = result
        errors = {
            "logprob_error": relative_error(logprob, wanted["logprob"]),
            "entropy_error": relative_error(entropy, wanted["entropy"]),
        }
        return demand(name, errors | (gradient_errors(gradients) if gradients else {}), bounds)

    every = contenders(c)
    calls = {floor: Call(lambda slot: floor_call(*(x.detach() for x in inputs[slot])))}
    for name in names(c)[1:]:
        contender, _, variant = name.partition(" | ")
        calls[name] = Call(partial(forward if variant == "forward" else both, every[contender]))
    return Prepared(calls, slots, check, {}, floor)


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    return rows_of("token_stats", c, prepare(c))


def header(c: Configuration) -> str:
    of = f"{c.rows} x {c.vocab} logits" if c.takes == "logits" else f"{c.rows} tokens, D {c.dim}, V {c.vocab}"
    return (
        f"{c.model} {c.dtype} {of}\n{'':56} {'ms':>9} {'p20':>9} {'p80':>9} {'/ floor':>8} {'logprob':>8} "
        f"{'entropy':>8} {'gradient':>8}"
    )


def line(row: dict[str, Any]) -> str:
    gradient = row.get("gradient_error", row.get("weight_gradient_error"))
    errors = (row.get("logprob_error"), row.get("entropy_error"), gradient)
    return (
        f"{row['seconds'] * 1e3:9.2f} {row['p20'] * 1e3:9.2f} {row['p80'] * 1e3:9.2f} "
        f"{row.get('over_floor', float('nan')):8.2f}"
        + "".join(f" {'-':>8}" if error is None else f" {error:8.1e}" for error in errors)
    )
