"""Transformers' Trainer with the mean entropy as its loss, and without logits."""

from typing import Any

from torch import Tensor
from transformers import Trainer

from em_kernels import OutputHead, find_head, linear_entropy_loss, linear_token_entropy
from em_kernels.integrations.transformers.forward import Forward, causal_model, check_free
from em_kernels.integrations.transformers.labels import Labels, check_shifted_count, check_temperature
from em_kernels.integrations.transformers.loss import auxiliary_loss, check_own_loss, share
from em_kernels.integrations.transformers.output import TokenStatsOutput, without_logits


class EntropyTrainer(Trainer):
    """Transformers' Trainer that lowers the mean entropy of the positions that predict a label, without logits.

    Training and evaluation take the loss of `linear_entropy_loss` inside the output projection; everything else, saving
    and generation included, has the model as it was. The auxiliary loss of a mixture of experts is added as the model
    weights it, by each micro-batch's share of the tokens.

    Args:
        temperature: tau > 0: the entropy is that of softmax(logits / tau).
        vocab_size: the number of tokens, for a head that has more rows than there are tokens; None counts every row.

    The other arguments are those of the Trainer. The model must not be attached while the Trainer trains or evaluates.

    Raises:
        ValueError: the model's head does not fit, as `find_head` says it, or its own loss does not shift labels; or the
            Trainer is to have another loss, metrics of predictions, a model_init, or several GPUs in one process; or a
            batch to train on or to evaluate has no labels.
        RuntimeError: the model is attached already, or the version of Transformers counts other labels than those that
            a position predicts.
    """

    def __init__(self, *args: Any, temperature: float = 1.0, vocab_size: int | None = None, **kwargs: Any) -> None:
        check_shifted_count()
        super().__init__(*args, **kwargs)
        if self.compute_loss_func is not None or self.label_smoother is not None:
            raise ValueError("compute_loss_func or label_smoothing_factor is given, expected no other loss")
        if self.model_init is not None or self.compute_metrics is not None:
            raise ValueError("model_init or compute_metrics is given, expected a model, and no metrics of predictions")
        check_temperature(temperature)
        if self.args.n_gpu > 1:
            raise ValueError(
                f"one process has {self.args.n_gpu} GPUs, expected one: launch with torchrun or accelerate"
            )
        model = causal_model(self.model)
        check_free(model)
        self.objective = MeanEntropy(temperature)
        # The head is found before the Trainer shards the model.
        self._forward = Forward(model, find_head(model, vocab_size=vocab_size), self.objective)
        check_own_loss(model)
        # The loss takes the count and shifts the labels, whatever the model's own loss does.
        self.model_accepts_loss_kwargs = True
        self._loss_shifts_labels = True

    def compute_loss(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        _check_labels(inputs)
        self._forward.put_in()
        try:
            return super().compute_loss(model, inputs, *args, **kwargs)
        finally:
            self._forward.take_out()

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, *args: Any, **kwargs: Any
    ) -> Any:
        if prediction_loss_only:
            _check_labels(inputs)
        return super().prediction_step(model, inputs, prediction_loss_only, *args, **kwargs)


def _check_labels(inputs: dict[str, Any]) -> None:
    # The Trainer counts the tokens of a batch by its labels, and evaluates no loss without them.
    if inputs.get("labels") is None:
        raise ValueError("the batch has no labels, expected the labels of the tokens that count and -100 elsewhere")


class MeanEntropy:
    """The loss of a micro-batch, one number in the place of all logits.

    Attributes:
        measures: whether the output also gets the entropy of each token, at temperature 1 and without a gradient.
    """

    def __init__(self, temperature: float) -> None:
        self.temperature = temperature
        self.measures = False
        self.entropy: Tensor | None = None

    def made_of(self, hidden: Tensor, labels: Labels, head: OutputHead) -> Tensor:
        labels = labels.to(hidden.device)
        self.entropy = linear_token_entropy(hidden, mask=labels.mask, **head.arguments()) if self.measures else None
        loss = linear_entropy_loss(
            hidden, mask=labels.mask, num_items_in_batch=labels.num_items, **head.arguments(self.temperature)
        )
        return loss.view(1, 1, 1)

    def output(self, output: Any, made: Tensor, labels: Labels, model: Any) -> Any:
        loss, auxiliary = made.view(()), auxiliary_loss(output, model)
        if auxiliary is not None:
            loss = loss + auxiliary.to(loss.device) * share(labels.mask, labels.num_items)
        if self.entropy is None:
            return without_logits(output, loss=loss)
        return without_logits(output, loss=loss, token_stats=TokenStatsOutput(entropy=self.entropy))
