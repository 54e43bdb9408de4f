"""Which problems of a task have answers that the grader itself cannot read, so that no completion of them is right."""

from collections.abc import Sequence

from em_kernels.one_shot.evaluation.grading import Grader, Verdict
from em_kernels.one_shot.evaluation.tasks import Task


def gold_notes(tasks: Sequence[Task]) -> list[str]:
    """A line for each task with problems whose accepted answers, put in a box, are not graded as right."""
    notes = []
    with Grader() as grader:
        for task in tasks:
            numbers = [
                number
                for number, problem in enumerate(task.problems)
                if all(
                    grader.grade(f"\\boxed{{{answer}}}", problem).verdict is not Verdict.RIGHT
                    for answer in problem.answers
                )
            ]
            if numbers:
                notes.append(
                    f"{task.name}: the answers of {len(numbers)} of {len(task.problems)} problems cannot be read, so "
                    f"no completion of theirs is right: {', '.join(map(str, numbers))} (from 0)"
                )
    return notes
