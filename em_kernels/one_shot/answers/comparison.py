"""Whether two answers are the same: symmetric in the two, whatever their order, brackets, units and percent signs."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from math_verify import verify
from sympy import Basic, Eq, I, MatrixBase, Symbol

from .reading import Leaf, Reading, Row, Several, read

# A decimal of at least this many digits stands for the numbers that round to it, and one of at least as many digits as
# the second number was itself rounded.
_ROUNDED_DIGITS, _COMPUTED_DIGITS = 4, 6
_DECIMAL = re.compile(r"[+-]?\s*(\d*\.\d+)(?:\s*\\(?:times|cdot)\s*10\s*\^\s*\{?\s*([+-]?\d+)\s*\}?)?")
_INTEGER = re.compile(r"[+-]?\s*\d+")


@dataclass(frozen=True)
class Tolerance:
    """The largest accepted difference of two numbers: `absolute`, or `relative` times the larger of them."""

    absolute: float = 0.0
    relative: float = 0.0


def compare(accepted: str, answer: str, unit: str | None = None, tolerance: Tolerance | None = None) -> bool | None:
    """Whether two answers are the same; None where one of them cannot be read.

    Args:
        accepted: the accepted answer, plain or in LaTeX.
        answer: the answer to compare with it.
        unit: the unit of the numbers of the accepted answer that name none.
        tolerance: the accepted difference of numbers.
    """
    pairs = list(product(read(accepted, unit), read(answer)))
    if any(_same(a, b, tolerance or Tolerance()) for a, b in pairs):
        return True
    readable = all(leaf.readable for reading in pairs[0] for leaf in _leaves(reading))
    return False if readable else None


def _same(a: Reading, b: Reading, tolerance: Tolerance) -> bool:
    if isinstance(a, Leaf) and isinstance(b, Leaf):
        return _same_leaf(a, b, tolerance)
    if isinstance(a, Row) and isinstance(b, Row):
        brackets = (a.opening, a.closing) == (b.opening, b.closing)
        return (
            brackets and len(a.items) == len(b.items) and all(map(_same, a.items, b.items, [tolerance] * len(a.items)))
        )
    if isinstance(a, Several) and isinstance(b, Several):
        return _same_items(a.items, b.items, tolerance)
    # A set of one is its element.
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Several) and len(_different(one.items)) == 1:
            return _same(one.items[0], other, tolerance)
    # A pair that is written without its brackets.
    for one, other in ((a, b), (b, a)):
        if isinstance(one, Row) and isinstance(other, Several) and one.opening + one.closing == "()":
            same_length = len(one.items) == len(other.items)
            return same_length and all(map(_same, one.items, other.items, [tolerance] * len(one.items)))
    return False


def _same_items(a: Sequence[Reading], b: Sequence[Reading], tolerance: Tolerance) -> bool:
    names = [{item.name for item in items if isinstance(item, Leaf) and item.name} for items in (a, b)]
    by_name = names[0] == names[1] and len(names[0]) > 1
    if not by_name:
        a, b = _different(a), _different(b)
    left = list(b)
    for item in a:
        for other in left:
            named = by_name and isinstance(item, Leaf) and isinstance(other, Leaf)
            if named and item.name != other.name:  # type: ignore[union-attr]
                continue
            if _same(item, other, tolerance):
                left.remove(other)
                break
        else:
            return False
    return not left


def _different(items: Sequence[Reading]) -> list[Reading]:
    different: list[Reading] = []
    for item in items:
        if not any(_same(item, other, Tolerance()) for other in different):
            different.append(item)
    return different


def _same_leaf(a: Leaf, b: Leaf, tolerance: Tolerance) -> bool:
    if a.base and b.base and a.base != b.base:
        return False
    first, second = _number(a), _number(b)
    if first is not None and second is not None:
        return _same_quantity(a, b, first, second, tolerance)
    if a.words and a.words == b.words:
        return True
    if a.value is None or b.value is None or isinstance(a.value, Eq) != isinstance(b.value, Eq):
        return False
    return _same_expression(a.value, b.value)


def _same_quantity(a: Leaf, b: Leaf, first: Basic, second: Basic, tolerance: Tolerance) -> bool:
    # A percentage without its sign is written as often as a share of one.
    if a.percent != b.percent:
        scales = [(1.0, 1.0), (0.01, 1.0) if a.percent else (1.0, 0.01)]
    elif a.unit and b.unit:
        if a.unit.dimensions != b.unit.dimensions:
            return False
        scales = [(1.0, b.unit.size / a.unit.size)]
    else:
        scales = [(1.0, 1.0)]
        for leaf in (a, b):
            # Radians need no unit.
            if leaf.unit and leaf.unit.dimensions == {("angle", 1)} and leaf.unit.size != 1:
                scales.append((leaf.unit.size, 1.0) if leaf is a else (1.0, leaf.unit.size))
    return any(_same_number(a, b, first, second, scale, tolerance) for scale in scales)


def _same_number(
    a: Leaf, b: Leaf, first: Basic, second: Basic, scale: tuple[float, float], tolerance: Tolerance
) -> bool:
    if scale == (1.0, 1.0):
        integers = _INTEGER.fullmatch(a.text) and _INTEGER.fullmatch(b.text)
        if integers and not (tolerance.absolute or tolerance.relative):
            return bool(first == second)
        x, y = complex(first.evalf(20)), complex(second.evalf(20))
    else:
        x, y = complex(first.evalf(20)) * scale[0], complex(second.evalf(20)) * scale[1]
    difference, size = abs(x - y), max(abs(x), abs(y))
    accepted = max(tolerance.absolute * scale[0], tolerance.relative * size, 1e-9 * size)
    for leaf, other, factor in ((a, b, scale[0]), (b, a, scale[1])):
        digits, half = _precision(leaf.text)
        other_digits = _precision(other.text)[0]
        if digits >= _ROUNDED_DIGITS and (not other_digits or other_digits >= _COMPUTED_DIGITS):
            accepted = max(accepted, half * factor)
    return difference <= accepted * (1 + 1e-9)


def _precision(text: str) -> tuple[int, float]:
    """The number of digits of a decimal, and half a unit of its last place; no digits for any other number."""
    match = _DECIMAL.fullmatch(text)
    if match is None:
        return 0, 0.0
    digits = match[1].lstrip("0.") if float(match[1]) < 1 else match[1]
    return len(digits.replace(".", "")), 0.5 * 10.0 ** (int(match[2] or 0) - len(match[1].partition(".")[2]))


def _number(leaf: Leaf) -> Basic | None:
    """The value of a leaf, if it is a number."""
    value = leaf.value
    if not isinstance(value, Basic) or isinstance(value, Eq):
        return None
    try:
        value = value.subs(Symbol("i"), I).doit()
        approximation = value.evalf(20)
        complex(approximation)
    except (TypeError, ValueError, AttributeError, OverflowError, ArithmeticError):
        return None
    return value if approximation.is_finite else None


def _same_expression(a: Basic | MatrixBase, b: Basic | MatrixBase) -> bool:
    return any(verify(x, y, timeout_seconds=None, allow_set_relation_comp=True) for x, y in ((a, b), (b, a)))


def _leaves(reading: Reading) -> Iterator[Leaf]:
    if isinstance(reading, Leaf):
        yield reading
    else:
        for item in reading.items:
            yield from _leaves(item)
