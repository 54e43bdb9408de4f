from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.chat import ChatFormat, encode_prompts
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed

END = 0


def _sample(policy: Policy, prompts: list[str], seed: int = 0, **changes: Any) -> Rollout:
    sampling = Sampling(**{"temperature": 1.0, "max_new_tokens": 12, **changes})
    return policy.sample(prompts, sampling, seed=seed, description="", show_progress=False)


def test_end_token_is_kept_and_padding_after_it_is_not(policy: Policy) -> None:
    assert policy.tokenizer.pad_token_id == policy.tokenizer.eos_token_id == END
    with torch.no_grad():
        # With the end token this likely, some completions end early and others do not.
        policy.model.lm_head.weight[END] *= 2
    rollout = _sample(policy, ["1+1?", "a longer one"] * 16)
    lengths = rollout.completion_mask.sum(1)
    assert lengths.min() < 12
    for ids in rollout.completion_ids():
        assert (ids[:-1] != END).all()
        assert ids[-1] == END or len(ids) == 12
    # All but the padding, on the left of the prompt and on the right of the completion, is attended to.
    prompt = rollout.input_ids.shape[1] - rollout.completion_mask.shape[1]
    assert torch.equal(rollout.attention_mask[:, prompt:], rollout.completion_mask)
    assert rollout.attention_mask[0, :prompt].sum() == len("user:1+1?") + 3


def test_completion_of_nothing_but_the_end_token_has_one_token(policy: Policy) -> None:
    with torch.no_grad():
        policy.model.lm_head.weight.zero_()
    # All logits are equal now, and the most likely token is the first of equals, the end token.
    rollout = _sample(policy, ["1+1?"] * 3, temperature=None)
    assert rollout.completion_mask.tolist() == [[True]] * 3


@pytest.mark.parametrize("max_new_tokens", [241, 10_000])
def test_prompt_and_completion_must_fit_the_context(policy: Policy, max_new_tokens: int) -> None:
    message = f"prompt has 16 tokens and max_new_tokens is {max_new_tokens}, .* context of 256 tokens"
    with pytest.raises(UsageError, match=message):
        _sample(policy, ["eight..."], max_new_tokens=max_new_tokens)


def test_seeds_differ_by_run_step_and_rank() -> None:
    seeds = {derive_seed(run, step, rank) for run in range(5) for step in range(5) for rank in range(5)}
    seeds |= {derive_seed(0, step) for step in range(5)} | {derive_seed(2**32 + run, 0, 0) for run in range(5)}
    assert len(seeds) == 135


def test_completions_follow_from_the_seed(policy: Policy) -> None:
    first, again, other = (_sample(policy, ["1+1?"] * 4, seed=seed).input_ids for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    "settings", [{"top_k": 1}, {"top_p": 0.01}, {"min_p": 0.99}, {"repetition_penalty": 5.0}, {"suppress_tokens": [7]}]
)
def test_the_models_own_sampling_settings_are_set_aside(policy: Policy, settings: dict[str, Any]) -> None:
    plain = _sample(policy, ["1+1?"] * 4)
    own = GenerationConfig(do_sample=True, eos_token_id=END, pad_token_id=END, **settings)
    policy.model.generation_config = own
    assert torch.equal(_sample(policy, ["1+1?"] * 4).input_ids, plain.input_ids)
    assert policy.model.generation_config is own


def test_draws_come_from_the_softmax_at_the_temperature(policy: Policy) -> None:
    draws = 4000
    rollout = _sample(policy, ["1+1?"] * draws, temperature=0.5, max_new_tokens=1)
    with torch.no_grad():
        logits = policy.model(torch.tensor(encode_prompts(policy.tokenizer, ["1+1?"], ChatFormat()))).logits
    p = (logits[0, -1] / 0.5).softmax(0)
    counts = torch.bincount(rollout.input_ids[:, -1], minlength=len(p))
    likely = p > 0.005
    assert 5 <= likely.sum() < len(p)
    # The counts are binomial, and the bound is five standard deviations.
    assert ((counts - draws * p).abs() < 5 * (draws * p * (1 - p)).sqrt())[likely].all()


def test_generation_uses_the_cache(policy: Policy) -> None:
    widths: list[int] = []
    policy.model.model.layers[0].register_forward_pre_hook(lambda module, inputs: widths.append(inputs[0].shape[1]))
    _sample(policy, ["1+1?"], seed=1)
    assert widths[0] == len("user:1+1?") + 3
    assert set(widths[1:]) == {1}


def test_progress_bar_counts_tokens(policy: Policy, capsys: pytest.CaptureFixture[str]) -> None:
    policy.sample(["1+1?"], Sampling(1.0, 12), seed=1, description="drawing")
    bar = capsys.readouterr().err
    assert "drawing" in bar
    assert "/12" in bar
