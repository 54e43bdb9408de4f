import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_architectures import OF_KEYS_AND_VALUES, OTHERS, tiny_architecture

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.policy import Policy, decoding
from em_kernels.one_shot.policy.cache import rows_can_change
from em_kernels.one_shot.policy.chat import ChatFormat, encode_prompts
from em_kernels.one_shot.policy.completion import Completion
from em_kernels.one_shot.policy.generation import Generated, Request, finish
from em_kernels.one_shot.policy.rollout import join
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed, draw

PROMPTS = ["1+1?", "a much longer prompt", "x", "1+1?", "a longer one", "three", "1+1?", "42"]
LONGEST = 20


def _complete(policy: Policy, sampling: Sampling, at_once: int, prompts: list[str] = PROMPTS) -> dict[Any, Generated]:
    requests = [Request(i, prompt, derive_seed(7, i)) for i, prompt in enumerate(prompts)]
    generated = policy.complete(requests, sampling, at_once=at_once, description="", show_progress=False)
    return {of_request.key: of_request for of_request in generated}


def _greedy_alone(policy: Policy, prompt: str) -> list[int]:
    """The completion that generate() makes of the prompt without any padding."""
    ids = torch.tensor(encode_prompts(policy.tokenizer, [prompt], ChatFormat()))
    output = policy.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=LONGEST, do_sample=False, pad_token_id=0
    )
    return output[0, ids.shape[1] :].tolist()


@pytest.fixture(params=[*OF_KEYS_AND_VALUES, *OTHERS])
def architecture(request: pytest.FixtureRequest, tiny: tuple[Any, Any]) -> tuple[str, Policy]:
    return request.param, Policy(tiny_architecture(request.param), tiny[1])


def test_every_architecture_completes_as_it_does_alone_and_scores_what_it_samples(
    architecture: tuple[str, Policy], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, policy = architecture
    assert rows_can_change(policy.model) is (name in OF_KEYS_AND_VALUES)
    monkeypatch.setattr(decoding, "_STEPS", 3)
    greedy = Sampling(None, LONGEST)
    alone = [_greedy_alone(policy, prompt) for prompt in PROMPTS]
    assert len({len(ids) for ids in alone}) > 1
    texts = [policy.tokenizer.decode(ids, skip_special_tokens=True) for ids in alone]
    for at_once in (1, 3, 8):
        generated = _complete(policy, greedy, at_once)
        assert [generated[i].text for i in range(len(PROMPTS))] == texts, at_once
        assert [generated[i].tokens for i in range(len(PROMPTS))] == [len(ids) for ids in alone], at_once
    rollout = policy.sample(PROMPTS, greedy, seed=0, description="", show_progress=False)
    assert [ids.tolist() for ids in rollout.completion_ids()] == alone

    sampling = Sampling(1.0, LONGEST)
    rollout = policy.sample(PROMPTS, sampling, seed=7, description="", show_progress=False)
    generated = _complete(policy, sampling, 3)
    assert policy.texts(rollout) == [generated[i].text for i in range(len(PROMPTS))]
    with torch.no_grad():
        logits = policy.completion_logits(rollout)
    for i, (scored, ids) in enumerate(zip(logits, rollout.completion_ids(), strict=True)):
        numbers = random.Random(derive_seed(7, i))
        uniform = torch.tensor([numbers.random() for _ in ids], dtype=torch.float64)
        assert draw(scored[: len(ids)], sampling, uniform)[0].tolist() == ids.tolist()


@pytest.fixture
def widths(policy: Policy) -> list[tuple[int, int]]:
    """The (rows, tokens) of each forward pass of the policy, whose completions end at many lengths."""
    policy.model.generation_config.eos_token_id = list(range(0, 257, 16))
    seen: list[tuple[int, int]] = []
    policy.model.model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(tuple(inputs[0].shape[:2])))
    return seen


def test_log_probabilities_are_those_at_temperature_one_without_filters(policy: Policy) -> None:
    sampling = Sampling(0.5, 12, top_k=5, repetition_penalty=1.2)
    prompts = encode_prompts(policy.tokenizer, PROMPTS[:3], ChatFormat())
    completions = [Completion(prompt, random.Random(i)) for i, prompt in enumerate(prompts)]
    list(finish(policy._decoding(sampling), completions, 2, lambda _: None))
    rollout = join(completions, 0, torch.device("cpu"))
    with torch.no_grad():
        logprobs = policy.completion_logits(rollout).log_softmax(dim=-1)
    for completion, expected in zip(completions, logprobs, strict=True):
        ids = torch.tensor(completion.ids)
        assert completion.logprobs == pytest.approx(expected[range(len(ids)), ids].tolist(), abs=1e-4)
        assert completion.logprob == pytest.approx(sum(completion.logprobs) / len(ids))


