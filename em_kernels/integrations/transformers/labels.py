"""Which token a position of a causal language model predicts, and which positions count."""

from typing import Any, NamedTuple

import torch
import transformers
from packaging.version import Version
from torch import Tensor, nn

# What Transformers gives a position that predicts nothing.
IGNORED = -100


class Labels(NamedTuple):
    """What a call of a model says of its tokens.

    Attributes:
        target: (batch, time), the token that each position predicts, IGNORED where none counts; None without labels.
        mask: (batch, time), the positions that count; None where every position does.
        num_items: the tokens of the whole batch, of which the call has a part; None where the call has all of them.
    """

    target: Tensor | None
    mask: Tensor | None
    num_items: int | Tensor | None

    def to(self, device: torch.device) -> "Labels":
        """The same on the device of the hidden states, which is not that of the inputs where a model has several."""
        moved: list[Any] = [field.to(device) if isinstance(field, Tensor) else field for field in self]
        return Labels(*moved)

    @classmethod
    def taken_from(cls, arguments: dict[str, Any]) -> "Labels":
        """Removes the labels from a call's arguments, so that the model itself, which has no logits, makes no loss."""
        labels, target = arguments.pop("labels", None), arguments.pop("shift_labels", None)
        num_items = arguments.pop("num_items_in_batch", None)
        if target is None and labels is not None:
            target = shifted(labels)
        mask = arguments.get("attention_mask") if target is None else target != IGNORED
        if mask is not None and (not isinstance(mask, Tensor) or mask.dim() != 2):
            mask = None
        kept = arguments.get("logits_to_keep", 0)
        return cls(_kept(target, kept), _kept(mask, kept), num_items)


def shifted(labels: Tensor) -> Tensor:
    """The token that each position predicts: the label of the next one, as Transformers takes it; (..., time)."""
    return nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:]


def check_shifted_count() -> None:
    """Raises RuntimeError for a Transformers whose Trainer may count labels that no position predicts."""
    if Version(transformers.__version__) < Version("5.23"):
        raise RuntimeError(
            f"transformers is {transformers.__version__}, expected at least 5.23, whose Trainer counts the labels that "
            "a position predicts"
        )


def check_temperature(temperature: float) -> None:
    """Raises ValueError unless the temperature is positive."""
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, expected a positive number")


def _kept(tokens: Tensor | None, kept: int | Tensor) -> Tensor | None:
    """The positions of `logits_to_keep`: the last ones, all of them for 0, or those of a tensor of indices."""
    if tokens is None:
        return None
    return tokens[:, kept] if isinstance(kept, Tensor) else tokens[:, -kept:]
