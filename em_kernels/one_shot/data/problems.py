"""Problems with known answers, read from files."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from em_kernels.one_shot.data.fields import answers_of, number_of, question_of, unit_of
from em_kernels.one_shot.data.rows import Row, read_rows
from em_kernels.one_shot.errors import UsageError


@dataclass(frozen=True)
class Problem:
    """A question and what counts as its answer.

    Args:
        question: the text that a model is asked.
        answers: the accepted answers, plain or in LaTeX; any one of them is right.
        unit: the unit of the accepted answers that name none, or None.
        tolerance: the largest accepted difference from a number among the answers, in that number's unit.
        relative_tolerance: the largest accepted difference, as a share of the number.
    """

    question: str
    answers: tuple[str, ...]
    unit: str | None = None
    tolerance: float = 0.0
    relative_tolerance: float = 0.0


def read_problems(path: Path, *, note: Callable[[str], None]) -> list[Problem]:
    """The problems of a file in one of the forms that `rows` reads; a problem that occurs again is left out.

    Args:
        path: the file.
        note: takes a line that says how many repeated problems were left out.

    Raises:
        UsageError: the file cannot be read or has no rows, or a row has no question or no answer.
    """
    return problems_of(read_rows(path), str(path), note=note)


def problems_of(rows: Iterable[Row], source: str, *, note: Callable[[str], None]) -> list[Problem]:
    """The problems of rows, as `read_problems` reads them; `source` says in messages where the rows are from."""
    problems = [
        Problem(
            question_of(row),
            answers_of(row),
            unit_of(row),
            number_of(row, ("tolerance", "error")),
            number_of(row, ("relative_tolerance",)),
        )
        for row in rows
    ]
    if not problems:
        raise UsageError(f"problem file {source} is empty")
    different = list(dict.fromkeys(problems))
    if len(different) < len(problems):
        note(f"{source}: {len(problems)} rows, {len(different)} different; a repeated problem counts once")
    return different
