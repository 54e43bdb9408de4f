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

    Whatever the run's loss is, each forward pass of the training costs one more pass over its logits, without a graph
    and without a synchronisation, or under `EntropyTrainer`, which makes no logits, one matmul with its output
    projection. A model that is attached with the statistic "entropy" costs nothing more. What is
    logged, as "entropy" (nats, of softmax(logits), or of the attached temperature) and "decided" (the share of tokens
    whose entropy is below 0.01), is over all processes and all tokens since it was logged last. The positions that
    count are those that predict a label where the model gets labels, and those attended to where it gets none, as with
    a `compute_loss_func`.

    Args:
        trainer: the Trainer that logs.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        self.sums: Tensor | None = None
        self.hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        self.sums = None
        if isinstance(self.trainer, EntropyTrainer):
            self.trainer.objective.measures = True
        self.hook = causal_model(model).register_forward_hook(self._measure, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.hook.remove()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if not control.should_log or self.sums is None:
            return
        entropy, decided, tokens = self.trainer.accelerator.reduce(self.sums, "sum").tolist()
        self.sums = None
        if tokens > 0:
            self.trainer.log({"entropy": entropy / tokens, "decided": decided / tokens})
            # To log is to have logged, and the Trainer would not log its loss.
            control.should_log = True

    @torch.no_grad()
    def _measure(self, model: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        if not model.training:
            return
        mask = Labels.taken_from(dict(kwargs)).mask
        stats = getattr(output, "token_stats", None)
        if stats is not None and stats.entropy is not None:
            entropy = stats.entropy.detach()
        elif getattr(output, "logits", None) is not None:
            entropy = token_entropy(output.logits, None if mask is None else mask.to(output.logits.device))
        else:
            raise ValueError(
                "the model's output has neither logits nor the entropy of its tokens, expected one of them"
            )
        counted = torch.ones_like(entropy, dtype=torch.bool) if mask is None else mask.to(entropy.device) != 0
        sums = torch.stack([(entropy * counted).sum(), ((entropy < DECIDED) & counted).sum(), counted.sum()])
        self.sums = sums.double() if self.sums is None else self.sums + sums
