"""One spelling for the LaTeX and Unicode in which answers are written."""

import re

_UNICODE = {
    **{"−": "-", "–": "-", "×": r"\times ", "·": r"\cdot ", "÷": "/", "π": r"\pi ", "∞": r"\infty ", "∪": r"\cup "},
    **{"≤": r"\le ", "≥": r"\ge ", "≈": r"\approx ", "±": r"\pm ", "∈": r"\in ", "½": r"\frac{1}{2}"},
    **{"¼": r"\frac{1}{4}", "¾": r"\frac{3}{4}", "²": "^2", "³": "^3", "°": r"^\circ ", "\u00a0": " ", "\u202f": " "},
}
_REPLACED = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"√\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"√\s*(\d+|[a-z])", r"\\sqrt{\1}"),
        (r"\\[dt]frac", r"\\frac"),
        (r"\\(?:left|right|[Bb]igg?[lr]?)(?![a-zA-Z])\s*\.?", ""),
        (r"\\(?:displaystyle|limits|quad|qquad)(?![a-zA-Z])", " "),
        # Two backslashes end the row of a matrix, and the character after them is no command.
        (r"(?<!\\)\\!\s*", ""),
        (r"(?<!\\)\\[,;: ]", " "),
        (r"(?<!\\)~", " "),
        (r"\\leqslant|\\leq(?![a-zA-Z])", r"\\le "),
        (r"\\geqslant|\\geq(?![a-zA-Z])", r"\\ge "),
        (r"\\(?:mathrm|mbox|textrm|textbf|mathbf|operatorname|textit)\s*\{", r"\\text{"),
        (r"\\text\s*\{\s*\(?\s*(-?\d[\d.,/]*)\s*\)?\s*\}", r"\1"),
        (r"(?<![\d.])(\d{1,3}) (\d{3})(?: (\d{3}))?(?![\d/])", r"\1\2\3"),
        (r"\\boxed\s*\{(.*)\}", r"\1"),
        (r"(?<![\d./^_{])(\d+)\s+(\d+)\s*/\s*(\d+)", r"\1\\frac{\2}{\3}"),
        (r"\{,\}", ","),
        (r"(\d)\.(?=$|[^\d])", r"\1"),
        (r"(\d(?:\.\d+)?|\.\d+)\s*[eE]\s*([+-]?\d+)\b", r"\1 \\times 10^{\2}"),
        (r"\bnp\.(?=[a-z])", r"\\"),
        (r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![\\a-zA-Z])(pi|infty)(?![a-zA-Z])", r"\\\1 "),
        (r"(?<![\\a-zA-Z])(?:oo|inf|infinity)(?![a-zA-Z])", r"\\infty "),
        (r"\\prime\s*\\prime", r"\\text{arcseconds}"),
        (r"\^?\s*\{\s*(?:\^\{\\circ\}|\^?\\circ)\s*\}|\^\s*\\circ", r"\\text{ degrees }"),
    )
)


def unify(text: str) -> str:
    """The answer in one spelling: no mathematical environment, no spacing commands, no full stop at the end."""
    for character, replacement in _UNICODE.items():
        text = text.replace(character, replacement)
    # A dollar sign before a numeral, and no second one, is money.
    text = re.sub(r"\\\$", "＄", text)
    if text.count("$") == 1:
        text = text.replace("$", "＄")
    text = re.sub(r"\$|\\[()]|(?<!\\)\\[\[\]]|\*\*|`", " ", text)
    for pattern, replacement in _REPLACED:
        text = pattern.sub(replacement, text)
    return text.strip().rstrip(".;,!?").strip()


def split(text: str, separators: str) -> list[str]:
    """The parts of the text between matches of the pattern `separators` that stand in no brackets."""
    pattern = re.compile(separators)
    parts, depth, start, i = [], 0, 0, 0
    while i < len(text):
        if text[i] in "([{":
            depth += 1
        elif text[i] in ")]}":
            depth -= 1
        elif depth == 0 and (match := pattern.match(text, i)) and match.end() > i:
            parts.append(text[start:i])
            start = i = match.end()
            continue
        i += 1
    return [part.strip() for part in [*parts, text[start:]]]


def enclosed(text: str) -> tuple[str, str, str] | None:
    """The bracket that a text starts with, what is in it, and the bracket that ends both it and the text, or None.

    Round and square brackets may close each other, as those of intervals do.
    """
    opening = text[:2] if text.startswith("\\{") else text[:1]
    if opening not in ("(", "[", "{", "\\{"):
        return None
    depth = 0
    for i, character in enumerate(text):
        if character in "([{":
            depth += 1
        elif character in ")]}":
            depth -= 1
            if depth == 0:
                closing = "\\}" if opening == "\\{" else character
                if i == len(text) - 1 and text.endswith(closing) and (opening in ("{", "\\{")) == (character == "}"):
                    return opening, text[len(opening) : -len(closing)].strip(), closing
                return None
    return None
