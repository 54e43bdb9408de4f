"""The policy, which draws completions of chats and gives the distribution that each generated token was drawn from."""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any

import torch
from torch import Tensor

from em_kernels.models.head import OutputHead
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy.chat import OWN_TEMPLATE, ChatFormat, encode_prompts
from em_kernels.one_shot.policy.completion import Completion, Decoding, check_context
from em_kernels.one_shot.policy.generation import Generated, Request, finish
from em_kernels.one_shot.policy.rollout import Rollout, join
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed
from em_kernels.one_shot.policy.scoring import scoring_inputs
from em_kernels.one_shot.policy.stops import find_stops
from em_kernels.one_shot.progress import progress


class Policy:
    """A causal language model, together with what it takes to sample from the model and to score with the model.

    Args:
        model: a Transformers causal language model.
        tokenizer: the model's tokenizer.
        head: the model's output projection, for `inside_head`; None where only logits are asked for.
        dtype: the dtype that the model computes in, "float32" or "bfloat16".
        prepared: the model as Accelerate has prepared it, wrapped where several processes train together; None where
            nothing wraps the model.
        chat: how a prompt becomes the text that the model completes, and what ends the completion.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        head: OutputHead | None = None,
        dtype: str = "float32",
        *,
        prepared: Any = None,
        chat: ChatFormat = OWN_TEMPLATE,
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.head = head
        self.dtype = dtype
        self.prepared = model if prepared is None else prepared
        self.chat = chat

    def check(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Checks that each prompt can be put to the model, and fits the model's context together with its completion.

        Raises:
            UsageError: a prompt cannot be put into the template, or is too long.
        """
        longest = max(len(ids) for ids in encode_prompts(self.tokenizer, prompts, self.chat))
        check_context(self.model, longest, max_new_tokens)

    def sample(
        self,
        prompts: Sequence[str],
        sampling: Sampling,
        *,
        seed: int,
        description: str,
        show_progress: bool = True,
    ) -> Rollout:
        """Draws a completion of each prompt from softmax(logits / temperature), unless the sampling has a filter.

        The sampling settings that the model came with take no effect, because the loss scores softmax(logits /
        temperature).

        Args:
            prompts: the prompts; the same one may occur many times.
            sampling: the settings of sampling.
            seed: the seed of the draws; each place among the prompts has its own draws.
            description: the text of the progress bar.
            show_progress: whether to show a progress bar.

        Raises:
            UsageError: a prompt cannot be put into the template, or does not fit the model's context together with its
                completion.
        """
        ids = encode_prompts(self.tokenizer, prompts, self.chat)
        return self.sample_ids(ids, sampling, seed=seed, description=description, show_progress=show_progress)

    def sample_ids(
        self,
        prompts: Sequence[list[int]],
        sampling: Sampling,
        *,
        seed: int,
        description: str,
        show_progress: bool = True,
    ) -> Rollout:
        """Draws as `sample` does, after prompts that are token ids."""
        check_context(self.model, max(len(ids) for ids in prompts), sampling.max_new_tokens)
        batch = [Completion(ids, random.Random(derive_seed(seed, i))) for i, ids in enumerate(prompts)]
        with progress(sampling.max_new_tokens, description, "tokens", show=show_progress) as bar:
            decoding = self._decoding(sampling)
            # Entered here, autocast converts the weights once, and not every few tokens.
            with self.computing():
                list(finish(decoding, batch, len(batch), bar.update))
        return join(batch, decoding.padding, self.model.device)

    def complete(
        self,
        requests: Iterable[Request],
        sampling: Sampling,
        *,
        at_once: int,
        description: str,
        show_progress: bool = True,
    ) -> Iterator[Generated]:
        """Completes requests, and yields each completion when it has ended, in any order.

        A completion depends on its own prompt and seed alone, up to rounding. Where the model is sharded, every process
        has to make the call with as many requests.

        Args:
            requests: the requests, of which the next are taken when there is a place for them.
            sampling: the settings of sampling.
            at_once: the number of completions that are in the making at once.
            description: the text of the progress bar.
            show_progress: whether to show a progress bar over the completions.

        Raises:
            UsageError: `at_once` is below 1, or the request that is taken is one that `sample` refuses.
        """
        if at_once < 1:
            raise UsageError(f"at_once is {at_once}, expected an integer of at least 1")
        decoding = self._decoding(sampling)
        total = len(requests) if isinstance(requests, Sized) else None
        completions = (self._begin(request, sampling) for request in requests)
        with progress(total, description, "completions", show=show_progress) as bar:
            finished = finish(decoding, completions, at_once, lambda _: None)
            while True:
                # Entered here, autocast converts the weights once for several tokens, and not for each.
                with self.computing():
                    completion = next(finished, None)
                if completion is None:
                    return
                bar.update(1)
                text = decoding.stops.text(completion.ids)
                truncated = not completion.ended
                yield Generated(completion.key, text, len(completion.ids), truncated, completion.logprob)

    def texts(self, rollout: Rollout) -> list[str]:
        """The completions as text, without special tokens, up to the first of the texts that end a completion."""
        stops = find_stops(self.model, self.tokenizer, self.chat)
        return [stops.text(ids) for ids in rollout.completion_ids()]

    def _begin(self, request: Request, sampling: Sampling) -> Completion:
        [ids] = encode_prompts(self.tokenizer, [request.prompt], self.chat)
        check_context(self.model, len(ids), sampling.max_new_tokens)
        return Completion(ids, random.Random(request.seed), key=request.key)

    def _decoding(self, sampling: Sampling) -> Decoding:
        self.model.eval()
        # Any token will do as padding, because no mask is ever derived from the padding token.
        padding = self.tokenizer.pad_token_id or 0
        return Decoding(
            self.model, sampling, find_stops(self.model, self.tokenizer, self.chat), padding, self.computing
        )

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
