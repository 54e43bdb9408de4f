"""The evaluation of a policy: accuracy on word problems, and a few completions of the training prompts."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from accelerate import Accelerator

from em_kernels import token_entropy
from em_kernels.one_shot.data.built_in import make_problems
from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.evaluation.grading import Grader, Verdict
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed

# With the built-in model, two cores decode 160 tokens a second at 32 completions at once, and 126 at 16.
_PROBLEMS_AT_ONCE = 32
_COMPLETIONS_SHOWN = 3
# No seed of the evaluation may equal that of a training step, which is derived from (seed, step, rank).
_EVALUATION_STREAM = 2**31


@dataclass(frozen=True)
class Accuracy:
    """The number of correct answers; `mean` is their share, and `standard_error` the standard error of that share.

    Attributes:
        correct: the number of completions whose answer is right.
        total: the number of completions.
        unreadable: the number of completions, none of them correct, in which no answer could be read.
    """

    correct: int
    total: int
    unreadable: int = 0

    @property
    def mean(self) -> float:
        return self.correct / self.total

    @property
    def standard_error(self) -> float:
        return math.sqrt(self.mean * (1 - self.mean) / self.total)

    def __str__(self) -> str:
        unreadable = f" ({self.unreadable} unreadable)" if self.unreadable else ""
        return f"{self.mean:.1%} ± {self.standard_error:.1%}{unreadable}"


@dataclass(frozen=True)
class Completion:
    """A completion of a training prompt, token by token.

    Attributes:
        prompt: the training prompt.
        text: the completion without special tokens.
        tokens: the text of each token, special tokens included.
        entropy: for each token, the entropy at temperature 1 of the distribution before it, in nats.
    """

    prompt: str
    text: str
    tokens: list[str]
    entropy: list[float]


@dataclass(frozen=True)
class Evaluation:
    """The results of one evaluation.

    Attributes:
        greedy: the accuracy of the most likely tokens; None where the evaluation had no problems.
        sampled: the accuracy at temperature 1; None where the evaluation had no problems.
        completions: sampled completions of training prompts.
    """

    greedy: Accuracy | None
    sampled: Accuracy | None
    completions: list[Completion]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Evaluation":
        return cls(
            greedy=values["greedy"] and Accuracy(**values["greedy"]),
            sampled=values["sampled"] and Accuracy(**values["sampled"]),
            completions=[Completion(**completion) for completion in values["completions"]],
        )


def evaluate(
    accelerator: Accelerator,
    policy: Policy,
    prompts: Sequence[str],
    *,
    size: int,
    temperature: float,
    max_new_tokens: int,
    seed: int,
    when: str,
) -> Evaluation:
    """Measures accuracy on seeded problems, shared out among the processes, and samples a few completions.

    Args:
        accelerator: the run's Accelerator.
        policy: the policy to evaluate.
        prompts: the training prompts. A few of them are completed, and no problem equals one of them but for numbers.
        size: the number of problems; 0 measures no accuracy.
        temperature: the temperature of the completions of the training prompts.
        max_new_tokens: the longest completion, in tokens.
        seed: the seed of the problems and of sampling.
        when: "before" or "after", for the progress bar.
    """
    greedy = sampled = None
    if size:
        problems = make_problems(size, seed=seed, exclude=prompts)
        limits = {"max_new_tokens": max_new_tokens, "seed": seed}
        with Grader() as grader:
            greedy = _accuracy(accelerator, policy, grader, problems, None, **limits, description=f"{when}: greedy")
            sampled = _accuracy(
                accelerator, policy, grader, problems, 1.0, **limits, description=f"{when}: temperature 1"
            )
    shown = [prompts[i % len(prompts)] for i in range(_COMPLETIONS_SHOWN)]
    # Every process samples the same completions, because a sharded model answers to all processes or to none.
    completions = _observe(accelerator, policy, shown, temperature, max_new_tokens, seed, f"{when}: completions")
    return Evaluation(greedy, sampled, completions)


def _accuracy(
    accelerator: Accelerator,
    policy: Policy,
    grader: Grader,
    problems: list[Problem],
    temperature: float | None,
    *,
    max_new_tokens: int,
    seed: int,
    description: str,
) -> Accuracy:
    rank, processes = accelerator.process_index, accelerator.num_processes
    own = problems[rank::processes]
    verdicts: list[Verdict] = []
    # The first process has the most problems, and the others sample as often, so that a sharded model answers to all.
    for start in range(0, len(problems[::processes]), _PROBLEMS_AT_ONCE):
        batch = own[start : start + _PROBLEMS_AT_ONCE]
        asked = batch or problems[:1]
        rollout = policy.sample(
            [problem.question for problem in asked],
            Sampling(temperature, max_new_tokens),
            seed=derive_seed(seed, _EVALUATION_STREAM + start, rank),
            description=f"{description}, problems {start + 1}-{start + len(batch)} of {len(own)}",
            show_progress=accelerator.is_main_process,
        )
        texts = policy.texts(rollout)[: len(batch)]
        verdicts += [grader.grade(text, problem).verdict for text, problem in zip(texts, batch, strict=True)]
    counts = torch.tensor([verdicts.count(verdict) for verdict in (Verdict.RIGHT, Verdict.UNREADABLE)])
    correct, unreadable = accelerator.reduce(counts.to(accelerator.device), "sum").tolist()
    return Accuracy(correct, len(problems), unreadable)


@torch.no_grad()
def _observe(
    accelerator: Accelerator,
    policy: Policy,
    prompts: list[str],
    temperature: float,
    max_new_tokens: int,
    seed: int,
    description: str,
) -> list[Completion]:
    """A completion of each prompt, with the entropy of its tokens."""
    rollout = policy.sample(
        prompts,
        Sampling(temperature, max_new_tokens),
        seed=derive_seed(seed, _EVALUATION_STREAM),
        description=description,
        show_progress=accelerator.is_main_process,
    )
    entropy = token_entropy(policy.completion_logits(rollout), mask=rollout.completion_mask)
    completions = zip(
        prompts, policy.texts(rollout), rollout.completion_ids(), entropy, rollout.completion_mask, strict=True
    )
    return [
        Completion(
            prompt,
            text,
            [policy.tokenizer.decode([token]) for token in ids.tolist()],
            [round(h, 6) for h in row[mask].tolist()],
        )
        for prompt, text, ids, row, mask in completions
    ]
