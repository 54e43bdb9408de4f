"""The settings that decide the result of a training run, and the presets."""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass
from typing import Any, ClassVar

from em_kernels.one_shot import stopping
from em_kernels.one_shot.errors import UsageError

AVERAGES = ("tokens", "sequences")
DTYPES = ("float32", "bfloat16")
LOSSES = ("linear", "logits")
OPTIMIZERS = ("adamw", "adamw8bit")
TRACKERS = ("none", "tensorboard", "wandb")

DEFAULT_PROMPT = (
    "A bakery bakes 7 trays of rolls with 8 rolls on each tray. It sells 29 rolls in the morning and 13 rolls in the "
    "afternoon. How many rolls does it have at the end of the day?"
)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of one run; the defaults are those of the paper (arXiv 2505.20282).

    Args:
        model: name or folder of a Transformers causal language model; None is the built-in SmolLM2-135M-Instruct.
        trust_remote_code: whether the model's repository may run code of its own.
        prompts: the training prompts, without answers; the completions of the run are shared out among them, all of
            them shuffled by the seed before any is taken again.
        steps: optimiser updates, whatever the number of micro-batches and processes.
        learning_rate: the learning rate of AdamW, the same in every step.
        temperature: the temperature of sampling and of the loss.
        top_p, top_k, repetition_penalty: the filters of sampling, as `Sampling` takes them, neutral by default. The
            loss scores softmax(logits / temperature) all the same.
        system, chat_template, stop: how a prompt is put to the model and what ends its completions, as `ChatFormat`
            takes them.
        average: "tokens" takes the mean entropy over all tokens of a step, as the paper does; "sequences" the mean over
            completions of each one's mean, in which the tokens of a short completion weigh more.
        batch_size: completions per optimiser step, over all processes.
        micro_batch_size: completions per forward and backward pass of a process; changes only memory and speed.
        max_new_tokens: the longest completion, in tokens.
        max_grad_norm: the norm that a longer gradient is scaled down to.
        stop_when: rules that end the run before its last step, as `stopping` has them.
        seed: the seed of sampling, of the order of prompts, and of adapters.
        dtype: the dtype that the model computes in. With the optimiser "adamw", trained parameters and their state are
            float32 either way: an update of 2e-5 is below bfloat16's resolution of most weights and would be lost.
        optimizer: "adamw", or "adamw8bit", which keeps bfloat16 parameters, rounds their updates stochastically, so
            that none is lost on average, and keeps its state in 8 bits: 6 bytes a parameter with the gradient, not 16.
        lora_rank: the rank of the adapters that are trained in place of the parameters; 0 trains the parameters, or
            the adapter that the model comes with.
        loss: "linear" takes the loss on hidden states and makes the logits of a chunk of tokens at a time; "logits"
            takes the loss on logits, all made at once.
        gradient_checkpointing: whether the backward pass recomputes activations, so that they need not be kept.
        shard: whether PyTorch's fully_shard spreads parameters, gradients and optimiser state over the processes.
        evaluation_size: the number of problems that accuracy is measured on; 0 for none.
        evaluation_tokens: the longest completion of a problem, in tokens; None takes max_new_tokens. A completion that
            is cut off before it concludes is not right.
        evaluation_seed: the seed of these problems and of their completions, the same for runs of different seeds.
        evaluation_file: a file of problems that they are drawn from, in place of the built-in ones.
        evaluate_every: the number of steps between evaluations, besides those before and after; 0 for no others.
        checkpoint_every: the number of steps between models that are kept, besides the last; 0 for no others.
        report_to: the tracker that gets the metrics besides metrics.jsonl, or "none".

    Raises:
        UsageError: a setting is out of range; the message names the setting.
    """

    model: str | None = None
    trust_remote_code: bool = False
    prompts: tuple[str, ...] = (DEFAULT_PROMPT,)
    steps: int = 10
    learning_rate: float = 2e-5
    temperature: float = 0.5
    top_p: float = 1.0
    top_k: int = 0
    repetition_penalty: float = 1.0
    system: str | None = None
    chat_template: str | None = None
    stop: tuple[str, ...] = ()
    average: str = "tokens"
    batch_size: int = 64
    micro_batch_size: int = 4
    max_new_tokens: int = 2048
    max_grad_norm: float = 1.0
    stop_when: tuple[str, ...] = ()
    seed: int = 0
    dtype: str = "float32"
    optimizer: str = "adamw"
    lora_rank: int = 0
    loss: str = "linear"
    gradient_checkpointing: bool = False
    shard: bool = False
    evaluation_size: int = 200
    evaluation_tokens: int | None = None
    evaluation_seed: int = 0
    evaluation_file: str | None = None
    evaluate_every: int = 0
    checkpoint_every: int = 0
    report_to: str = "none"

    # What may differ where a run goes on: how far it goes, what is measured and kept on the way, and what changes
    # no more than memory, speed and rounding.
    MAY_CHANGE: ClassVar[tuple[str, ...]] = (
        "steps",
        "stop_when",
        "micro_batch_size",
        "trust_remote_code",
        "gradient_checkpointing",
        "evaluate_every",
        "checkpoint_every",
        "report_to",
    )

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "max_new_tokens"):
            _check_integer(name, getattr(self, name), at_least=1)
        for name in ("seed", "evaluation_size", "evaluation_seed", "evaluate_every", "checkpoint_every", "lora_rank"):
            _check_integer(name, getattr(self, name), at_least=0)
        _check_integer("top_k", self.top_k, at_least=0)
        if self.evaluation_tokens is not None:
            _check_integer("evaluation_tokens", self.evaluation_tokens, at_least=1)
        for name in ("learning_rate", "temperature", "max_grad_norm", "repetition_penalty"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UsageError(f"{name} is {value!r}, expected a finite number above 0")
        if not (isinstance(self.top_p, int | float) and 0 < self.top_p <= 1):
            raise UsageError(f"top_p is {self.top_p!r}, expected a number above 0 and at most 1")
        for rule in self.stop_when:
            stopping.check_rule(rule)
            if rule == stopping.AGREEMENT and not (self.evaluate_every and self.evaluation_size):
                raise UsageError(f"stop_when is {rule!r}, which needs evaluate_every and evaluation_size above 0")
        _check_choice("average", self.average, AVERAGES)
        _check_choice("dtype", self.dtype, DTYPES)
        _check_choice("loss", self.loss, LOSSES)
        _check_choice("optimizer", self.optimizer, OPTIMIZERS)
        if self.optimizer == "adamw8bit" and self.dtype != "bfloat16":
            raise UsageError(f"dtype is {self.dtype!r}, expected 'bfloat16' with the optimizer adamw8bit")
        _check_choice("report_to", self.report_to, TRACKERS)
        if self.report_to != "none" and importlib.util.find_spec(self.report_to) is None:
            raise UsageError(f"report_to is {self.report_to!r}, but the package {self.report_to} is not installed")
        if not self.prompts or not all(isinstance(prompt, str) and prompt.strip() for prompt in self.prompts):
            raise UsageError(f"prompts is {self.prompts!r}, expected at least one text, none of them empty")

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """The settings as `dataclasses.asdict` and JSON left them.

        Raises:
            TypeError: a setting is unknown.
            UsageError: a setting is out of range.
        """
        settings: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**settings)

    def differences(self, other: "TrainConfig") -> list[str]:
        """The settings that must not change in which the two differ, each as 'name: other's value, not own value'."""
        return [
            f"{field.name}: {getattr(other, field.name)!r}, not {getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if field.name not in self.MAY_CHANGE and getattr(self, field.name) != getattr(other, field.name)
        ]


