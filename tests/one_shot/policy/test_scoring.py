from collections.abc import Callable
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.chat import encode_chats
from em_kernels.one_shot.policy.rollout import Rollout


@pytest.mark.parametrize("absolute_positions", [False, True])
def test_scores_the_distribution_each_token_was_drawn_from(policy: Policy, absolute_positions: bool) -> None:
    if absolute_positions:
        # Unlike with rotary positions, counting the padding on the left as positions changes the logits.
        model = cast(Any, GPT2LMHeadModel)(
            GPT2Config(vocab_size=257, n_positions=64, n_embd=32, n_layer=2, n_head=4, initializer_range=0.3)
        )
        model.generation_config.eos_token_id = policy.tokenizer.eos_token_id
        policy = Policy(model, policy.tokenizer)
    with torch.no_grad():
        policy.model.lm_head.weight[0] *= 2
    chats = encode_chats(policy.tokenizer, ["1+1?", "a longer one", "x"] * 4)
    drawn_from: list[Tensor] = []
    generate = policy.model.generate

    def observed(**arguments: Any) -> Tensor:
        output = generate(**arguments, output_logits=True, return_dict_in_generate=True)
        drawn_from.extend(output.logits)
        return output.sequences

    policy.model.generate = observed
    rollout = policy.sample(chats, temperature=1.0, max_new_tokens=10, seed=3, description="", show_progress=False)
    expected = torch.stack(drawn_from, dim=1)[rollout.completion_mask]
    with torch.no_grad():
        logits = policy.completion_logits(rollout)
    assert logits.shape == (*rollout.completion_mask.shape, 257)
    torch.testing.assert_close(logits[rollout.completion_mask], expected, rtol=1e-4, atol=1e-4)


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
