"""Graded completions as lines of a file, so that any number of a table can be traced to the texts it was counted on."""

import dataclasses
import json
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass
from pathlib import Path

from em_kernels.one_shot.errors import UsageError
from em_kernels.one_shot.evaluation.grading import Verdict
from em_kernels.one_shot.files import failing_as_os_error


@dataclass(frozen=True)
class Record:
    """One completion of one problem, with its verdict.

    Attributes:
        task: the name of the problem set.
        problem: the number of the problem in the set, from 0.
        sample: the number of the completion among those of the problem at this temperature, from 0.
        temperature: the temperature of sampling; 0 took the most likely token.
        question: the text that the model was asked.
        answers: the accepted answers.
        completion: the model's text, without special tokens.
        answer: the answer that was found in the text, as it is written there; None where there is none.
        verdict: the value of a Verdict.
        tokens: the length of the completion, in tokens.
        truncated: whether the completion reached the longest length without an end.
        model: the name of the model, where several write to one file.
        logprob: the mean log-probability of the tokens at temperature 1, in nats; None where nobody measured it.
    """

    task: str
    problem: int
    sample: int
    temperature: float
    question: str
    answers: tuple[str, ...]
    completion: str
    answer: str | None
    verdict: str
    tokens: int
    truncated: bool
    model: str = ""
    logprob: float | None = None

    def to_line(self) -> str:
        return json.dumps(dataclasses.asdict(self), ensure_ascii=False)


def read_records(path: Path) -> list[Record]:
    """The records of a file; a last line that was cut off, because its writer was ended, is left out.

    Raises:
        UsageError: another line is no record.
    """
    # A writer that is killed leaves at most one line without its end.
    *lines, _ = path.read_bytes().split(b"\n")
    return [_record(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]


def scores(
    records: Iterable[Record], temperature: float, problem: Callable[[Record], Hashable] = lambda record: record.problem
) -> dict[Hashable, list[float]]:
    """For each problem 1 for each right completion at the temperature and 0 for each other.

    Args:
        records: the records.
        temperature: the temperature of those that count.
        problem: what tells problems apart; the number does in one set of problems.
    """
    found: dict[Hashable, list[float]] = {}
    for record in records:
        if record.temperature == temperature:
            found.setdefault(problem(record), []).append(float(record.verdict == Verdict.RIGHT.value))
    return found


def append_records(path: Path, records: Iterable[Record]) -> None:
    """Adds records to the end of a file, which has to end with a whole line, as `drop_cut_line` sees to."""
    with failing_as_os_error(path), path.open("a", encoding="utf-8") as file:
        file.writelines(f"{record.to_line()}\n" for record in records)


def drop_cut_line(path: Path) -> None:
    """Cuts off a last line that has no end, so that records can be appended."""
    if path.exists():
        with path.open("r+b") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _record(line: bytes, where: str) -> Record:
    try:
        values = json.loads(line)
        return Record(**{**values, "answers": tuple(values["answers"])})
    except (KeyError, TypeError, ValueError):
        raise UsageError(f"{where}: expected a graded completion as evaluate, select and train write it") from None
