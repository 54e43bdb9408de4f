from typing import Any

import pytest
import torch

from em_kernels import find_head
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import Sampling


class _Wrapper(torch.nn.Module):
    """A wrapper that counts its calls, in the place of the wrapper of data parallelism."""

    def __init__(self, module: Any) -> None:
        super().__init__()
        self.module = module
        self.calls = 0

    def forward(self, **inputs: Any) -> Any:
        self.calls += 1
        return self.module(**inputs)


def test_only_gradients_need_the_wrapper(policy: Policy, rollout: Rollout) -> None:
    """Data parallelism waits for every process in each call of its wrapper, and one process must be able to score."""
    wrapper = _Wrapper(policy.model)
    wrapped = Policy(policy.model, policy.tokenizer, find_head(policy.model), prepared=wrapper)
    with torch.no_grad():
        logits, hidden = wrapped.completion_logits(rollout), wrapped.completion_hidden(rollout)
        wrapped.sample(["1+1?"], Sampling(1.0, 2), seed=0, description="", show_progress=False)
    assert wrapper.calls == 0
    assert torch.equal(wrapped.completion_logits(rollout), logits)
    assert torch.equal(wrapped.completion_hidden(rollout), hidden)
    assert wrapper.calls == 2


def test_samples_and_scores_in_its_dtype(policy: Policy, rollout: Rollout) -> None:
    dtypes: list[torch.dtype] = []
    policy.model.lm_head.register_forward_hook(lambda module, inputs, output: dtypes.append(output.dtype))
    for dtype in ("float32", "bfloat16"):
        computing = Policy(policy.model, policy.tokenizer, find_head(policy.model), dtype)
        dtypes.clear()
        computing.sample(["1+1?"], Sampling(1.0, 2), seed=0, description="", show_progress=False)
        assert set(dtypes) == {getattr(torch, dtype)}
        assert computing.completion_logits(rollout).dtype == getattr(torch, dtype)


def test_texts_are_those_of_the_completions_alone(policy: Policy) -> None:
    ids = torch.tensor([[0, 0, 5, 6, 7, 0, 0], [0, 8, 9, 5, 0, 0, 0]])
    mask = torch.tensor([[True, True, True, True], [True, True, False, False]])
    text = policy.tokenizer.decode
    assert policy.texts(Rollout(ids, ids > 0, mask, torch.tensor([True, False]))) == [text([6, 7]), text([5])]


def test_hidden_states_need_a_head(policy: Policy, rollout: Rollout) -> None:
    with pytest.raises(ValueError, match="the policy has no head, expected"):
        policy.completion_hidden(rollout)