def _check_integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UsageError(f"{name} is {value!r}, expected an integer of at least {at_least}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


PRESETS = {
    "paper": TrainConfig(),
    # The published training script, which samples in another way than the paper says.
    "authors": TrainConfig(top_p=0.95, top_k=50, repetition_penalty=1.15, max_new_tokens=512, seed=15),
    # The demo is sized for two CPU cores and five minutes.
    "demo": TrainConfig(
        steps=6,
        learning_rate=1e-5,
        batch_size=16,
        micro_batch_size=8,
        max_new_tokens=64,
        evaluation_size=32,
        evaluation_tokens=128,
    ),
}

# What `train --preset authors` says when it runs.
AUTHORS_NOTES = (
    "the published script trains Qwen2.5-Math-7B on one prompt, pi1_r128.parquet; --model and --prompt-file name them",
    "it differs from the paper in top_p 0.95, top_k 50, repetition_penalty 1.15 and 512 new tokens, not 2,048; by its "
    "author's word, its results depend on the penalty and on the seed, 15",
    "it counts micro-batches as steps, so that its step 10 is 10, 5 or 2 updates on 32, 16 or 8 processes; a step is "
    "an update here",
    "it scores positions from the prompt's length on, without the first token's distribution and, behind padding, with "
    "some of the prompt; the distribution of each generated token is scored here",
    "its processes draw the same completions, and its means are of micro-batches; processes draw different ones here, "
    "and the mean is over all tokens of a step",
)
