from em_kernels.one_shot.data.problems import Problem
from em_kernels.one_shot.evaluation.gold import gold_notes
from em_kernels.one_shot.evaluation.tasks import Task


def test_problems_whose_answers_cannot_be_read_are_counted_and_named() -> None:
    readable = Problem("2 + 2?", ("4",))
    cut_off = Problem("Why?", ("\\frac{1}{2",))
    either = Problem("Which?", ("\\frac{1}{2", "7"))
    tasks = [Task("sums", (readable,)), Task("mixed", (readable, cut_off, either, cut_off))]
    assert gold_notes(tasks) == [
        "mixed: the answers of 2 of 4 problems cannot be read, so no completion of theirs is right: 1, 3 (from 0)"
    ]
