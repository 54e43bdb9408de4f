import random
from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed, draw

SAMPLING = Sampling(1.0, 10)


@pytest.mark.parametrize("absolute_positions", [False, True])
def test_scores_the_distribution_each_token_was_drawn_from(policy: Policy, absolute_positions: bool) -> None:
    """The scored logits and the random numbers of a completion's seed lead to the tokens that were drawn."""
    if absolute_positions:
        # Unlike with rotary positions, counting the padding on the left as positions changes the logits.
        model = cast(Any, GPT2LMHeadModel)(
            GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        )
        model.generation_config.eos_token_id = policy.tokenizer.eos_token_id
        policy = Policy(model, policy.tokenizer)
    with torch.no_grad():
        policy.model.lm_head.weight[0] *= 2
    prompts = ["1+1?", "a longer one", "x"] * 4
    rollout = policy.sample(prompts, SAMPLING, seed=3, description="", show_progress=False)
    with torch.no_grad():
        logits = policy.completion_logits(rollout)
    assert logits.shape == (*rollout.completion_mask.shape, 257)
    for i, (scored, ids) in enumerate(zip(logits, rollout.completion_ids(), strict=True)):
        numbers = random.Random(derive_seed(3, i))
        uniform = torch.tensor([numbers.random() for _ in ids], dtype=torch.float64)
        assert draw(scored[: len(ids)], SAMPLING, uniform)[0].tolist() == ids.tolist()


def test_model_without_the_optional_arguments(policy: Policy, rollout: Rollout) -> None:
    """The right logits are picked from a model that makes the logits of all positions and counts positions itself."""
    unpadded = next(
        part for part in rollout.micro_batches(1) if part.attention_mask.all() and part.completion_mask.shape[1] > 1
    )
    expected = policy.completion_logits(unpadded)
    forward: Callable[..., Any] = policy.model.forward

    def plain(input_ids: Tensor, attention_mask: Tensor, use_cache: bool) -> Any:
        return forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)

    policy.model.forward = plain
    torch.testing.assert_close(policy.completion_logits(unpadded), expected)
