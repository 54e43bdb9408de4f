"""An answer as a value: a leaf (a number, an expression, an equation, or words), or leaves in brackets and lists."""

import re
from dataclasses import dataclass

from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
from math_verify import LatexExtractionConfig, parse
from sympy import Basic, MatrixBase

from .markup import enclosed, split, unify
from .units import Unit, read_unit
from .words import with_numerals


@dataclass(frozen=True)
class Leaf:
    """One expression.

    Attributes:
        text: the expression in one spelling.
        value: what math-verify reads from the text; None for words and for what it cannot read.
        name: what the expression is said to be equal to, as in `x = 5`, or an empty text.
        unit: the unit, where it is known.
        percent: whether the number is a percentage.
        base: the base of a number written with one, as in 52_8, or an empty text.
    """

    text: str
    value: Basic | MatrixBase | None = None
    name: str = ""
    unit: Unit | None = None
    percent: bool = False
    base: str = ""

    @property
    def readable(self) -> bool:
        return self.value is not None or self.is_words

    @property
    def is_words(self) -> bool:
        # More words are a sentence, which an answer can say in another way.
        return re.fullmatch(r"(?:[\w'-]+\s*){1,3}|\(\w\)", _plain(self.text)) is not None

    @property
    def words(self) -> str:
        return re.sub(r"^(?:the|an?(?= \w{3})) | ", "", _plain(self.text).casefold().strip("()"))


@dataclass(frozen=True)
class Row:
    """Readings in an order and in brackets: a point, a vector or an interval."""

    opening: str
    items: tuple["Reading", ...]
    closing: str


@dataclass(frozen=True)
class Several:
    """Readings in no order: a set, a union, or several answers."""

    items: tuple["Reading", ...]


Reading = Leaf | Row | Several

_SEPARATORS = (
    r",|;|\\cup(?![a-zA-Z])|\\text\s*\{\s*(?:,?\s*and|,?\s*or)\s*\}|\s(?:and|or)\s|\\(?:qquad|lor|vee)(?![a-zA-Z])"
)
_RELATIONS = r"\\(?:le|ge|lt|gt)(?![a-zA-Z])|<|>"
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_FUNCTIONS = (
    "sin cos tan cot sec csc arcsin arccos arctan sinh cosh tanh log ln exp sqrt det max min gcd lcm mod".split()
)
# A name: one letter or command with indices and arguments, a function of something, or words.
_NAME = re.compile(
    r"(?:\\angle\s*)?(?:\\?[a-zA-Z]+'?|\\text\s*\{[^{}]*\})(?:\s*_\s*(?:\w|\\\w+|\{[^{}]*\}))?(?:\s*\([\w\s,]+\)|\s*_\{\w+\}|\s+[A-Z])*"
)
_UNIT = re.compile(
    r"(?P<number>.*?[\d})!iπ]|.*\\pi)\s*(?P<unit>(?:(?:\{\s*)?\\text\s*\{[^{}]*\}(?:\s*\})?(?:\s*\^\s*\{?\s*-?\d\s*\}?)?"
    r"|[\s/*]|\\cdot|\\AA(?![a-zA-Z])|\\mu(?![a-zA-Z])|(?<![\\a-zA-Z])[a-zA-Z]{2,}(?:\s*\^\s*\{?-?\d\}?)?"
    r"|(?<=[/\s])[a-zA-Z](?:\s*\^\s*\{?-?\d\}?)?(?![a-zA-Z]))+)",
    re.DOTALL,
)
_PARSING = (
    LatexExtractionConfig(
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="none", equations=False
        )
    ),
)


def read(text: str, unit: str | None = None) -> list[Reading]:
    """The ways to read an answer, the likeliest first: `1,234` is a number or two, `2 m` a product or a length.

    Args:
        text: the answer, plain or in LaTeX.
        unit: the unit of numbers that name none.
    """
    unified = with_numerals(unify(text))
    joined = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), unified)
    # Between brackets, commas separate.
    texts = [unified] if joined == unified else [unified, joined] if "(" in unified else [joined, unified]
    readings = [_read(each, unit, letters) for each in texts for letters in (False, True)]
    return [reading for i, reading in enumerate(readings) if reading not in readings[:i]]


