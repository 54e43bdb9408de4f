"""Completions as token ids, and the masks that tell generated tokens from padding."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from em_kernels.one_shot.policy.completion import Completion, padded


@dataclass(frozen=True)
class Rollout:
    """Prompts, padded on the left, each followed by the completion that the model generated.

    Attributes:
        input_ids: (batch, prompt + completion), the token ids.
        attention_mask: (batch, prompt + completion), bool, False on padding.
        completion_mask: (batch, completion), bool, True on generated tokens. The token that ends a completion counts as
            generated. The padding after the end does not, even where the same token pads.
        truncated: (batch,), bool, True on completions of the greatest length that nothing has ended.
    """

    input_ids: Tensor
    attention_mask: Tensor
    completion_mask: Tensor
    truncated: Tensor

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
                self.truncated[rows],
            )


def join(completions: Sequence[Completion], padding: int, device: torch.device) -> Rollout:
    """The completions, in their order, as a rollout on the device."""
    prompts, attended = padded([completion.prompt for completion in completions], padding, left=True)
    drawn, mask = padded([completion.ids for completion in completions], padding, left=False)
    truncated = torch.tensor([not completion.ended for completion in completions])
    tensors = torch.cat([prompts, drawn], dim=1), torch.cat([attended, mask], dim=1), mask, truncated
    return Rollout(*(tensor.to(device) for tensor in tensors))
