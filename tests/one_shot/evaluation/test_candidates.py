from em_kernels.one_shot.evaluation.candidates import candidates
from em_kernels.one_shot.evaluation.records import Record


def _record(problem: int, sample: int, answer: str | None, verdict: str) -> Record:
    return Record("t", problem, sample, 0.5, f"question {problem}", (), "", answer, verdict, 1, False)


def test_success_is_being_right() -> None:
    records = [_record(1, 1, "3", "right"), _record(0, 0, None, "unfinished"), _record(1, 0, "4", "wrong")]
    found = candidates(records, same=None)
    assert [(one.problem, one.question, one.successes) for one in found] == [
        (0, "question 0", [False]),
        (1, "question 1", [False, True]),
    ]


def test_success_is_agreeing_with_the_majority() -> None:
    answers = ["1/2", None, "3", "0.5"]
    records = [_record(0, i, answer, "ungraded") for i, answer in enumerate(answers)]
    [found] = candidates(records, same=lambda answer, other: {answer, other} == {"1/2", "0.5"})
    assert found.successes == [True, False, False, True]