def _read(text: str, unit: str | None, letters: bool) -> Reading:
    text = _without_name_of_set(text.strip())
    parts = [part for part in split(text, _SEPARATORS) if part]
    if len(parts) > 1:
        return _several([_read(part, unit, letters) for part in parts])
    if brackets := enclosed(text):
        opening, inner, closing = brackets
        parts = [part for part in split(inner, ",|;") if part]
        if opening == "\\{" or (opening == "{" and len(parts) > 1):
            return _several([_read(part, unit, letters) for part in parts])
        if len(parts) > 1:
            return Row(opening, tuple(_read(part, unit, letters) for part in parts), closing)
        if opening + closing == "()" and len(inner) > 1:
            return _read(inner, unit, letters)
    if text.count(r"\pm") == 1:
        return _several([_read(text.replace(r"\pm", sign), unit, letters) for sign in "+-"])
    return _interval(text, unit, letters) or _leaf(text, unit, letters)


def _several(items: list[Reading]) -> Several:
    flat: list[Reading] = []
    for item in items:
        flat.extend(item.items if isinstance(item, Several) else [item])
    return Several(tuple(flat))


def _without_name_of_set(text: str) -> str:
    parts = split(text, r"\\in(?![a-zA-Z])")
    return parts[1] if len(parts) == 2 and _NAME.fullmatch(parts[0]) else text


def _interval(text: str, unit: str | None, letters: bool) -> Row | None:
    """The interval of an inequality in one variable, or None."""
    relations = [match[0] for match in re.finditer(_RELATIONS, text)]
    sides = [side.strip() for side in re.split(_RELATIONS, text)]
    less = [relation in ("<", r"\le", r"\lt") for relation in relations]
    if not relations or len(relations) > 2 or not (all(less) or not any(less)) or "" in sides:
        return None
    strict = [relation in ("<", ">", r"\lt", r"\gt") for relation in relations]
    if not less[0]:
        sides, strict = sides[::-1], strict[::-1]
    names = [re.fullmatch(r"\\?[a-zA-Z]+(?:_\w|_\{\w+\})?", side) is not None for side in sides]
    if len(sides) == 3 and names == [False, True, False]:
        low, high = sides[0], sides[2]
    elif len(sides) == 2 and names == [True, False]:
        low, high, strict = r"-\infty", sides[1], [True, *strict]
    elif len(sides) == 2 and names == [False, True]:
        low, high, strict = sides[0], r"\infty", [*strict, True]
    else:
        return None
    ends = (_leaf(low, unit, letters), _leaf(high, unit, letters))
    return Row("(" if strict[0] else "[", ends, ")" if strict[1] else "]")


def _leaf(text: str, unit: str | None, letters: bool) -> Reading:
    text, name = _without_name(text)
    if name and (split(text, _SEPARATORS)[1:] or enclosed(text)):
        return _read(text, unit, letters)
    money = text.lstrip("-").startswith("＄")
    text = text.replace("＄", "")
    number, known, written = _split_unit(with_numerals(text), letters)
    percent = bool(re.search(r"(?<!\\)%|\\%", text)) or written in ("percent", "percents", "percentage")
    if money and not written:
        known = read_unit("dollar")
    if not written and not money and unit and not percent:
        percent = unit.strip("$\\ ") == "%" or unit.casefold().startswith("percent")
        known = None if percent else _split_unit(unify(f"1 {unit}"), True)[1]
    number = re.sub(r"\\?%", "", number).strip()
    base = re.fullmatch(r"(\w+?)\s*_\s*\{?\s*(\d+)\s*\}?", number)
    if base and base[1].isalnum() and base[1][0].isdigit():
        return Leaf(base[1], _value(base[1]), name, None, False, base[2])
    value = _value(number)
    if isinstance(value, MatrixBase) and 1 in value.shape:
        return Row("(", tuple(Leaf(str(item), item) for item in value), ")")
    return Leaf(number, value, name, known, percent)


