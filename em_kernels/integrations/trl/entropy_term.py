"""An entropy term on top of the loss of a TRL trainer: SFT, GRPO or RLOO.

The term is coefficient * mean H over the tokens that the trainer learns from, in nats. A positive coefficient minimises
the entropy, as "One-shot Entropy Minimization" does beside other objectives (arXiv 2505.20282, section 4), a negative
one is a bonus. H is that of the forward pass which the trainer's own loss is made of: no pass is added.

The mean is over the tokens of the whole optimiser step where the trainer knows their number, which SFT and GRPO do,
and over each micro-batch's tokens with RLOO, whose own loss is a mean of micro-batches, too.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

try:
    from trl import GRPOTrainer, RLOOTrainer, SFTTrainer
except ImportError as error:
    raise ImportError("em_kernels.integrations.trl needs trl: pip install 'em-kernels[trl]'") from error


@dataclass
class TargetEntropy:
    """A coefficient that steers the mean entropy of an optimiser step to a target.

    After each step, coefficient += rate * (mean H - target), within [lowest, highest].

    Args:
        target: in nats, at least 0.
        rate: how much a nat of distance changes the coefficient in a step, above 0.
        initial: the first step's coefficient.
        lowest, highest: the range; below 0 the term is a bonus.

    Raises:
        ValueError: an argument does not fit.
    """

    target: float
    rate: float = 0.01
    initial: float = 0.0
    lowest: float = -1.0
    highest: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.target) and self.target >= 0):
            raise ValueError(f"target is {self.target}, expected an entropy in nats of at least 0")
        if not (math.isfinite(self.rate) and self.rate > 0):
            raise ValueError(f"rate is {self.rate}, expected a number above 0")
        if not self.lowest <= self.initial <= self.highest:
            raise ValueError(
                f"initial is {self.initial}, expected it between lowest, {self.lowest}, and highest, {self.highest}"
            )


def add_entropy_term(trainer: Any, coefficient: float | Callable[[int], float] | TargetEntropy) -> Callable[[], None]:
    """Adds coefficient * (mean token entropy) to the loss of a trainer, and returns a function that takes it off again.

    The coefficient of each step is logged as "entropy_term/coefficient", the mean entropy of a step as
    "entropy_term/entropy". That of a `TargetEntropy` is saved with the trainer's checkpoints, and a run that is resumed
    goes on with it.

    Args:
        trainer: a GRPOTrainer, RLOOTrainer or SFTTrainer of TRL, before train() is called.
        coefficient: a number, a function of the number of finished optimiser steps, or a `TargetEntropy`.

    Raises:
        TypeError: the trainer or the coefficient is of another kind.
        RuntimeError: the trainer has an entropy term; or, in training, its loss is not made of one forward pass that
            gives entropies.
    """
    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer, SFTTrainer)):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}, expected a GRPOTrainer, RLOOTrainer or SFTTrainer of TRL"
        )
    if "compute_loss" in trainer.__dict__:
        raise RuntimeError("the trainer has an entropy term or another replaced compute_loss, expected its own")
    term = _EntropyTerm(trainer, coefficient)
    trainer.compute_loss = term.compute_loss
    trainer.add_callback(term)

    def remove() -> None:
        del trainer.compute_loss
        trainer.remove_callback(term)

    return remove


class _EntropyTerm(TrainerCallback, ExportableState):
    """The term of one trainer: its compute_loss, and the callback that ends a step."""

    def __init__(self, trainer: Any, coefficient: Any) -> None:
        if isinstance(coefficient, bool) or not (
            isinstance(coefficient, (int, float, TargetEntropy)) or callable(coefficient)
        ):
            raise TypeError(
                f"coefficient is a {type(coefficient).__name__}, expected a number, a function of the step or a "
                "TargetEntropy"
            )
        self.trainer = trainer
        self.coefficient = coefficient
        self.steered = coefficient.initial if isinstance(coefficient, TargetEntropy) else 0.0
        # Sum of entropies and number of tokens since the last optimiser step.
        self.window: Tensor | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss plus the term."""
        with _outputs_of(model) as outputs:
            result = type(self.trainer).compute_loss(
                self.trainer, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if len(outputs) != 1 or outputs[0].entropy is None or not outputs[0].entropy.requires_grad:
            if not torch.is_grad_enabled():
                return result
            raise RuntimeError(
                f"the trainer's loss was made of {len(outputs)} forward passes with differentiable entropies, expected "
                "1: compute_loss_func and label smoothing take the logits and leave the entropies out"
            )
        total, count = self._total(outputs[0], inputs)
        if self.trainer.model.training:
            moved = torch.stack([total.detach(), count.to(total.dtype)])
            self.window = moved if self.window is None else self.window + moved
        term = (
            self._at(self.trainer.state.global_step)
            * total
            / self._divisor(inputs, num_items_in_batch, count).clamp(min=1)
        )
        return (result[0] + term, *result[1:]) if return_outputs else result + term

    def _at(self, step: int) -> float:
        """The coefficient of the optimiser step that follows `step` finished ones."""
        if isinstance(self.coefficient, TargetEntropy):
            return self.steered
        return self.coefficient(step) if callable(self.coefficient) else self.coefficient

    def _total(self, outputs: Any, inputs: Any) -> tuple[Tensor, Tensor]:
        """The sum of the entropies of the tokens that are learnt from, and the number of these."""
        if "completion_mask" not in inputs:
            return outputs.entropy.sum(), outputs.label_mask.sum()
        mask = inputs["completion_mask"]
        mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
        return (outputs.entropy[:, -mask.shape[1] :] * mask).sum(), mask.sum()

    def _divisor(self, inputs: Any, num_items_in_batch: Any, count: Tensor) -> Tensor:
        """The number of tokens such that the sum over micro-batches and the mean over ranks is the mean over tokens."""
        trainer = self.trainer
        processes = trainer.accelerator.num_processes
        if isinstance(trainer, GRPOTrainer):
            steps = trainer.current_gradient_accumulation_steps if trainer.model.training else 1
            if inputs.get("num_items_in_batch") is None:
                return count * steps
            # GRPO counts the tokens of a generation's batch, of which an optimiser step takes a part.
            share = steps / trainer.args.steps_per_generation if trainer.model.training else 1.0
            return inputs["num_items_in_batch"] / processes * share
        if isinstance(trainer, SFTTrainer) and num_items_in_batch is not None:
            # The trainer multiplies its own loss by the number of processes, over which gradients are averaged.
            counted = torch.as_tensor(num_items_in_batch, device=count.device)
            return counted / processes if trainer.args.average_tokens_across_devices else counted
        return count

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(self.coefficient, TargetEntropy) and isinstance(saved, dict) and state.global_step > 0:
            self.steered = saved["attributes"]["steered"]
        self.window = None

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.window is None:
            return
        total, count = self.trainer.accelerator.reduce(self.window, "sum").tolist()
        self.window = None
        metrics = self.trainer._metrics["train"]
        # The trainer has counted the step that ends here.
        metrics["entropy_term/coefficient"].append(self._at(state.global_step - 1))
        if count == 0:
            return
        mean = total / count
        metrics["entropy_term/entropy"].append(mean)
        if isinstance(self.coefficient, TargetEntropy):
            moved = self.steered + self.coefficient.rate * (mean - self.coefficient.target)
            self.steered = min(max(moved, self.coefficient.lowest), self.coefficient.highest)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; Trainer asks for it."""
        return {"args": {}, "attributes": {"steered": self.steered}}


@contextlib.contextmanager
def _outputs_of(model: Any) -> Iterator[list[Any]]:
    """A list to which each forward pass of the model that gives entropies appends its output."""
    found: list[Any] = []

    def keep(_: Any, __: Any, output: Any) -> None:
        if getattr(output, "entropy", None) is not None:
            found.append(output)

    hook = model.register_forward_hook(keep)
    try:
        yield found
    finally:
        hook.remove()
