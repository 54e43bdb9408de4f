"""Numbers in English words."""

import re
from fractions import Fraction

_SMALL = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_VALUES = {
    **{word: i for i, word in enumerate(_SMALL)},
    **{word: 10 * i for i, word in enumerate(_TENS, start=2)},
}
_SCALES = {"hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {
    **{"half": 2, "halves": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7},
    **{"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100},
}
_PARTS |= {f"{word}s": part for word, part in _PARTS.items() if not word.startswith("hal")}
_WORD = "|".join(sorted([*_VALUES, *_SCALES, *_PARTS, "minus", "negative", "point"], key=len, reverse=True))
# A comma may stand between the thousands and the hundreds of a number.
_AFTER_SCALE = r"(?:(?<=thousand)|(?<=million)|(?<=billion)),\s+"
# 'The third' is a place in an order.
_IS_NO_PLACE = rf"(?:(?<!the )|(?!(?:{'|'.join(_PARTS)})\b))"
_RUN = re.compile(
    rf"\b{_IS_NO_PLACE}(?:a\s+(?=(?:{'|'.join(_PARTS)})\b))?(?:{_WORD})(?:(?:[\s-]+|{_AFTER_SCALE}|\s+and\s+(?:a\s+)?)(?:{_WORD}))*\b",
    re.IGNORECASE,
)


def with_numerals(text: str) -> str:
    """The text with each number in words, fractions and decimals included, in numerals."""
    return _RUN.sub(lambda match: _numeral(match[0].casefold()) or _each(match[0]), text)


def _each(words: str) -> str:
    """Numbers between commas, where the words are not one number."""
    parts = words.split(", ")
    return words if len(parts) == 1 else ", ".join(_numeral(part.casefold().strip()) or part for part in parts)


def _numeral(words: str) -> str | None:
    # 'One thousand, two hundred' is a number, 'one thousand, two' a list.
    if any(not re.search("hundred|thousand|million|and", part) for part in words.split(", ")[1:]):
        return None
    sign, rest = "", words
    if match := re.match(r"(?:minus|negative)\s+", words):
        sign, rest = "-", words[match.end() :]
    if " point " in rest:
        whole, _, decimals = rest.partition(" point ")
        digits = [_VALUES.get(word, 10) for word in re.split(r"[\s-]+", decimals)]
        integer = _integer(_split(whole))
        if integer is None or max(digits) > 9:
            return None
        return f"{sign}{integer}.{''.join(map(str, digits))}"
    parts = _split(rest)
    value: Fraction | None
    if parts[-1] in _PARTS:
        value = _fraction(rest)
    else:
        integer = _integer(parts)
        value = None if integer is None else Fraction(integer)
    return None if value is None else f"{sign}{value}"


def _fraction(words: str) -> Fraction | None:
    """'Three quarters', 'a half' and 'two and a half' as fractions."""
    *before, part = _split(words)
    unit = Fraction(1, _PARTS[part])
    if match := re.fullmatch(r"(.+?)\s+and\s+(?:a\s+)?((?:\w+[\s-]+)?\w+)", words):
        whole, count = _integer(_split(match[1])), _split(match[2])[:-1]
        top = _integer(count) if count else 1
        return None if whole is None or top is None else whole + top * unit
    top = _integer(before) if before else 1
    return None if top is None else top * unit


def _integer(words: list[str]) -> int | None:
    total = group = 0
    last, scale = "", 10**12
    for word in words:
        if word in _VALUES:
            # 'Twenty one' is a number, 'one twenty' and 'two three' are not.
            if last in _VALUES and not (_VALUES[last] >= 20 and 0 < _VALUES[word] < 10):
                return None
            group += _VALUES[word]
        elif word == "hundred":
            if group >= 100:
                return None
            group = max(group, 1) * 100
        elif word in _SCALES and _SCALES[word] < scale:
            scale = _SCALES[word]
            total, group = total + max(group, 1) * scale, 0
        else:
            return None
        last = word
    return total + group if words else None


def _split(words: str) -> list[str]:
    return [word for word in re.split(r"[\s,-]+", words) if word not in ("", "and", "a")]
