import math
import re
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig

from em_kernels.one_shot import progress
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.chat import ChatFormat, encode_prompts
from em_kernels.one_shot.policy.rollout import Rollout
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed, draw

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


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temperature": 0.0}, "temperature is 0.0, expected a finite number above 0"),
        ({"temperature": math.nan}, "temperature is nan, expected a finite number above 0"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected an integer of at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5, expected a finite number above 0 and at most 1"),
        ({"top_p": 0}, "top_p is 0, expected a finite number above 0 and at most 1"),
        ({"top_k": -1}, "top_k is -1, expected an integer of at least 0"),
        ({"top_k": 2.0}, "top_k is 2.0, expected an integer of at least 0"),
        ({"repetition_penalty": math.inf}, "repetition_penalty is inf, expected a finite number above 0"),
    ],
)
def test_settings_out_of_range(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=f"^{re.escape(message)}$"):
        Sampling(**{"temperature": 1.0, "max_new_tokens": 12, **settings})


def test_only_filters_change_the_distribution() -> None:
    assert not Sampling(0.5, 12).filtered
    assert not Sampling(None, 12).filtered
    assert all(Sampling(0.5, 12, **f).filtered for f in ({"top_p": 0.9}, {"top_k": 9}, {"repetition_penalty": 1.1}))


def _shares(logits: Tensor, sampling: Sampling, seen: Tensor | None = None) -> Tensor:
    """How often each token is drawn, for random numbers that lie evenly in [0, 1)."""
    numbers = (torch.arange(_EVENLY, dtype=torch.float64) + 0.5) / _EVENLY
    rows = logits.expand(_EVENLY, -1)
    tokens, largest = draw(rows, sampling, numbers, None if seen is None else seen.expand(_EVENLY, -1))
    assert torch.equal(largest.isfinite(), torch.ones(_EVENLY, dtype=torch.bool))
    return torch.bincount(tokens, minlength=len(logits)) / _EVENLY


_EVENLY = 20_000
_LOGITS = torch.tensor([1.0, -torch.inf, 0.5, 3.0, -2.0, 2.5, 0.0, -torch.inf])


@pytest.mark.parametrize("temperature", [0.3, 1.0, 5.0])
def test_draws_are_the_softmax_at_the_temperature(temperature: float) -> None:
    expected = (_LOGITS.double() / temperature).softmax(0)
    assert (_shares(_LOGITS, Sampling(temperature, 1)) - expected).abs().max() < 1.01 / _EVENLY


@pytest.mark.parametrize("temperature", [1e-3, 1e-42])
def test_tiny_temperature_takes_the_most_likely(temperature: float) -> None:
    assert _shares(_LOGITS, Sampling(temperature, 1)).tolist() == [0, 0, 0, 1, 0, 0, 0, 0]


def test_filters_draw_from_the_softmax_of_what_they_leave() -> None:
    def softmax_of(*tokens: int, logits: Tensor = _LOGITS) -> Tensor:
        left = torch.full_like(logits, -torch.inf)
        left[list(tokens)] = logits[list(tokens)]
        return left.double().softmax(0)

    seen = torch.zeros(8, dtype=torch.bool)
    seen[[3, 4]] = True
    penalised = _LOGITS.clone()
    penalised[3], penalised[4] = 3.0 / 1.5, -2.0 * 1.5
    for settings, expected in (
        ({"top_k": 3}, softmax_of(3, 5, 0)),
        ({"top_k": 100}, softmax_of(*range(8))),
        # The two most likely tokens have 0.854 of the probability, and the third makes it 0.926.
        ({"top_p": 0.85}, softmax_of(3, 5)),
        ({"top_p": 0.86}, softmax_of(3, 5, 0)),
        ({"repetition_penalty": 1.5}, softmax_of(*range(8), logits=penalised)),
        ({"repetition_penalty": 1.5, "top_k": 1}, softmax_of(5)),
    ):
        shares = _shares(_LOGITS, Sampling(1.0, 1, **settings), seen if "repetition_penalty" in settings else None)
        assert (shares - expected).abs().max() < 1.01 / _EVENLY, settings


def test_no_number_leads_to_a_token_without_probability() -> None:
    almost_one = torch.tensor([math.nextafter(1.0, 0.0), 0.0], dtype=torch.float64)
    # Rounded sums of these are above and below 1.
    for logits in (_LOGITS, torch.arange(9.0), torch.cat([torch.zeros(1000), torch.full((5,), -torch.inf)])):
        for rows in (logits, torch.cat([torch.full((3,), -torch.inf), logits])):
            tokens, _ = draw(rows.expand(2, -1), Sampling(0.7, 1), almost_one)
            assert tokens.tolist() == [int(rows.isfinite().nonzero()[i]) for i in (-1, 0)]


@pytest.mark.parametrize("by_generate", [False, True])
def test_repetition_penalty_counts_the_prompt_and_the_completion(
    policy: Policy, by_generate: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A penalty that nothing survives makes all tokens differ, from each other and from the prompt's."""
    if by_generate:
        monkeypatch.setattr("em_kernels.one_shot.policy.generation.rows_can_change", lambda model: False)
    prompts = ["1+1?", "a longer one", "x"]
    with torch.no_grad():
        # All logits are positive, and those of seen tokens all but 0.
        policy.model.lm_head.weight.abs_()
        policy.model.model.norm.weight.abs_()
        policy.model.model.norm.register_forward_hook(lambda module, inputs, output: output.abs())
        # The token that pads is by far the most likely one, until it is drawn.
        policy.tokenizer.pad_token = "z"
        policy.model.lm_head.weight[policy.tokenizer.pad_token_id] += 1
    rollout = _sample(policy, prompts, temperature=None, repetition_penalty=1e6)
    prompt_tokens = rollout.input_ids.shape[1] - rollout.completion_mask.shape[1]
    for ids, attended, completion in zip(
        rollout.input_ids, rollout.attention_mask, rollout.completion_ids(), strict=True
    ):
        own = set(ids[:prompt_tokens][attended[:prompt_tokens]].tolist())
        assert len(set(completion.tolist()) - own) == len(completion)
    # The padding, whose token is the end token, is not penalised: the completions are those without padding.
    for prompt, completion in zip(prompts, rollout.completion_ids(), strict=True):
        [alone] = _sample(policy, [prompt], temperature=None, repetition_penalty=1e6).completion_ids()
        assert completion.tolist() == alone.tolist()
        assert completion[0] == policy.tokenizer.pad_token_id


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


def test_progress_counts_tokens(
    policy: Policy, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_SECONDS_BETWEEN_LINES", 0.0)
    monkeypatch.setattr(progress, "_quiet", False)
    policy.sample(["1+1?"], Sampling(1.0, 12), seed=1, description="drawing")
    assert re.search(r"^drawing: 12 of 12 \(tokens\)", capsys.readouterr().err, re.MULTILINE)
