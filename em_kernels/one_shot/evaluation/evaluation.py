"""The evaluation of a policy: every problem's completion and verdict, and a few completions of the training prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from accelerate import Accelerator
from accelerate.utils import gather_object

from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.evaluation.grading import Grader, Verdict
from em_kernels.one_shot.evaluation.measure import graded
from em_kernels.one_shot.evaluation.records import Record, scores
from em_kernels.one_shot.evaluation.statistics import mean_over_problems
from em_kernels.one_shot.policy import Policy
from em_kernels.one_shot.policy.generation import Request
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed
from em_kernels.one_shot.token_scores import score_tokens

# With the built-in model, two cores decode 160 tokens a second at 32 completions at once, and 126 at 16.
_PROBLEMS_AT_ONCE = 32
_COMPLETIONS_SHOWN = 3
# No seed of the evaluation may equal that of a training step, which is derived from (seed, step, rank).
_EVALUATION_STREAM = 2**31


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
class ProblemSet:
    """Problems under a name, which their records bear."""

    name: str
    problems: Sequence[Problem]


def evaluate(
    accelerator: Accelerator,
    policy: Policy,
    problem_set: ProblemSet,
    *,
    max_new_tokens: int,
    seed: int,
    when: str,
    between: Callable[[], None] = lambda: None,
) -> tuple[list[Record], float | None]:
    """Completes each problem twice, with the most likely tokens and at temperature 1, and grades the completions.

    The problems are shared out among the processes.

    Args:
        accelerator: the run's Accelerator.
        policy: the policy to evaluate.
        problem_set: the problems.
        max_new_tokens: the longest completion, in tokens.
        seed: the seed of sampling; a completion depends on it, its problem and the policy alone, up to rounding.
        when: what to call the evaluation where its progress is shown.
        between: called by every process between the two halves.

    Returns:
        The records of all processes, by temperature and problem, and the agreement: the share of problems on which the
        sampled completion has the answer of the greedy one. It is None without problems.
    """
    if not problem_set.problems:
        return [], None
    with Grader() as grader:
        greedy = _graded(accelerator, policy, grader, problem_set, None, max_new_tokens, seed, f"{when}: greedy")
        between()
        sampled = _graded(accelerator, policy, grader, problem_set, 1.0, max_new_tokens, seed, f"{when}: temperature 1")
        pairs = [(a.answer, b.answer) for a, b in zip(greedy, sampled, strict=True)]
        agreeing = sum(a is not None and b is not None and grader.same(a, b) for a, b in pairs)
    return [*greedy, *sampled], agreeing / len(problem_set.problems)


def summaries(step: int, records: Sequence[Record], agreement: float | None) -> list[dict[str, Any]]:
    """The lines of evaluations.jsonl that sum up the records of an evaluation, one for each temperature."""
    rows = []
    for temperature in sorted({record.temperature for record in records}):
        own = [record for record in records if record.temperature == temperature]
        accuracy = mean_over_problems(scores(own, temperature))
        row = {
            "step": step,
            "decoding": "greedy" if temperature == 0 else "sampled",
            "temperature": temperature,
            "accuracy": accuracy.mean,
            "standard_error": accuracy.standard_error,
            "problems": len(own),
            "unreadable": sum(record.verdict == Verdict.UNREADABLE.value for record in own),
            "truncated": sum(record.truncated for record in own),
            "length_mean": sum(record.tokens for record in own) / len(own),
        }
        rows.append(row if temperature == 0 or agreement is None else {**row, "agreement": agreement})
    return rows


def show(
    accelerator: Accelerator, policy: Policy, prompts: Sequence[str], sampling: Sampling, *, seed: int, when: str
) -> list[Completion]:
    """A few completions of the prompts, with the entropy of their tokens."""
    asked = [prompts[i % len(prompts)] for i in range(_COMPLETIONS_SHOWN)]
    # Every process samples the same completions, because a sharded model answers to all processes or to none.
    rollout = policy.sample(
        asked,
        sampling,
        seed=derive_seed(seed, _EVALUATION_STREAM),
        description=f"{when}: completions",
        show_progress=accelerator.is_main_process,
    )
    entropy = score_tokens(policy, rollout).entropy
    completions = zip(
        asked, policy.texts(rollout), rollout.completion_ids(), entropy, rollout.completion_mask, strict=True
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


def _graded(
    accelerator: Accelerator,
    policy: Policy,
    grader: Grader,
    problem_set: ProblemSet,
    temperature: float | None,
    max_new_tokens: int,
    seed: int,
    description: str,
) -> list[Record]:
    """The record of a completion of each problem, in their order."""
    problems = problem_set.problems
    own = range(accelerator.process_index, len(problems), accelerator.num_processes)
    # The first process has the most problems, and the others complete as many, so that a sharded model answers to all.
    asked = [*own, *[0] * (len(range(0, len(problems), accelerator.num_processes)) - len(own))]
    requests = [
        Request((place, i), problems[i].question, derive_seed(seed, _EVALUATION_STREAM, i))
        for place, i in enumerate(asked)
    ]
    completions = policy.complete(
        requests,
        Sampling(temperature, max_new_tokens),
        at_once=_PROBLEMS_AT_ONCE,
        description=description,
        show_progress=accelerator.is_main_process,
    )
    records = [
        graded(
            generated,
            problem_set.problems[i],
            grader,
            task=problem_set.name,
            number=i,
            temperature=temperature or 0.0,
        )
        for generated in completions
        for place, i in [cast(tuple[int, int], generated.key)]
        if place < len(own)
    ]
    if accelerator.num_processes > 1:
        records = gather_object(records)
    return sorted(records, key=lambda record: record.problem)
