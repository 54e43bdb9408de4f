"""The answer that a text ends with."""

import re

from .boxes import closed_boxes
from .words import with_numerals

_ANSWER = re.compile(
    r"\banswers?\b(?:[^.\n:=]|\.(?=\d)){0,60}?(?:\s+(?:is|are|be)\b|:|\s*=)[\s:*]*(?:approximately |about |equal to )?",
    re.IGNORECASE,
)
# What may stand between two boxes of one answer.
_BETWEEN = re.compile(r"(?:[\s,;.$*]|\\[()\[\]]|\band\b|\bor\b)*")
_MATH = re.compile(r"\$\$.+?\$\$|\\\[.+?\\\]|\\\(.+?\\\)|(?<!\\)\$(?=\S)[^$\n]+?(?<![\\\s])\$(?!\d)", re.DOTALL)
_NO_UNIT = r"(?!(?:a|an|and|are|as|at|because|by|each|for|from|in|into|is|of|on|or|per|since|so|the|to|with)\b)"
_UNIT = (
    r"(?:[ -]?(?:\\?%|percent\b|°[CF]?|\\text\s*\{[^{}]*\}(?:\^\{?\d\}?)?"
    rf"|(?:(?:square|cubic) )?{_NO_UNIT}[a-zA-Z]+(?:\^\d|/[a-zA-Z]+|[²³])?))?"
)
_POWER_OF_TEN = r"(?:[eE][-+]?\d+|\s*(?:×|x|\*)\s*10\s*\^\s*\{?[-−]?\d+\}?)?"
_NUMBER = re.compile(
    r"(?<![\w.])[-−]?(?:\\?[$£€]\s?)?[-−]?(?:(?:\d{1,3}(?: \d{3})+(?!\d)|\d[\d,]*\d|\d)(?:\.\d+)?|\.\d+)"
    rf"{_POWER_OF_TEN}(?:\s*/\s*\d+|\s+\d+/\d+)?{_UNIT}"
)
# The numbers before the last one of a list.
_LIST = re.compile(r"(?<![\w.])(?:[-−]?\d+(?:\.\d+)?,\s+)*[-−]?\d+(?:\.\d+)?,?\s+and\s+$")
_PRONOUN = re.compile(r"\b(?:any|each|every|no|some|that|the|this|which) ?one\b", re.IGNORECASE)
_BREAK = re.compile(r"\n|[.!?](?=\s|\*|$)|,?\s(?:because|since|which|where|so that|when|if)\b")


def final_answer(text: str) -> str | None:
    r"""The answer that a text ends with, as it is written; None where there is none.

    It is what is in the last \boxed{}, else what follows the last `####`, else what follows the last "the answer is",
    else the last number or expression.
    """
    if boxed := boxed_answer(text):
        return boxed
    if "####" in text and (rest := text.rpartition("####")[2].strip()):
        return rest.partition("\n")[0].strip()
    announced = list(_ANSWER.finditer(text))
    if announced and (answer := _announced(text[announced[-1].end() :])):
        return answer
    return _last(text)


def boxed_answer(text: str) -> str | None:
    r"""What is in the last closed \boxed{}, joined with the boxes that only "and" and commas keep apart from it."""
    boxes = closed_boxes(text)
    answers: list[str] = []
    for i in reversed(range(len(boxes))):
        _, end, content = boxes[i]
        if answers and not _BETWEEN.fullmatch(text, end, boxes[i + 1].start):
            break
        answers.insert(0, content)
        following = text[end:]
        if len(answers) == 1:
            answers[0] += _unit_after(following)
    # A box that is repeated is one answer.
    return ", ".join(dict.fromkeys(answers)) if any(answers) else None


def _unit_after(following: str) -> str:
    match = re.match(r"\s*(?:\\?%|\^\s*\{?\s*\\circ\s*\}?|\s*\\(?:text|mathrm)\s*\{[^{}]*\}(?:\^\{?\d\}?)?)", following)
    return match[0] if match else ""


def _announced(rest: str) -> str | None:
    """The answer at the start of what follows "the answer is"."""
    rest = rest.lstrip(" \t\n*:_")
    if match := _MATH.match(rest):
        return _with_following(rest, match)
    end = _BREAK.search(rest)
    sentence = rest[: end.start()] if end else rest
    sentence = sentence.strip().strip("*_`").strip()
    if not sentence:
        return None
    # Few words are an answer by themselves, and more are a sentence that holds one.
    if len(re.findall(r"(?<!\\)\b[a-zA-Z]{2,}", sentence)) <= 3 or sentence.startswith(("(", "[", "{", "\\")):
        return sentence
    return _first(sentence)


def _with_following(text: str, match: re.Match[str]) -> str:
    """A formula, the formulas that "and" and commas join to it, and a unit after it."""
    end = match.end()
    while (between := re.compile(r"\s*(?:,|and|or|,\s*and|,\s*or)\s*").match(text, end)) and (
        following := _MATH.match(text, between.end())
    ):
        end = following.end()
    unit = re.compile(r"\s*(?:\\?%|percent\b|°|[a-zA-Z]+(?:\^\d|/[a-zA-Z]+)?)").match(text, end)
    return text[match.start() : unit.end() if unit and not re.search(r"\b(?:and|or|is|as|so)$", unit[0]) else end]


def _first(sentence: str) -> str | None:
    numerals = with_numerals(sentence)
    formula, number = _MATH.search(sentence), _NUMBER.search(sentence)
    if formula and not (number and number.start() < formula.start()):
        return _with_following(sentence, formula)
    number = number or _NUMBER.search(numerals)
    return number[0].strip() if number else None


def _last(text: str) -> str | None:
    formulas, numbers = list(_MATH.finditer(text)), list(_NUMBER.finditer(text))
    last = max([match.end() for match in (*formulas, *numbers)], default=0)
    # A number in words counts in the sentences after the last numeral.
    later = re.split(r"[.!?]\s+|\n", text[last:], maxsplit=1)[1:] if last else [text]
    spoken = [_NUMBER.search(with_numerals(_PRONOUN.sub("", rest))) for rest in later]
    if spoken and spoken[0]:
        return spoken[0][0].strip()
    if formulas and not (numbers and numbers[-1].start() >= formulas[-1].end()):
        return _with_following(text, formulas[-1])
    if not numbers:
        return None
    before = _LIST.search(text[: numbers[-1].start()])
    return (before[0] if before else "") + numbers[-1][0].strip()
