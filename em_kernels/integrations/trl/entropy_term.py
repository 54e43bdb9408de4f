"""An entropy term on top of the loss of a TRL trainer: SFT, GRPO or RLOO.

The term is coefficient * mean H over the tokens that the trainer learns from, in nats. A positive coefficient minimises
the entropy, as "One-shot Entropy Minimization" does beside other objectives (arXiv 2505.20282, section 4), a negative
one is a bonus. H is that of the forward pass which the trainer's own loss is made of, at the trainer's temperature: no
pass is added. The loss of an evaluation stays the trainer's own.

The sum of the entropies is divided by a number of tokens:

- SFT: those of the optimiser step, over all micro-batches and ranks, as in its own loss.
- GRPO: those of a generation times gradient_accumulation_steps / steps_per_generation, over all ranks. By default the
  two are equal, and a step takes the whole generation. The loss types dapo, cispo and vespo divide by this number too;
  the term divides by it under the other loss types as well.
- RLOO: those of a micro-batch; micro-batches are averaged, as in its own loss.

GRPO's top_entropy_quantile below 1 is refused: its loss then leaves tokens out that the term would count.
"""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback
from trl import GRPOTrainer, RLOOTrainer, SFTTrainer

from em_kernels.integrations.trl.target_entropy import TargetEntropy
from em_kernels.integrations.trl.version import check_version

_SAVED = "em_kernels_entropy_term"


def add_entropy_term(trainer: Any, coefficient: float | Callable[[int], float] | TargetEntropy) -> Callable[[], None]:
    """Adds coefficient * (mean token entropy) to the loss of a trainer, and returns a function that takes it off again.

    The coefficient of each step is logged as "entropy_term/coefficient", the mean entropy of a step's tokens as
    "entropy_term/entropy". The coefficient of a `TargetEntropy` is saved with the trainer's checkpoints, and a run that
    is resumed goes on with it.

    Args:
        trainer: a GRPOTrainer, RLOOTrainer or SFTTrainer of TRL, before train() is called.
        coefficient: a number, a function of the number of finished optimiser steps, or a `TargetEntropy`. Positive
            numbers lower the entropy, negative ones raise it.

    Raises:
        TypeError: the trainer or the coefficient is of another kind.
        ValueError: the coefficient is not finite, or the trainer's top_entropy_quantile is below 1.
        RuntimeError: the trainer has an entropy term, or TRL is of another version; or, in training, the trainer's loss
            is not made of one forward pass that gives entropies.
    """
    check_version()
    if not isinstance(trainer, (GRPOTrainer, RLOOTrainer, SFTTrainer)):
        raise TypeError(
            f"trainer is a {type(trainer).__name__}, expected a GRPOTrainer, RLOOTrainer or SFTTrainer of TRL"
        )
    quantile = getattr(trainer, "top_entropy_quantile", 1.0)
    if quantile < 1:
        raise ValueError(
            f"the trainer's top_entropy_quantile is {quantile}, expected 1.0: the entropy term counts every token"
        )
    if "compute_loss" in trainer.__dict__:
        raise RuntimeError("the trainer has an entropy term or another replaced compute_loss, expected its own")
    term = _EntropyTerm(trainer, coefficient)
    trainer.compute_loss = term.compute_loss
    trainer.add_callback(term)

    def remove() -> None:
        if trainer.__dict__.get("compute_loss") == term.compute_loss:
            del trainer.compute_loss
            trainer.remove_callback(term)

    return remove


