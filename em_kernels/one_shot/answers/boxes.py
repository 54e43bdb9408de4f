r"""The \boxed{} of a text, in which solutions and completions mark their answers."""

import re
from typing import NamedTuple

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")


class Box(NamedTuple):
    r"""A \boxed{} or \fbox{}: text[start:end], and what stands between its braces."""

    start: int
    end: int
    content: str


def closed_boxes(text: str) -> list[Box]:
    """The boxes whose brace is closed, in order; a box in a box is part of its content."""
    closing = _closing_braces(text)
    boxes: list[Box] = []
    for match in _BOX.finditer(text):
        end = closing.get(match.end() - 1)
        if end is not None and not (boxes and match.start() < boxes[-1].end):
            boxes.append(Box(match.start(), end + 1, text[match.end() : end].strip()))
    return boxes


def _closing_braces(text: str) -> dict[int, int]:
    """The position of each opening brace that is closed, with that of its closing brace."""
    closing, opened = {}, []
    for match in re.finditer(r"(?<!\\)[{}]", text):
        if match[0] == "{":
            opened.append(match.start())
        elif opened:
            closing[opened.pop()] = match.start()
    return closing
