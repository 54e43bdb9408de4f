"""The question and the accepted answers of a row, by the names that published problem sets give them."""

import math
from typing import Any

from em_kernels.one_shot.answers.boxes import closed_boxes
from em_kernels.one_shot.data.rows import Row
from em_kernels.one_shot.errors import UsageError

# The first of these fields that a row has is taken.
_QUESTION_FIELDS = ("prompt", "problem", "question", "Question", "input", "messages")
_ANSWER_FIELDS = ("final_answer", "answer", "answers", "target", "Answer", "ground_truth", "solution")


class NoAnswerError(UsageError):
    """A row has no answer."""


def question_of(row: Row) -> str:
    """The question of a row, after its `context` or `Body` where it has one.

    A list of chat messages is the text of its one user message.

    Raises:
        UsageError: no field holds a question, or a list of messages has not exactly one of the user.
    """
    for name in _QUESTION_FIELDS:
        value = row.fields.get(name)
        if isinstance(value, list):
            value = _user_message(value, name, row.where)
        if isinstance(value, str) and value.strip():
            return _after_context(row.fields, value.strip())
    raise UsageError(
        f"{row.where}: expected a text or a list of chat messages in one of {', '.join(_QUESTION_FIELDS)}; "
        f"the fields are {', '.join(map(str, row.fields)) or 'none'}"
    )


def answers_of(row: Row) -> tuple[str, ...]:
    r"""The accepted answers of a row.

    A list holds several accepted answers. A worked solution is reduced to what follows its `####`, or to what is in its
    last \boxed{}.

    Raises:
        NoAnswerError: no field holds an answer.
    """
    reward = row.fields.get("reward_model")
    fields = {**row.fields, **(reward if isinstance(reward, dict) else {})}
    for name in _ANSWER_FIELDS:
        value = fields.get(name)
        if name == "solution" and not (isinstance(value, str) and _marked(value)):
            continue
        answers = [_answer(item) for item in (value if isinstance(value, list) else [value])]
        if answers and "" not in answers:
            return tuple(dict.fromkeys(answers))
    raise NoAnswerError(
        f"{row.where}: expected an answer in one of {', '.join(_ANSWER_FIELDS)} (with #### or \\boxed{{}} in a "
        "solution), reward_model.ground_truth"
    )


def unit_of(row: Row) -> str | None:
    value = row.fields.get("unit")
    return value.strip() or None if isinstance(value, str) else None


def number_of(row: Row, names: tuple[str, ...]) -> float:
    """The first of the fields that holds something, as a number of at least 0; 0 where none does.

    Raises:
        UsageError: the field is no such number.
    """
    for name in names:
        value = row.fields.get(name)
        if value is None or value == "":
            continue
        try:
            number = float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number < math.inf:
            raise UsageError(f"{row.where}: {name} is {value!r}, expected a finite number of at least 0")
        return number
    return 0.0


def _user_message(messages: list[Any], name: str, where: str) -> str:
    turns = [message for message in messages if isinstance(message, dict) and message.get("role") == "user"]
    if len(turns) != 1 or not isinstance(turns[0].get("content"), str):
        raise UsageError(f"{where}: {name} holds {len(turns)} messages of the user, expected one, with a text")
    return turns[0]["content"]


def _after_context(fields: dict[str, Any], question: str) -> str:
    context, body = fields.get("context"), fields.get("Body")
    if isinstance(context, str) and context.strip():
        return f"{context.strip()}\n{question}"
    if isinstance(body, str) and body.strip():
        # The bodies of SVAMP lack their last full stop.
        return f"{body.strip().rstrip('.')}. {question}"
    return question


def _answer(value: Any) -> str:
    """The value as the text of an answer, empty where it is none."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    if isinstance(value, float):
        if not math.isfinite(value):
            return ""
        return str(int(value)) if value.is_integer() else repr(value)
    text = str(value)
    return _marked(text) or text.strip()


def _marked(solution: str) -> str | None:
    """The answer that a worked solution marks, or None."""
    if "####" in solution:
        return solution.rpartition("####")[2].strip()
    boxes = closed_boxes(solution)
    return boxes[-1].content if boxes else None