class _EntropyTerm(TrainerCallback):
    """The term of one trainer: its compute_loss, and the callback that ends a step."""

    def __init__(self, trainer: Any, coefficient: Any) -> None:
        if isinstance(coefficient, bool) or not (
            isinstance(coefficient, (int, float, TargetEntropy)) or callable(coefficient)
        ):
            raise TypeError(
                f"coefficient is a {type(coefficient).__name__}, expected a number, a function of the step or a "
                "TargetEntropy"
            )
        if isinstance(coefficient, (int, float)):
            _finite(coefficient)
        self.trainer = trainer
        self.coefficient = coefficient
        self.steered = 0.0
        # Sum of entropies and number of tokens since the last optimiser step.
        self.window: Tensor | None = None

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """The trainer's own loss, and in training the term on top of it."""
        with _outputs_of(model) as outputs:
            result = type(self.trainer).compute_loss(
                self.trainer, model, inputs, return_outputs=return_outputs, num_items_in_batch=num_items_in_batch
            )
        if not (torch.is_grad_enabled() and self.trainer.model.training):
            return result
        if len(outputs) != 1 or not outputs[0].entropy.requires_grad:
            raise RuntimeError(
                f"the trainer's loss was made of {len(outputs)} forward passes with entropies, expected 1 with "
                "differentiable ones: compute_loss_func and label smoothing take the logits and leave the entropies out"
            )
        total, count = _total(outputs[0], inputs)
        moved = torch.stack([total.detach(), count.to(total.dtype)])
        self.window = moved if self.window is None else self.window + moved
        divisor = self._divisor(inputs, num_items_in_batch, count).clamp(min=1)
        term = self._at(self.trainer.state.global_step) * total / divisor
        return (result[0] + term, *result[1:]) if return_outputs else result + term

    def _at(self, step: int) -> float:
        """The coefficient of the optimiser step that follows `step` finished ones."""
        if isinstance(self.coefficient, TargetEntropy):
            return self.steered
        return _finite(self.coefficient(step)) if callable(self.coefficient) else self.coefficient

    def _divisor(self, inputs: Any, num_items_in_batch: Any, count: Tensor) -> Tensor:
        """The number by which a micro-batch divides its sum of entropies.

        Gradients of micro-batches are summed or, in RLOO, averaged, and gradients of ranks are averaged. A count of the
        tokens of all ranks is therefore divided by the number of ranks.
        """
        trainer = self.trainer
        ranks = trainer.accelerator.num_processes
        if isinstance(trainer, GRPOTrainer):
            share = trainer.current_gradient_accumulation_steps / trainer.args.steps_per_generation
            return inputs["num_items_in_batch"] * share / ranks
        if isinstance(trainer, SFTTrainer) and num_items_in_batch is not None:
            # The tokens are those of all ranks, over which gradients are averaged, only where the arguments ask for it.
            across = ranks // trainer.get_tp_size() if trainer.args.average_tokens_across_devices else 1
            return torch.as_tensor(num_items_in_batch, device=count.device) / across
        return count

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.window = None
        if isinstance(self.coefficient, TargetEntropy):
            saved = state.stateful_callbacks.get(_SAVED) if state.global_step > 0 else None
            self.steered = self.coefficient.initial if saved is None else saved["attributes"]["coefficient"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.window is None:
            return
        total, count = self.trainer.accelerator.reduce(self.window, "sum").tolist()
        self.window = None
        metrics = self.trainer._metrics["train"]
        # The state's global_step counts the step that ends here; the coefficient was taken before it did.
        metrics["entropy_term/coefficient"].append(self._at(state.global_step - 1))
        if count > 0:
            metrics["entropy_term/entropy"].append(total / count)
            if isinstance(self.coefficient, TargetEntropy):
                self.steered = self.coefficient.after(self.steered, total / count)
        if isinstance(self.coefficient, TargetEntropy):
            # The trainer's checkpoints keep what the state holds. As an ExportableState the callback would be kept too,
            # but restore_callback_states_from_checkpoint would then put a new callback in its place.
            state.stateful_callbacks[_SAVED] = {"args": {}, "attributes": {"coefficient": self.steered}}


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


def _total(outputs: Any, inputs: Any) -> tuple[Tensor, Tensor]:
    """The sum of the entropies of the tokens that are learnt from, and the number of these."""
    if "completion_mask" not in inputs:
        return outputs.entropy.sum(), outputs.label_mask.sum()
    mask = inputs["completion_mask"]
    mask = mask * inputs["tool_mask"] if "tool_mask" in inputs else mask
    return (outputs.entropy[:, -mask.shape[1] :] * mask).sum(), mask.sum()


def _finite(coefficient: float) -> float:
    if not math.isfinite(coefficient):
        raise ValueError(f"coefficient is {coefficient}, expected a finite number")
    return coefficient
