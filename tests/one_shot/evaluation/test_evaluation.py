import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import Accelerator

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.data.built_in import make_problems
from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.evaluation import ProblemSet, evaluate, show, summaries
from em_kernels.one_shot.evaluation.records import Record, scores
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.generation import Generated, Request
from em_kernels.one_shot.policy.sampling import Sampling
from em_kernels.one_shot.policy.stops import Stops
from em_kernels.one_shot.preparation import evaluation_problems


def _evaluate(policy: Policy, problems: list[Problem], seed: int = 0) -> tuple[list[Record], float | None]:
    accelerator = Accelerator(mixed_precision="no")
    return evaluate(accelerator, policy, ProblemSet("set", problems), max_new_tokens=8, seed=seed, when="before")


def test_completions_come_with_an_entropy_per_token(policy: Policy) -> None:
    accelerator = Accelerator(mixed_precision="no")
    shown = show(accelerator, policy, ["2+2?"], Sampling(0.5, 8), seed=0, when="before")
    assert len(shown) == 3
    for completion in shown:
        assert completion.prompt == "2+2?"
        assert 1 <= len(completion.tokens) == len(completion.entropy) <= 8
        assert all(0 < entropy < math.log(257) for entropy in completion.entropy)
        # The special token that ends a completion is one of the tokens, but no part of the text.
        assert "".join(completion.tokens).removesuffix("<end>").isascii() is completion.text.isascii()


def test_each_problem_has_its_own_verdicts(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """An oracle stands in for the model's text; it answers every second problem, the last one first."""
    problems = make_problems(70, seed=0)
    answers = {problem.question: problem.answers[0] for problem in problems}

    def complete(self: Policy, requests: list[Request], *given: Any, **named: Any) -> Iterator[Generated]:
        for i, request in reversed(list(enumerate(requests))):
            text = f"\\boxed{{{answers[request.prompt]}}}" if i % 2 == 0 else "It is about 7."
            yield Generated(request.key, text, 3, False)

    monkeypatch.setattr(Policy, "complete", complete)
    records, agreement = _evaluate(policy, problems)
    assert [(record.temperature, record.problem) for record in records] == [
        (t, i) for t in (0.0, 1.0) for i in range(70)
    ]
    for record in records:
        assert (record.question, record.answers) == (
            problems[record.problem].question,
            problems[record.problem].answers,
        )
        expected = "right" if record.problem % 2 == 0 or problems[record.problem].answers == ("7",) else "wrong"
        assert record.verdict == expected
    assert agreement == 1
    right = sum(record.verdict == "right" for record in records[:70])
    greedy, sampled = summaries(5, records, agreement)
    assert greedy["accuracy"] == sampled["accuracy"] == right / 70
    assert (greedy["step"], greedy["decoding"], greedy["problems"], greedy["unreadable"]) == (5, "greedy", 70, 0)
    assert "agreement" not in greedy
    assert sampled["agreement"] == 1
    assert sum(score for [score] in scores(records, 1.0).values()) == right


def test_text_that_never_concluded_is_not_right(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem("3 + 4?", ("7",))
    monkeypatch.setattr(Stops, "length", lambda self, ids, checked=0: None)
    monkeypatch.setattr(Stops, "text", lambda self, ids: "3 + 4 = 7, and 3 + 4 = 7")
    records, agreement = _evaluate(policy, [problem])
    assert [(record.verdict, record.truncated, record.tokens) for record in records] == [("unfinished", True, 8)] * 2
    assert agreement == 0
    assert [row["truncated"] for row in summaries(0, records, agreement)] == [1, 1]


def test_completions_depend_on_the_problem_and_the_seed_alone(policy: Policy) -> None:
    problems = make_problems(5, seed=0)
    records, _ = _evaluate(policy, problems)
    of_one, _ = _evaluate(policy, problems[3:4])
    others, _ = _evaluate(policy, problems, seed=1)
    assert [r.completion for r in records[:5]] == [r.completion for r in others[:5]]
    assert [r.completion for r in records[5:]] != [r.completion for r in others[5:]]
    assert of_one[0].completion == records[3].completion


def test_no_problems_no_accuracy(policy: Policy) -> None:
    assert _evaluate(policy, []) == ([], None)
    assert summaries(0, [], None) == []


def test_problems_of_a_file(tmp_path: Path) -> None:
    path = tmp_path / "some.csv"
    path.write_text("question,answer\n" + "".join(f"{i} + 1?,{i + 1}\n" for i in range(20)))
    config = TrainConfig(prompts=("3 + 1?",), evaluation_size=5, evaluation_file=str(path))
    found = evaluation_problems(config)
    assert found.name == "some"
    assert len(found.problems) == 5
    assert evaluation_problems(TrainConfig(**{**vars(config), "seed": 8})) == found
    assert evaluation_problems(TrainConfig(**{**vars(config), "evaluation_seed": 8})) != found
    everything = evaluation_problems(TrainConfig(**{**vars(config), "evaluation_size": 100}))
    # The training prompt is none of them.
    assert [p.answers[0] for p in everything.problems] == [str(i + 1) for i in range(20) if i != 3]
    path.write_text("question,answer\n3 + 1?,4\n")
    with pytest.raises(UsageError, match="has no problem that is not a training prompt"):
        evaluation_problems(config)