def test_a_prompt_is_read_once_for_all_of_its_completions(policy: Policy, widths: list[tuple[int, int]]) -> None:
    rollout = policy.sample(["1+1?"] * 5 + ["x"], Sampling(1.0, 4), seed=0, description="", show_progress=False)
    assert widths[0] == (2, len("user:1+1?<") + 2)
    assert widths[1] == (6, 1)
    assert len({tuple(ids.tolist()) for ids in rollout.completion_ids()[:5]}) == 5
    widths.clear()
    samples = [Request((prompt, i), prompt, i) for prompt in ("1+1?", "x") for i in range(6)]
    generated = policy.complete(samples, Sampling(1.0, 40), at_once=2, description="", show_progress=False)
    assert len(list(generated)) == 12
    assert [(rows, columns) for rows, columns in widths if columns > 1] == [(1, 12), (2, 12)]


def test_completions_that_have_ended_leave_the_batch(policy: Policy, widths: list[tuple[int, int]]) -> None:
    rollout = policy.sample(["1+1?"] * 12, Sampling(1.0, 60), seed=0, description="", show_progress=False)
    lengths = rollout.completion_mask.sum(1).tolist()
    steps = decoding._STEPS
    # A forward pass makes the token after it, and who has ended is seen after the first token and then every few.
    expected = [sum(length > max(1, i - (i - 1) % steps) for length in lengths) for i in range(1, max(lengths))]
    rows = [rows for rows, _ in widths[1:]]
    assert rows[: len(expected)] == expected
    assert len(rows) < len(expected) + steps
    assert rows[-1] < 12


def test_requests_are_taken_as_places_become_free(policy: Policy, widths: list[tuple[int, int]]) -> None:
    taken: list[int] = []

    def requests() -> Iterator[Request]:
        for i in range(40):
            taken.append(i)
            yield Request(i, PROMPTS[i % 8], i)

    arrived = []
    for generated in policy.complete(requests(), Sampling(1.0, 40), at_once=4, description="", show_progress=False):
        arrived.append(generated.key)
        assert len(taken) <= len(arrived) + 4 + 4
    assert sorted(arrived) == list(range(40))
    assert arrived != sorted(arrived)
    assert max(rows for rows, _ in widths) == 4
    # Nearly all steps are taken in full.
    tokens = [rows for rows, columns in widths if columns == 1]
    assert sum(rows == 4 for rows in tokens) > 0.7 * len(tokens)


def test_columns_go_with_the_rows_that_attend_to_them(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    policy.model.generation_config.eos_token_id = list(range(0, 257, 16))
    columns: list[int] = []
    policy.model.register_forward_pre_hook(
        lambda _, args, kwargs: columns.append(kwargs["attention_mask"].shape[1]), with_kwargs=True
    )
    requests = [Request(i, "x", i) for i in range(60)]
    list(policy.complete(requests, Sampling(1.0, 40), at_once=4, description="", show_progress=False))
    assert max(columns) <= len("user:x<a:") + 40


def test_long_prompts_are_read_in_parts(
    policy: Policy, widths: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    sampling = Sampling(1.0, 12)
    whole = _complete(policy, sampling, 8)
    widths.clear()
    monkeypatch.setattr(decoding, "_PREFILL_TOKENS", 40)
    assert _complete(policy, sampling, 8) == whole
    read = [(rows, columns) for rows, columns in widths if columns > 1]
    assert read == [(1, 12), (1, 28), (2, 12), (2, 20), (2, 12)]


def test_no_places(policy: Policy) -> None:
    with pytest.raises(UsageError, match="at_once is 0, expected an integer of at least 1"):
        _complete(policy, Sampling(None, 4), 0)


@pytest.mark.parametrize("temperature", [None, 1.0])
def test_diverged_model_is_an_error(policy: Policy, temperature: float | None) -> None:
    with torch.no_grad():
        policy.model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(UsageError, match="the model's logits are not finite"):
        policy.sample(["1+1?"], Sampling(temperature, 4), seed=0, description="", show_progress=False)


def test_without_end_tokens_every_completion_has_the_greatest_length(policy: Policy) -> None:
    policy.model.generation_config.eos_token_id = policy.tokenizer.eos_token = None
    policy.tokenizer.chat_template = "{{ messages[0].content }}"
    for model in (policy.model, tiny_architecture("phi3")):
        model.generation_config.eos_token_id = None
        endless = Policy(model, policy.tokenizer)
        rollout = endless.sample(PROMPTS, Sampling(None, 30), seed=0, description="", show_progress=False)
        assert rollout.truncated.all()
        assert rollout.completion_mask.all()
        assert rollout.completion_mask.shape == (len(PROMPTS), 30)


def test_code_that_is_not_transformers_own_completes_by_generate(policy: Policy) -> None:
    own = type("OwnModel", (type(policy.model),), {"__module__": "transformers_modules.own"})
    expected = _complete(policy, Sampling(1.0, 12), 8)
    policy.model.__class__ = own
    assert not rows_can_change(policy.model)
    assert _complete(policy, Sampling(1.0, 12), 8) == expected
