"""The problem sets that completions are measured on, by the names that tables and records give them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from em_kernels.one_shot.data.built_in import make_problems
from em_kernels.one_shot.data.fields import question_of
from em_kernels.one_shot.data.hub import PREFIX, read_hub_rows
from em_kernels.one_shot.data.problems import Problem, problems_of
from em_kernels.one_shot.data.rows import Row, read_rows
from em_kernels.one_shot.errors import UsageError

# The source, and the name, of the project's own problems.
BUILT_IN_TASK = "built-in"
_BUILT_IN_PROBLEMS = 200
_BUILT_IN_SEED = 0


@dataclass(frozen=True)
class Task:
    """A set of problems.

    Attributes:
        name: the name, which no other task of a measurement has.
        problems: the problems.
    """

    name: str
    problems: tuple[Problem, ...]


def read_tasks(
    sources: Sequence[str], *, limit: int | None, note: Callable[[str], None], with_answers: bool = True
) -> list[Task]:
    """Reads one task from each source.

    Args:
        sources: names of files, "hub:..." for a data set on the hub, or "built-in" for the project's own problems.
        limit: the number of problems that are taken from the start of each source; None takes all, or 200 of the
            built-in ones, of which there is no end.
        note: takes a line where a source has repeated problems.
        with_answers: whether a problem needs an answer; if not, answers are left out.

    Raises:
        UsageError: a source cannot be read or is empty, or a problem has no question or no answer that it needs.
    """
    tasks: list[Task] = []
    for source in sources:
        problems = _read(source, limit or _BUILT_IN_PROBLEMS, note, with_answers)
        names = [task.name for task in tasks]
        tasks.append(Task(distinct(_name(source), names), tuple(problems[:limit])))
    return tasks


def distinct(name: str, taken: Sequence[str]) -> str:
    """The name itself, or the first of NAME-2, NAME-3, ... that is not taken."""
    candidates = (name, *(f"{name}-{i}" for i in range(2, len(taken) + 2)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _read(source: str, count: int, note: Callable[[str], None], with_answers: bool) -> list[Problem]:
    if source == BUILT_IN_TASK:
        problems = make_problems(count, seed=_BUILT_IN_SEED)
        return problems if with_answers else [Problem(problem.question, ()) for problem in problems]
    rows = read_hub_rows(source) if source.startswith(PREFIX) else read_rows(Path(source))
    if with_answers:
        return problems_of(rows, source, note=note)
    return _questions(list(rows), source)


def _questions(rows: list[Row], source: str) -> list[Problem]:
    problems = [Problem(question_of(row), ()) for row in rows]
    if not problems:
        raise UsageError(f"problem file {source} is empty")
    return list(dict.fromkeys(problems))


def _name(source: str) -> str:
    if source.startswith(PREFIX):
        return source.removeprefix(PREFIX).partition(":")[0].rpartition("/")[2]
    return Path(source).stem if source != BUILT_IN_TASK else BUILT_IN_TASK
