"""Rewards without answers, for TRL's GRPOTrainer: how certain a model is of a completion, as the model itself says.

    model, tokenizer = ...
    GRPOTrainer(model, NegativeEntropyReward(model, tokenizer), processing_class=tokenizer, ...)

With the model that is trained, the reward is that of the current policy. The statistics are made inside the forward of
the model's output projection, in place of the logits.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from em_kernels.models.head import evaluating, find_head
from em_kernels.stats import linear_token_entropy, linear_token_stats


class _Reward:
    """The mean of a statistic over the tokens of each completion."""

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        temperature: float = 1.0,
        batch_size: int = 8,
        chat_template_kwargs: dict[str, Any] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, expected at least 1")
        self.model = model
        self.tokenizer = tokenizer
        self.temperature = temperature
        self.batch_size = batch_size
        self.chat_template_kwargs = chat_template_kwargs or {}
        self.head = find_head(model)

    @torch.no_grad()
    def __call__(
        self, prompts: Sequence[Any], completion_ids: Sequence[Sequence[int]], **others: Any
    ) -> list[float | None]:
        """The reward of each completion, as GRPOTrainer asks for it.

        Args:
            prompts: texts or lists of messages.
            completion_ids: the tokens of each completion.
            others: what else GRPOTrainer passes. Of these, tools, environments and completions are looked at.

        Returns:
            A number for each completion, None for one that has no tokens.

        Raises:
            ValueError: tools take part, whose results are tokens that the model did not generate; or an adapter
                changes the output projection.
        """
        _check_no_tools(others)
        # A trainer may have put an adapter on the output projection, or a copy in its place.
        if self.model.get_output_embeddings() is not self.head.module:
            self.head = find_head(self.model)
        contexts = self._encoded(prompts)
        rewards: list[float | None] = []
        for start in range(0, len(prompts), self.batch_size):
            end = start + self.batch_size
            rewards += self._rewards(contexts[start:end], completion_ids[start:end])
        return rewards

    def _statistic(self, hidden: Tensor, scored: Tensor, count: int) -> Tensor:
        """The statistic of each token, 0 where it is not scored; count is the number of those that are."""
        raise NotImplementedError

    def _encoded(self, prompts: Sequence[Any]) -> list[list[int]]:
        if isinstance(prompts[0], str):
            return self.tokenizer(text=list(prompts))["input_ids"]
        return self.tokenizer.apply_chat_template(
            list(prompts), add_generation_prompt=True, tokenize=True, return_dict=True, **self.chat_template_kwargs
        )["input_ids"]

    def _rewards(self, contexts: list[list[int]], completions: Sequence[Sequence[int]]) -> list[float | None]:
        sequences = [[*context, *completion] for context, completion in zip(contexts, completions, strict=True)]
        # Padding on the right leaves every token at the position that it had when it was generated.
        tokens = torch.zeros(len(sequences), max(map(len, sequences)), dtype=torch.long)
        attended, scored = torch.zeros_like(tokens), torch.zeros_like(tokens, dtype=torch.bool)
        for row, (context, sequence) in enumerate(zip(contexts, sequences, strict=True)):
            tokens[row, : len(sequence)] = torch.tensor(sequence)
            attended[row, : len(sequence)] = 1
            # A position predicts the next token, so the context's last one predicts the completion's first.
            scored[row, max(len(context) - 1, 0) : len(sequence) - 1] = True
        counts = scored.sum(1)
        found: list[Tensor] = []
        device = self.model.device

        def in_place_of_logits(hidden: Tensor) -> Tensor:
            found.append(self._statistic(hidden, scored.to(hidden.device), int(counts.sum())))
            return hidden

        with evaluating(self.model), self.head.replaced(in_place_of_logits):
            self.model(input_ids=tokens.to(device), attention_mask=attended.to(device), use_cache=False)
        means = found[0].sum(1).cpu() / counts
        return [None if number == 0 else mean for mean, number in zip(means.tolist(), counts.tolist(), strict=True)]


class NegativeEntropyReward(_Reward):
    """Minus the mean entropy, in nats, of the distributions that predict a completion's tokens: RENT.

    -(1/n) sum_t H(softmax(z_t / temperature)), "Maximizing Confidence Alone Improves Reasoning", arXiv 2505.22660.

    Args:
        model: a Transformers causal language model, as it is before a trainer wraps it.
        tokenizer: the model's tokenizer.
        temperature: of the softmax, above 0.
        batch_size: completions that are given to the model at a time.
        chat_template_kwargs: those of the trainer's GRPOConfig, for prompts that are lists of messages.

    Raises:
        ValueError: the model's output projection is not one that the linear functions can stand for.
    """

    def _statistic(self, hidden: Tensor, scored: Tensor, count: int) -> Tensor:
        head = self.head.arguments(self.temperature)
        return -linear_token_entropy(hidden, mask=scored, token_count=count, **head)


class SelfCertaintyReward(_Reward):
    """The mean divergence of the uniform distribution from those that predict a completion's tokens: INTUITOR.

    (1/n) sum_t KL(U || p_t) = (1/n) sum_t [-log V - (1/V) sum_j log p_tj] with p_t = softmax(z_t / temperature) and V
    the size of the vocabulary, "Learning to Reason without External Rewards", arXiv 2505.19590. The arguments are those
    of `NegativeEntropyReward`.
    """

    def _statistic(self, hidden: Tensor, scored: Tensor, count: int) -> Tensor:
        head = self.head.arguments(self.temperature)
        stats = linear_token_stats(hidden, mask=scored, token_count=count, extra=("mean_logprob",), **head)
        assert stats.mean_logprob is not None
        return torch.where(scored, -math.log(len(head["weight"])) - stats.mean_logprob, 0.0)


def _check_no_tools(others: dict[str, Any]) -> None:
    turns = [turn for turns in others.get("completions") or () if isinstance(turns, list) for turn in turns]
    called = any(turn.get("role") == "tool" or turn.get("tool_calls") for turn in turns)
    given = [name for name in ("tools", "environments") if any(others.get(name) or ())]
    if called or given:
        found = "completions with calls of tools" if called else " and ".join(given)
        raise ValueError(f"the reward was given {found}, expected prompts and completions without tools")
