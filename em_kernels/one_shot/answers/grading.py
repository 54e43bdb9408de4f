"""The verdict on a text: whether the answer that it ends with is an accepted one."""

from .comparison import Tolerance, compare
from .final import final_answer


def grade_answer(
    text: str, answers: list[str], unit: str | None, tolerance: float, relative_tolerance: float
) -> tuple[bool | None, str | None]:
    """Whether the final answer of a text is one of the accepted ones, and that final answer.

    Returns:
        True, False, or None where no answer could be read; the answer as it is written, None where there is none.
    """
    answer = final_answer(text)
    if answer is None:
        return None, None
    limits = Tolerance(tolerance, relative_tolerance)
    verdicts = [compare(accepted, answer, unit, limits) for accepted in answers]
    if True in verdicts:
        return True, answer
    return (None if None in verdicts else False), answer
