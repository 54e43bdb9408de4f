"""What pages say of a run by itself, for a script: a row is a line of JSON, and "what" names its kind."""

from collections.abc import Iterator
from typing import Any

from em_kernels.one_shot.analysis.accuracies import courses, difference
from em_kernels.one_shot.analysis.runs import Run


def run_rows(run: Run) -> Iterator[dict[str, Any]]:
    """What made a run, its accuracies by step, and their differences, problem by problem."""
    yield {"what": "run", "run": run.name, "steps": len(run.metrics), "finished": run.finished, **run.made}
    for course in courses(run):
        own = {"run": run.name, "decoding": course.decoding, "problems": course.problems}
        for step, accuracy in sorted(course.by_step.items()):
            figures = {"accuracy": accuracy.mean, "standard_error": accuracy.standard_error}
            chosen = {"best": step == course.best, "last": step == course.last}
            yield {"what": "accuracy", **own, "step": step, **figures, **chosen}
        for first, second in sorted({(0, course.last), (0, course.best), (course.best, course.last)}):
            change = difference(run, course.decoding, first, second) if first < second else None
            if change is not None:
                figures = {"change": change.mean, "standard_error": change.standard_error}
                yield {"what": "change of accuracy", **own, "from": first, "to": second, **figures}
