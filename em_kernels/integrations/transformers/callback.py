"""The entropy of the tokens that a Trainer trains on, among the numbers that it logs."""

from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from em_kernels import token_entropy
from em_kernels.integrations.transformers.forward import causal_model
from em_kernels.integrations.transformers.labels import Labels
from em_kernels.integrations.transformers.trainer import EntropyTrainer
from em_kernels.one_shot.metrics import DECIDED


class EntropyCallback(TrainerCallback):
    """Logs the mean entropy of a training run's tokens, and the share of those that are decided.

        trainer.add_callback(EntropyCallback(trainer))

    Two numbers are logged: "entropy", the mean in nats of softmax(logits), and "decided", the share of tokens whose
    entropy is below 0.01. They are over all processes and all tokens since the last log. Where the model gets labels,
    the positions that predict one count. Where it gets none, as with a `compute_loss_func`, all attended positions do.

    Each forward pass of the training costs one more pass over its logits, without a graph and without a
    synchronisation. Under `EntropyTrainer`, which makes no logits, it costs one matmul with the output projection. It
    costs nothing where the output has the entropy: under TRL's trainers, and with a model that is attached with the
    statistic "entropy". That entropy is the one of the trainer's, or of the attachment's, temperature.

    Args:
        trainer: the Trainer that logs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.sums: Tensor | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.on_train_end(args, state, control)  # A run that raised has not come to its end.
        self.model, self.step = causal_model(model), self.trainer.training_step
        self.replaced = self.trainer.__dict__.get("training_step")
        self.trainer.training_step = self._measured_step

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.sums = None
        if self.trainer.__dict__.get("training_step") == self._measured_step:
            del self.trainer.training_step
            if self.replaced is not None:
                self.trainer.training_step = self.replaced

    def _measured_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # The Trainer calls no callback where a step raises, and the model must not stay hooked.
        hook = self.model.register_forward_hook(self._measure, with_kwargs=True)
        objective = self.trainer.objective if isinstance(self.trainer, EntropyTrainer) else None
        try:
            if objective is not None:
                objective.measures = True
            return self.step(*args, **kwargs)
        finally:
            hook.remove()
            if objective is not None:
                objective.measures = False

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log or self.sums is None:
            return
        entropy, decided, tokens = self.trainer.accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        if tokens > 0:
            # The log of TRL's trainers would take their own numbers along, which belong to the entry that follows.
            Trainer.log(self.trainer, {"entropy": entropy / tokens, "decided": decided / tokens})
            # Trainer.log resets should_log, and the Trainer would then not log its loss.
            control.should_log = True

    on_epoch_end = on_step_end

    def _measure(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        # Models also generate, and score completions, while they train.
        if model.training and torch.is_grad_enabled():
            with torch.no_grad():
                self._add(kwargs, output)

    def _add(self, kwargs: dict[str, Any], output: Any) -> None:
        mask = Labels.taken_from(dict(kwargs)).mask
        stats = getattr(output, "token_stats", None)
        if stats is not None and stats.entropy is not None:
            entropy = stats.entropy.detach()
        elif getattr(output, "logits", None) is not None:
            entropy = token_entropy(output.logits, None if mask is None else mask.to(output.logits.device))
        elif getattr(output, "entropy", None) is not None and getattr(output, "label_mask", None) is not None:
            entropy, mask = output.entropy.detach(), output.label_mask  # TRL's output
        else:
            raise ValueError(
                "the model's output has neither logits nor the entropy of its tokens, expected one of them"
            )
        counted = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask.to(entropy.device) != 0
        sums = torch.stack([(entropy * counted).sum(), ((entropy < DECIDED) & counted).sum(), counted.sum()])
        self.sums = sums.double() if self.sums is None else self.sums + sums