def _without_name(text: str) -> tuple[str, str]:
    """The side of an equation that is the answer, and its name; an equation that is an answer itself stays whole."""
    exact, *rounded = split(text, r"\\(?:approx|simeq|doteq)(?![a-zA-Z])")
    if rounded:
        text = exact if re.search(r"[\d\\]", exact) and not _NAME.fullmatch(exact) else rounded[-1]
    sides = split(text, "=")
    if len(sides) == 1 or "" in sides:
        return text, ""
    if _NAME.fullmatch(sides[0]) or all(re.search("[a-zA-Z]", side) is None for side in sides):
        return sides[-1], sides[0] if _NAME.fullmatch(sides[0]) else ""
    # "90 minutes / 450 minutes = 20%" is no equation.
    if re.search(r"(?<!\\)\b[a-z]{3,}", sides[0]) and re.search(r"\d", sides[-1]):
        return sides[-1], ""
    if len(sides) == 2 and _NAME.fullmatch(sides[1]) and not re.search("[a-zA-Z]", sides[0]):
        return sides[0], sides[1]
    return text, ""


def _split_unit(text: str, letters: bool) -> tuple[str, Unit | None, str]:
    """The number of a quantity, its unit where it is known, and its unit as it is written."""
    symbolic = re.fullmatch(r"(.*[a-zA-Z])\s*\\text\s*\{([^{}]*)\}", text)
    if symbolic and (known := read_unit(symbolic[2])):
        return symbolic[1], known, symbolic[2]
    match = _UNIT.fullmatch(text)
    if match is None:
        return text, None, ""
    written = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", match["unit"])
    written = re.sub(r"\\cdot|[{}](?!-?\d)", " ", written).replace(r"\AA", "angstrom").replace(r"\mu", "micro ").strip()
    known = read_unit(written)
    # A bare letter may be a unit, and a bare unknown one is not.
    bare = r"\text" not in match["unit"] and re.search("[a-zA-Z]{2}", written) is None
    if not written or written.startswith(("/", "*")) or (bare and not (letters and known)):
        return text, None, ""
    if any(word in _FUNCTIONS for word in re.findall("[a-z]+", written)):
        return text, None, ""
    return match["number"].strip(), known, written


def _value(text: str) -> Basic | MatrixBase | None:
    # Words would be read as products of their letters.
    prose = re.sub(
        r"\\(?:begin|end)\s*\{\w+\}|_\s*\{(?:[^{}]|\{[^{}]*\})*\}|\\[a-zA-Z]+",
        " ",
        text.replace(r"\text", "\\t \\text"),
    )
    # Capitals before small letters, as in RCs, are factors.
    found = re.findall(r"(?<![a-zA-Z])(?:[a-zA-Z][a-z]{2,}|[A-Z]{3,})(?![a-zA-Z])", prose)
    words = [word for word in found if word not in _FUNCTIONS]
    if not text or words or re.search(r"\\text\s*\{", re.sub(r"_\s*\{(?:[^{}]|\{[^{}]*\})*\}", "", text)):
        return None
    # An E with an index is a name, which the library takes for Euler's number.
    named = re.sub(r"(?<![a-zA-Z\\])E(?=\s*_)", r"\\Xi ", text)
    parsed = parse(f"${named}$", _PARSING, fallback_mode="no_fallback", parsing_timeout=None)
    value = parsed[0] if parsed else None
    if isinstance(value, MatrixBase):
        return value.as_immutable()
    return value if isinstance(value, Basic) else None


def _plain(text: str) -> str:
    return re.sub(r"\\text\s*\{([^{}]*)\}", r"\1", text).strip()
