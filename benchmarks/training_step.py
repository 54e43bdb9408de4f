"""This suite measures an optimiser step of one-shot entropy minimisation with the eager loss and with ours.

A step goes from generation to update. Each contender's row has the median `seconds` of a step, with the percentiles
`p20` and `p80`, and of its `phases`: generation, which all contenders of a round share; forward, up to the last hidden
states; loss, from the last hidden states on; backward; and optimiser. Ours already makes most of the gradient in the
phase of the loss. `peak_bytes` is the most that the GPU's allocator held. On the CPU, `extra_bytes` is the most that a
fresh process held beyond the model and the optimiser's state. The loss and its gradients are checked against float64 on
the hidden states of a micro-batch. A row with `largest_batch` gives the number of completions whose forward and
backward pass fit into the GPU's memory or, on the CPU, into `limit_bytes` beyond the model and the optimiser's state.
"""

import gc
import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
from accuracy import SEED, LinearReference, Operands, demand, relative_error
from entropy_loss import eager
from linear_entropy import LINEAR_BOUNDS
from memory import extra_bytes_in_fresh_process
from rows import error_text
from suite import Prepared
from timing import Call, summary, synchronize, without_frames
from torch import Tensor

from em_kernels import entropy_loss, linear_entropy_loss

_TEMPERATURE = 0.5
_PHASES = ("generation", "forward", "loss", "backward", "optimiser")
_PROMPT_TOKENS = 64  # The prompt is about as long as a word problem in a chat template.
_CPU_LIMIT_BYTES = 2 << 30


@dataclass(frozen=True)
class Configuration:
    device: str
    dtype: str
    model: str
    batch: int
    micro_batch: int
    new_tokens: int
    checkpointing: bool = False
    rounds: int = 3
    # The search for the largest batch ends at this number of completions. 0 leaves the search out.
    most: int = 0


def configurations(size: str, device: str) -> Iterator[Configuration]:
    if size == "tiny":
        yield Configuration(device, "float32", "tiny", 4, 2, 3, rounds=2, most=2)
    elif device == "cpu":
        shape = {"small": (4, 4, 48), "full": (8, 8, 64), "paper": (16, 4, 64)}[size]
        yield Configuration(device, "float32", "SmolLM2-135M", *shape, most=64 if size == "full" else 0)
    else:
        batch, length = (64, 2048) if size == "paper" else (64, 256 if size == "full" else 128)
        most = {"small": 128, "full": 512, "paper": 0}[size]
        for model, micro_batch in (("SmolLM2-135M", 16), ("random 1.5B", 4 if size == "paper" else 16)):
            large = model == "random 1.5B"
            yield Configuration(device, "bfloat16", model, batch, micro_batch, length, large, 2, most * large)


