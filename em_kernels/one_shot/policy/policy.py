"""The policy, which draws completions of chats and gives the distribution that each generated token was drawn from."""

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from em_kernels.models.head import OutputHead
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import (
    bare_generation_settings,
    check_context,
    generated_tokens,
    stop_tokens,
    token_bar,
)
from em_kernels.one_shot.policy.scoring import scoring_inputs
from em_kernels.one_shot.sharding import is_sharded


class Policy:
    """A causal language model, together with what it takes to sample from the model and to score with the model.

    Args:
        model: a Transformers causal language model.
        tokenizer: the model's tokenizer.
        head: the model's output projection, for `inside_head`; None where only logits are asked for.
        dtype: the dtype that the model computes in, "float32" or "bfloat16".
        prepared: the model as Accelerate has prepared it, wrapped where several processes train together; None where
            nothing wraps the model.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        head: OutputHead | None = None,
        dtype: str = "float32",
        *,
        prepared: Any = None,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.head = head
        self.dtype = dtype
        self.prepared = model if prepared is None else prepared

    @torch.no_grad()
    def sample(
        self,
        chats: Any,
        *,
        temperature: float | None,
        max_new_tokens: int,
        seed: int,
        description: str,
        show_progress: bool = True,
    ) -> Rollout:
        """Draws a completion of each chat from softmax(logits / temperature), without top-k, top-p or penalties.

        The sampling settings that the model came with take no effect, because the loss scores the distribution that a
        token was drawn from.

        Args:
            chats: input_ids and attention_mask, each (batch, prompt), padded on the left.
            temperature: the temperature of the softmax; None takes the most likely token.
            max_new_tokens: the longest completion, in tokens.
            seed: the seed of the draws.
            description: the text of the progress bar.
            show_progress: whether to show a progress bar.

        Raises:
            UsageError: prompt and completion do not fit the model's context, or the model generated no tokens.
        """
        check_context(self.model, chats, max_new_tokens)
        prompt, attended = (chats[name].to(self.model.device) for name in ("input_ids", "attention_mask"))
        end = stop_tokens(self.model, self.tokenizer)
        how: dict[str, Any]
        if temperature is None:
            how = {"do_sample": False, "top_k": None, "top_p": None}
        else:
            how = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        self.model.eval()
        torch.manual_seed(seed)
        with (
            self.computing(),
            bare_generation_settings(self.model, end=end, padding=self.tokenizer.pad_token_id),
            token_bar(max_new_tokens, description, show=show_progress) as bar,
        ):
            input_ids = self.model.generate(
                input_ids=prompt,
                attention_mask=attended,
                max_new_tokens=max_new_tokens,
                use_cache=True,
                # The steps of a sharded model gather parameters, so every process takes as many as the slowest.
                synced_gpus=is_sharded(self.model),
                stopping_criteria=bar,
                **how,
            )
        completions = input_ids[:, prompt.shape[1] :]
        if completions.shape[1] == 0:
            raise UsageError("the model generated no tokens, so there is nothing to train on")
        completion_mask = generated_tokens(completions, end)
        return Rollout(input_ids, torch.cat([attended.bool(), completion_mask], dim=1), completion_mask)

    def texts(self, rollout: Rollout) -> list[str]:
        """The completions as text, without special tokens."""
        return self.tokenizer.batch_decode(rollout.completion_ids(), skip_special_tokens=True)

    def completion_logits(self, rollout: Rollout) -> Tensor:
        """The logits that each generated token was drawn from: (batch, completion, V).

        They are the model's logits at the position before the token. Those of padding are included and mean nothing.
        """
        return self._forward(rollout).logits[:, -rollout.completion_mask.shape[1] :]

    def inside_head(self, rollout: Rollout, function: Callable[[Tensor], Tensor]) -> Tensor:
        """The scalar that `function` makes of the hidden states that the head would make `completion_logits` of.

        The function runs inside the head's forward, where the head's weight is whole however the model is sharded.

        Args:
            rollout: the completions to score.
            function: takes hidden states (batch, completion, D) and returns a scalar.

        Raises:
            ValueError: the policy has no head.
        """

        def in_place_of_logits(hidden: Tensor) -> Tensor:
            scalar = function(hidden[:, -rollout.completion_mask.shape[1] :])
            # In as many dimensions as logits, it passes through what the model does to its logits. A view would not do:
            # FSDP2 warns of it.
            return scalar.reshape(1, 1, 1).clone()

        with self._given_head().replaced(in_place_of_logits) as made:
            output = self._forward(rollout).logits
        # The model may have scaled or capped the scalar as it does its logits. What it made of the scalar counts for
        # nothing, but the wrappers learn from the model's output that a backward pass begins.
        return (made[0] + 0 * output).reshape(())

    def completion_hidden(self, rollout: Rollout) -> Tensor:
        """The hidden states that the head would make `completion_logits` of: (batch, completion, D).

        Raises:
            ValueError: the policy has no head.
        """
        with self._given_head().replaced(lambda hidden: hidden) as given:
            self._forward(rollout)
        return given[0][:, -rollout.completion_mask.shape[1] :]

    def computing(self) -> contextlib.AbstractContextManager[Any]:
        """A context in which matrix products run in the policy's dtype."""
        return torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.dtype == "bfloat16")

    def _given_head(self) -> OutputHead:
        if self.head is None:
            raise ValueError("the policy has no head, expected the OutputHead whose input is asked for")
        return self.head

    def _forward(self, rollout: Rollout) -> Any:
        # Gradients are averaged over the processes only if the wrapper is called. A call of the wrapper waits for all
        # processes, so without gradients the model itself is called, and one process can score on its own.
        model = self.prepared if torch.is_grad_enabled() else self.model
        with self.computing():
            return model(**scoring_inputs(self.model, rollout))
