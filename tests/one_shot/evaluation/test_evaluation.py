import dataclasses
import json
import math

import pytest
from accelerate import Accelerator

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.data.built_in import make_problems
from em_kernels.one_shot.evaluation import Accuracy, Evaluation, evaluate
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.rollout import Rollout


def test_standard_error_of_a_share() -> None:
    accuracy = Accuracy(correct=8, total=32)
    assert accuracy.standard_error == pytest.approx(math.sqrt(0.25 * 0.75 / 32))
    assert str(accuracy) == "25.0% ± 7.7%"
    assert str(Accuracy(correct=8, total=32, unreadable=3)) == "25.0% ± 7.7% (3 unreadable)"


def _evaluate(policy: Policy, config: TrainConfig, when: str) -> Evaluation:
    return evaluate(
        Accelerator(mixed_precision="no"),
        policy,
        config.prompts,
        size=config.evaluation_size,
        temperature=config.temperature,
        max_new_tokens=config.max_new_tokens,
        seed=config.seed,
        when=when,
    )


@pytest.fixture
def evaluated(policy: Policy, tiny_config: TrainConfig) -> Evaluation:
    return _evaluate(policy, tiny_config, "before")


def test_completions_come_with_an_entropy_per_token(evaluated: Evaluation) -> None:
    assert len(evaluated.completions) == 3
    for completion in evaluated.completions:
        assert completion.prompt == "2+2?"
        assert 1 <= len(completion.tokens) == len(completion.entropy) <= 8
        assert all(0 < entropy < math.log(257) for entropy in completion.entropy)
        # The special token that ends a completion is one of the tokens, but no part of the text.
        assert "".join(completion.tokens).removesuffix("<end>").isascii() is completion.text.isascii()


def test_evaluation_survives_the_run_folder(evaluated: Evaluation) -> None:
    assert Evaluation.from_json(json.loads(json.dumps(evaluated.to_json()))) == evaluated
    nothing = dataclasses.replace(evaluated, greedy=None, sampled=None)
    assert Evaluation.from_json(json.loads(json.dumps(nothing.to_json()))) == nothing


def test_accuracy_counts_answers_to_their_own_problems(
    policy: Policy, tiny_config: TrainConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An oracle stands in for the model's text; its answer is right on each problem whose answer is even."""
    config = dataclasses.replace(tiny_config, evaluation_size=70, max_new_tokens=1)
    problems = make_problems(70, seed=config.seed, exclude=config.prompts)
    expected = sum(int(problem.answers[0]) % 2 == 0 for problem in problems)
    answers = {problem.question: problem.answers[0] for problem in problems}

    def oracle(rollout: Rollout) -> list[str]:
        prompts = [
            policy.tokenizer.decode(ids[:-1][mask[:-1]]).removeprefix("user:").removesuffix("<end>a:")
            for ids, mask in zip(rollout.input_ids, rollout.attention_mask, strict=True)
        ]
        return [answers[p] if p in answers and int(answers[p]) % 2 == 0 else "none" for p in prompts]

    monkeypatch.setattr(policy, "texts", oracle)
    result = _evaluate(policy, config, "after")
    assert result.greedy == result.sampled == Accuracy(expected, 70, unreadable=70 - expected)


def test_no_problems_no_accuracy(policy: Policy, tiny_config: TrainConfig) -> None:
    result = _evaluate(policy, dataclasses.replace(tiny_config, evaluation_size=0), "before")
    assert result.greedy is result.sampled is None