# A loss is the mean entropy as a function of the hidden states and the output projection.
Loss = Callable[[Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "eager": lambda hidden, weight: eager((hidden @ weight.T) / _TEMPERATURE),
    "entropy_loss on logits": lambda hidden, weight: entropy_loss(
        hidden @ weight.T, temperature=_TEMPERATURE, inplace_backward=True
    ),
    "ours": lambda hidden, weight: linear_entropy_loss(hidden, weight, temperature=_TEMPERATURE),
}


class Step:
    """A model, its optimiser, and one step of training in parts that are timed."""

    def __init__(self, c: Configuration) -> None:
        from em_kernels import find_head
        from em_kernels.one_shot.policy import Policy
        from em_kernels.one_shot.policy.model import checkpoint_activations

        self.c, self.device = c, torch.device(c.device)
        self.model, self.tokenizer, self.weights = _model(c.model, self.device)
        self.model.to(self.device)
        self.head = find_head(self.model)
        self.policy = Policy(self.model, self.tokenizer, self.head, c.dtype)
        if c.checkpointing:
            checkpoint_activations(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-6, fused=True)

    def generate(self, seed: int) -> tuple[Any, float]:
        """Return completions, and the seconds that their generation took."""
        from em_kernels.one_shot.policy import Policy
        from em_kernels.one_shot.policy.sampling import Sampling

        start = self._now()
        rollout = Policy(self.model, self.tokenizer).sample_ids(
            self._prompts(),
            Sampling(_TEMPERATURE, self.c.new_tokens),
            seed=seed,
            description="generating",
            show_progress=sys.stderr.isatty(),
        )
        return rollout, self._now() - start

    def train(self, rollout: Any, loss: Loss) -> dict[str, float]:
        """Return the seconds of each phase but generation.

        The loss is a mean over micro-batches, which has the same cost as one over all tokens.
        """
        from em_kernels.one_shot.policy.scoring import set_scoring_mode

        set_scoring_mode(self.model)
        seconds = dict.fromkeys(_PHASES[1:], 0.0)
        parts = list(rollout.micro_batches(self.c.micro_batch))
        self.optimizer.zero_grad()
        for part in parts:
            start = self._now()
            hidden = self.hidden(part)
            forward = self._now()
            with self.computing():
                value = loss(hidden, self.head.module.weight) / len(parts)
            made = self._now()
            value.backward()
            done = self._now()
            for phase, duration in (("forward", forward - start), ("loss", made - forward), ("backward", done - made)):
                seconds[phase] += duration
            del hidden, value
        start = self._now()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        seconds["optimiser"] = self._now() - start
        return seconds

    def hidden(self, part: Any) -> Tensor:
        """Return the hidden states of shape (tokens, D) from which the logits of the generated tokens are made."""
        return self.policy.completion_hidden(part)[part.completion_mask]

    def computing(self) -> Any:
        return self.policy.computing()

    def drawn_rollout(self, batch: int) -> Any:
        """Return random tokens in place of completions, each of the greatest length."""
        from em_kernels.one_shot.policy.rollout import Rollout

        length = _PROMPT_TOKENS + self.c.new_tokens
        generator = torch.Generator().manual_seed(SEED)
        ids = torch.randint(self.head.module.out_features, (batch, length), generator=generator).to(self.device)
        return Rollout(
            ids,
            torch.ones_like(ids, dtype=torch.bool),
            torch.ones(batch, self.c.new_tokens, dtype=torch.bool, device=self.device),
            torch.ones(batch, dtype=torch.bool, device=self.device),
        )

    def _prompts(self) -> list[list[int]]:
        from em_kernels.one_shot.config import DEFAULT_PROMPT
        from em_kernels.one_shot.policy.chat import ChatFormat, encode_prompts

        if self.weights == "random":
            return [list(range(1, 1 + min(_PROMPT_TOKENS, self.head.module.out_features - 1)))] * self.c.batch
        return encode_prompts(self.tokenizer, [DEFAULT_PROMPT], ChatFormat()) * self.c.batch

    def _now(self) -> float:
        synchronize(self.device)
        return time.perf_counter()


def _model(name: str, device: torch.device) -> tuple[Any, Any, str]:
    """Return the model, its tokenizer, and whether its weights are "trained" or "random"."""
    from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

    from em_kernels.one_shot.errors import UsageError
    from em_kernels.one_shot.policy.model import load_model

    if name == "SmolLM2-135M":
        try:
            return *load_model(None), "trained"
        except UsageError:  # The model's package may be absent. A random model of the same shape takes the same time.
            pass
    shapes = {
        "tiny": LlamaConfig(
            vocab_size=500,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            tie_word_embeddings=True,
        ),
        "SmolLM2-135M": LlamaConfig(
            vocab_size=49152,
            hidden_size=576,
            intermediate_size=1536,
            num_hidden_layers=30,
            num_attention_heads=9,
            num_key_value_heads=3,
            max_position_embeddings=8192,
            tie_word_embeddings=True,
        ),
        # This is the shape of Qwen2.5-1.5B.
        "random 1.5B": Qwen2Config(
            vocab_size=151936,
            hidden_size=1536,
            intermediate_size=8960,
            num_hidden_layers=28,
            num_attention_heads=12,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        ),
    }
    torch.manual_seed(SEED)
    shapes[name].eos_token_id = None  # Without an end token every completion has full length.
    # The weights are drawn on the device, because drawing them on the CPU takes longer than a step.
    with device:
        model = AutoModelForCausalLM.from_config(shapes[name], dtype=torch.float32)
    # No text is read or written, so that the tokenizer needs nothing but its special tokens.
    return model, SimpleNamespace(pad_token_id=0, eos_token_id=None, name_or_path=name), "random"


def missing(device: torch.device) -> dict[str, str]:
    return {}


def names(c: Configuration) -> list[str]:
    return list(LOSSES)


def prepare(c: Configuration) -> Prepared:
    """Prepare a step without its generation."""
    step = Step(c)
    rollout, _ = step.generate(seed=SEED)
    errors = Errors(step, next(rollout.micro_batches(c.micro_batch)))
    calls = {name: Call(lambda slot, loss=loss: step.train(rollout, loss)) for name, loss in LOSSES.items()}
    return Prepared(calls, 1, lambda name, result: errors.of(name), {}, "eager")


def rows(c: Configuration) -> Iterator[dict[str, Any]]:
    step = Step(c)
    times: dict[str, list[dict[str, float]]] = {name: [] for name in LOSSES}
    failed: dict[str, Exception] = {}
    peaks: dict[str, int] = {}
    tokens = 0
    for i in range(1 + c.rounds):  # The first round warms up.
        rollout, generation = step.generate(seed=SEED + i)
        tokens = int(rollout.completion_mask.sum())
        for name in list(LOSSES) if i % 2 else reversed(list(LOSSES)):
            if name in failed:
                continue
            if step.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            try:
                seconds = step.train(rollout, LOSSES[name])
            except Exception as error:
                failed[name] = without_frames(error)
                step.optimizer.zero_grad()
                gc.collect()
                if step.device.type == "cuda":
                    torch.cuda.empty_cache()
                continue
            if step.device.type == "cuda":
                peaks[name] = torch.cuda.max_memory_allocated()
            if i > 0:
                times[name].append({"generation": generation, **seconds})
    common = _common(c) | {"weights": step.weights, "tokens": tokens}
    errors = Errors(step, next(rollout.micro_batches(c.micro_batch)))
    for name in LOSSES:
        row = common | {"contender": name, "variant": ""}
        if name not in failed:
            try:
                row |= errors.of(name)
            except Exception as error:
                failed[name] = error
        if name in failed:
            yield row | {"error": error_text(failed[name])}
            continue
        steps = [sum(phases.values()) for phases in times[name]]
        timing = summary(steps, median(steps))
        row |= timing._asdict()
        row["phases"] = {phase: median(phases[phase] for phases in times[name]) for phase in _PHASES}
        if name in peaks:
            row["peak_bytes"] = peaks[name]
        else:
            try:
                row["extra_bytes"] = extra_bytes_in_fresh_process(_in_fresh_process, c, name, c.micro_batch)
            except Exception as error:
                row["memory_error"] = error_text(error)
        yield row
    if c.most:
        yield from _largest_batches(c, step, common)


def _common(c: Configuration) -> dict[str, Any]:
    return {"benchmark": "training_step", **{k: v for k, v in asdict(c).items() if k not in ("rounds", "most")}}


class Errors:
    """The errors of each loss and its gradients on the hidden states of a micro-batch."""

    def __init__(self, step: Step, part: Any) -> None:
        with torch.no_grad():
            hidden = step.hidden(part)
        weight = step.head.module.weight.detach().to(hidden.dtype)
        self.step, self.operands = step, Operands(hidden.detach(), weight).clone()
        no_targets = torch.zeros(len(hidden), dtype=torch.int64, device=step.device)
        self.exact = LinearReference(self.operands, no_targets, _TEMPERATURE)

    def of(self, name: str) -> dict[str, float | None]:
        with self.step.computing():
            value = LOSSES[name](*self.operands)
        gradients = torch.autograd.grad(value, self.operands)
        errors = {"loss_error": relative_error(value.detach().cpu(), self.exact.loss("entropy"))}
        errors |= self.exact.gradient_errors("entropy", gradients)
        return demand(name, errors, LINEAR_BOUNDS[self.step.c.dtype])


def _largest_batches(c: Configuration, step: Step, common: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for name in ("eager", "ours"):
        row = common | {"contender": name, "variant": "largest batch"}
        limit = {"limit_bytes": _CPU_LIMIT_BYTES} if c.device == "cpu" else {}
        largest, more = _largest(lambda batch, name=name: _fits(c, step, name, batch), c.most)
        yield row | {"largest_batch": largest, "or_more": more, "tokens_each": c.new_tokens, **limit}


def _largest(fits: Callable[[int], bool], most: int) -> tuple[int, bool]:
    """Return the largest batch that fits, to an eighth, and whether the search ended before a batch did not fit.

    The largest batch is 0 where not even one completion fits.
    """
    lower, upper = 0, 1
    while upper <= most and fits(upper):
        lower, upper = upper, 2 * upper
    if upper > most:
        return lower, True
    while upper - lower > max(1, lower // 8):
        middle = (lower + upper) // 2
        lower, upper = (middle, upper) if fits(middle) else (lower, middle)
    return lower, False


def _fits(c: Configuration, step: Step, name: str, batch: int) -> bool:
    if c.device == "cpu":
        return extra_bytes_in_fresh_process(_in_fresh_process, c, name, batch) <= _CPU_LIMIT_BYTES
    step.c = replace(c, micro_batch=batch)
    try:
        step.train(step.drawn_rollout(batch), LOSSES[name])
    except RuntimeError as error:
        # A library that cannot allocate says so in words of its own.
        if isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error):
            return False
        raise
    finally:
        step.c = c
        step.optimizer.zero_grad()
        gc.collect()
        torch.cuda.empty_cache()
    return True


def _in_fresh_process(c: Configuration, name: str, batch: int) -> Callable[[], Any]:
    step = Step(replace(c, micro_batch=batch))
    rollout = step.drawn_rollout(batch)

    def call() -> None:
        step.train(rollout, LOSSES[name])
        # The memory before a step must not contain gradients, and the peak must.
        step.optimizer.zero_grad()

    return call


def header(c: Configuration) -> str:
    phases = " ".join(f"{phase:>10}" for phase in _PHASES)
    return (
        f"{c.model} {c.dtype}, {c.batch} completions of {c.new_tokens} tokens, {c.micro_batch} at a time\n"
        f"{'':56} {'s':>8} {phases} {'peak GiB':>9} {'loss':>8} {'weight':>8}"
    )


def line(row: dict[str, Any]) -> str:
    if "largest_batch" in row:
        more = " or more" if row["or_more"] else ""
        limit = f" in {row['limit_bytes'] / 2**30:g} GiB" if "limit_bytes" in row else ""
        return f"{row['largest_batch']}{more} completions of {row['tokens_each']} tokens fit{limit}"
    phases = " ".join(f"{row['phases'][phase]:10.2f}" for phase in _PHASES)
    peak = row.get("peak_bytes", row.get("extra_bytes", math.nan)) / 2**30
    return f"{row['seconds']:8.2f} {phases} {peak:9.2f} {row['loss_error']:8.1e} {row['weight_gradient_error']:8.1e}"
