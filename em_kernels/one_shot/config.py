"""The settings that decide the result of a training run, and the presets."""

import dataclasses
import importlib.util
import math
from dataclasses import dataclass

from em_kernels.one_shot.errors import UsageError

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
        prompts: the training prompts, without answers; the completions of a step are shared out among them in turn.
        steps: optimiser updates, whatever the number of micro-batches and processes.
        learning_rate: the learning rate of AdamW, the same in every step.
        temperature: the temperature of sampling and of the loss.
        batch_size: completions per optimiser step, over all processes.
        micro_batch_size: completions per forward and backward pass of a process; changes only memory and speed.
        max_new_tokens: the longest completion, in tokens.
        max_grad_norm: the norm that a longer gradient is scaled down to.
        seed: the seed of sampling and of the evaluation problems.
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
        evaluation_size: the number of problems that accuracy is measured on before and after training; 0 for none.
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
    batch_size: int = 64
    micro_batch_size: int = 4
    max_new_tokens: int = 2048
    max_grad_norm: float = 1.0
    seed: int = 0
    dtype: str = "float32"
    optimizer: str = "adamw"
    lora_rank: int = 0
    loss: str = "linear"
    gradient_checkpointing: bool = False
    shard: bool = False
    evaluation_size: int = 200
    report_to: str = "none"

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "micro_batch_size", "max_new_tokens"):
            _check_integer(name, getattr(self, name), at_least=1)
        for name in ("seed", "evaluation_size", "lora_rank"):
            _check_integer(name, getattr(self, name), at_least=0)
        for name in ("learning_rate", "temperature", "max_grad_norm"):
            value = getattr(self, name)
            if not (isinstance(value, int | float) and 0 < value < math.inf):
                raise UsageError(f"{name} is {value!r}, expected a finite number above 0")
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

    def differences(self, other: "TrainConfig") -> list[str]:
        """The settings in which the two differ, each as 'name: other's value, not own value'."""
        return [
            f"{field.name}: {getattr(other, field.name)!r}, not {getattr(self, field.name)!r}"
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != getattr(other, field.name)
        ]


def _check_integer(name: str, value: object, *, at_least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < at_least:
        raise UsageError(f"{name} is {value!r}, expected an integer of at least {at_least}")


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UsageError(f"{name} is {value!r}, expected one of {', '.join(choices)}")


PRESETS = {
    "paper": TrainConfig(),
    # The demo is sized for two CPU cores and five minutes.
    "demo": TrainConfig(
        steps=6,
        learning_rate=1e-5,
        batch_size=16,
        micro_batch_size=8,
        max_new_tokens=64,
        evaluation_size=32,
    ),
}
