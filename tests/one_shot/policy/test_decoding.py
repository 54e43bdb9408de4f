import random
from typing import Any

import pytest
import torch
from tiny_architectures import OF_KEYS_AND_VALUES, OTHERS, tiny_architecture

from em_kernels.one_shot.policy import Policy, decoding
from em_kernels.one_shot.policy.cache import rows_can_change
from em_kernels.one_shot.policy.chat import ChatFormat, encode_prompts
from em_kernels.one_shot.policy.generation import Generated, Request
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
