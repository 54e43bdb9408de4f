"""Completions of problems, drawn by an engine, graded, and kept one by one, so that none is asked for twice."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import cast

from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.engines import Engine
from em_kernels.one_shot.evaluation.grading import Grader
from em_kernels.one_shot.evaluation.records import Record, append_records, read_records
from em_kernels.one_shot.evaluation.tasks import Task
from em_kernels.one_shot.policy.generation import Generated, Request
from em_kernels.one_shot.policy.sampling import Sampling, derive_seed


@dataclass(frozen=True)
class Plan:
    """Which completions are drawn.

    Args:
        tasks: the problem sets, under different names.
        temperatures: the temperatures; 0 takes the most likely token, and one completion a problem.
        samples: the completions of a problem at each other temperature.
        sampling: the other settings of sampling; its own temperature counts for nothing.
        seed: what the seeds of all completions come from. A completion's seed is the same for every model, so that
            models are compared on the same draws.
    """

    tasks: Sequence[Task]
    temperatures: Sequence[float]
    samples: int
    sampling: Sampling
    seed: int

    def requests(self, temperature: float) -> list[Request]:
        """The requests at a temperature, those of long prompts first; the key of each is (task, problem, sample)."""
        requests = [
            Request((task.name, i, sample), problem.question, self._seed(temperature, task.name, i, sample))
            for task in self.tasks
            for i, problem in enumerate(task.problems)
            for sample in range(self.samples if temperature else 1)
        ]
        # Prompts of similar length need little padding, and one that is too long fails at once.
        return sorted(requests, key=lambda request: -len(request.prompt))

    def _seed(self, temperature: float, task: str, problem: int, sample: int) -> int:
        name = int.from_bytes(hashlib.sha256(f"{temperature!r} {task}".encode()).digest()[:8], "little")
        return derive_seed(self.seed, name, problem, sample)


def measure(load: Callable[[], Engine], model: str, plan: Plan, path: Path) -> None:
    """Draws the completions of a plan that a file lacks, grades them, and appends each to the file when it has ended.

    Args:
        load: loads the engine; it is called if a completion is missing.
        model: the name of the model, for the records.
        plan: what is drawn.
        path: the file of records, which may be absent.

    Raises:
        UsageError: the engine cannot be loaded or fails; the message says how many completions are kept.
    """
    kept = read_records(path) if path.exists() else []
    done = {
        (record.temperature, (record.task, record.problem, record.sample)) for record in kept if record.model == model
    }
    missing = {
        temperature: [request for request in plan.requests(temperature) if (temperature, request.key) not in done]
        for temperature in plan.temperatures
    }
    if not any(missing.values()):
        return
    drawn = 0
    try:
        with Grader() as grader:
            for record in _records(load(), grader, model, plan, missing):
                append_records(path, [record])
                drawn += 1
    except UsageError as error:
        if not kept and not drawn:
            raise
        raise UsageError(f"{error}; {len(kept) + drawn} completions are kept, and --resume draws the others") from None


def graded(
    generated: Generated,
    problem: Problem,
    grader: Grader,
    *,
    task: str,
    number: int,
    temperature: float,
    sample: int = 0,
    model: str = "",
) -> Record:
    """Grades a completion of the problem with this number in the task, and returns its record."""
    grade = grader.grade(generated.text, problem, truncated=generated.truncated)
    return Record(
        task=task,
        problem=number,
        sample=sample,
        temperature=temperature,
        question=problem.question,
        answers=problem.answers,
        completion=generated.text,
        answer=grade.answer,
        verdict=grade.verdict.value,
        tokens=generated.tokens,
        truncated=generated.truncated,
        model=model,
        logprob=generated.logprob,
    )


def _records(
    engine: Engine, grader: Grader, model: str, plan: Plan, missing: dict[float, list[Request]]
) -> Iterator[Record]:
    problems = {(task.name, i): problem for task in plan.tasks for i, problem in enumerate(task.problems)}
    for temperature, requests in missing.items():
        if not requests:
            continue
        description = f"{model}, {f'temperature {temperature:g}' if temperature else 'greedy'}"
        sampling = replace(plan.sampling, temperature=temperature or None)
        for generated in engine(requests, sampling, description=description):
            task, i, sample = cast(tuple[str, int, int], generated.key)
            problem = problems[task, i]
            yield graded(
                generated, problem, grader, task=task, number=i, temperature=temperature, sample=sample, model=model
            )
