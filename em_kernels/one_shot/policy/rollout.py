"""Completions as token ids, and the masks that tell generated tokens from padding."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rollout:
    """Prompts, padded on the left, each followed by the completion that the model generated.

    Attributes:
        input_ids: (batch, prompt + completion), the token ids.
        attention_mask: (batch, prompt + completion), bool, False on padding.
        completion_mask: (batch, completion), bool, True on generated tokens. The end-of-sequence token that ends a
            completion counts as generated. The padding after the end does not, even where the same token pads.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor

    def completion_ids(self) -> list[Tensor]:
        """The generated token ids of each completion, each of shape (the completion's length,)."""
        completions = self.input_ids[:, -self.completion_mask.shape[1] :]
        return [ids[mask] for ids, mask in zip(completions, self.completion_mask, strict=True)]

    def micro_batches(self, size: int) -> Iterator["Rollout"]:
        """Parts of the rollout, of at most `size` completions of similar length, without columns of only padding."""
        for rows in torch.argsort(self.completion_mask.sum(1), stable=True).split(size):
            attended = self.attention_mask[rows].any(0).nonzero()
            start, stop = int(attended[0]), int(attended[-1]) + 1
            prompt = self.input_ids.shape[1] - self.completion_mask.shape[1]
            yield Rollout(
                self.input_ids[rows, start:stop],
                self.attention_mask[rows, start:stop],
                self.completion_mask[rows, : stop - prompt],
            )
