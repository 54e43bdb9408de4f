"""The mean entropy of tokens as the loss of Transformers' Trainer, on the logits that its model returns."""

from typing import Any

import torch
from torch import Tensor, nn

from em_kernels.entropy import entropy_loss
from em_kernels.integrations.transformers.labels import IGNORED, check_shifted_count, shifted
from em_kernels.models.head import evaluating, probe_tokens
from em_kernels.models.partitioned import gathered


class EntropyLoss:
    """The mean entropy of the positions that predict a label, for the `compute_loss_func` of Transformers' Trainer.

    Under gradient accumulation, the micro-batches of a batch give the gradient of the whole batch's mean, whatever the
    number of tokens in each: sum(H) / N with the N that the Trainer has counted. The logits of a batch have to fit in
    memory; `EntropyTrainer` makes none.

    Args:
        temperature: tau > 0: the entropy is that of softmax(logits / tau).
        auxiliary_weight: what a mixture of experts multiplies its auxiliary loss with, `router_aux_loss_coef` in most
            configurations. Each micro-batch's auxiliary loss is also multiplied by the micro-batch's share of the
            batch's tokens.

    Raises:
        RuntimeError: the version of Transformers counts other labels than those that a position predicts.
    """

    def __init__(self, *, temperature: float = 1.0, auxiliary_weight: float | None = None) -> None:
        check_shifted_count()
        self.temperature = temperature
        self.auxiliary_weight = auxiliary_weight

    def __call__(self, outputs: Any, labels: Tensor | None, num_items_in_batch: int | Tensor | None = None) -> Tensor:
        """The loss of one micro-batch.

        Args:
            outputs: a model's output, with logits, (batch, time, V).
            labels: (batch, time), -100 where a token does not count.
            num_items_in_batch: the number of labels that count in the whole batch; None where there is one micro-batch.

        Raises:
            ValueError: there are no labels or no logits, or several counts, or an auxiliary loss without a weight.
        """
        if labels is None:
            raise ValueError("labels is None, expected the labels of the tokens that count and -100 elsewhere")
        logits = getattr(outputs, "logits", None)
        if logits is None:
            raise ValueError("the output has no logits, expected logits; EntropyTrainer trains without them")
        if isinstance(num_items_in_batch, Tensor) and num_items_in_batch.numel() != 1:
            raise ValueError(
                f"num_items_in_batch has shape {tuple(num_items_in_batch.shape)}, expected one number: DataParallel is "
                "not supported, launch with torchrun or accelerate"
            )
        mask = shifted(labels).to(logits.device) != IGNORED
        loss = entropy_loss(logits, mask, temperature=self.temperature, num_items_in_batch=num_items_in_batch)
        auxiliary = getattr(outputs, "aux_loss", None)
        if auxiliary is None:
            return loss
        if self.auxiliary_weight is None:
            raise ValueError(
                "the output has an auxiliary loss and auxiliary_weight is None, expected its weight, for example "
                "model.config.router_aux_loss_coef"
            )
        return loss + self.auxiliary_weight * auxiliary.to(loss.device) * share(mask, num_items_in_batch)


def share(mask: Tensor | None, num_items: int | Tensor | None) -> float | Tensor:
    """The share of a batch's tokens that a micro-batch has; 0 where the batch has none."""
    if mask is None or num_items is None:
        return 1.0
    return mask.sum() / (num_items.clamp(min=1) if isinstance(num_items, Tensor) else max(num_items, 1))


@torch.no_grad()
def check_own_loss(model: Any) -> None:
    """Raises ValueError unless the model's own loss is the cross-entropy of labels that are shifted by one position."""
    with evaluating(model), gathered(model):
        tokens = probe_tokens(model, model.get_input_embeddings().num_embeddings)
        output = model(input_ids=tokens, labels=tokens, use_cache=False, return_dict=True)
        auxiliary = auxiliary_loss(output, model)
    target = shifted(tokens).to(output.logits.device)
    expected = nn.functional.cross_entropy(output.logits.float().flatten(0, 1), target.flatten())
    expected = expected if auxiliary is None else expected + auxiliary.to(expected.device)
    if not torch.allclose(output.loss.float().to(expected.device), expected, rtol=1e-3, atol=1e-3):
        raise ValueError(
            f"the loss of {type(model).__name__} is {output.loss.item():.4g} where the cross-entropy of shifted labels "
            f"is {expected.item():.4g}, expected a causal language model whose loss is that"
        )


def auxiliary_loss(output: Any, model: Any) -> Tensor | None:
    """The auxiliary loss of a mixture of experts, weighted as the model weights it; None where the output has none.

    Raises:
        ValueError: neither the model nor its configuration names the weight.
    """
    auxiliary = getattr(output, "aux_loss", None)
    if auxiliary is None:
        return None
    for place in (model, model.config, model.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            weight = getattr(place, name, None)
            if weight is not None:
                return weight * auxiliary
    raise ValueError(
        f"the output of {type(model).__name__} has an auxiliary loss, expected its weight as router_aux_loss_coef or "
        "aux_loss_coef of the model or its configuration"
    )
