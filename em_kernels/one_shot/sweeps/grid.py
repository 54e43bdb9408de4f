"""The grid of a sweep: settings and their values as they are typed, their combinations, and the names of these."""

import csv
import dataclasses
import hashlib
import itertools
import math
import os
import re
import types
import typing
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from decimal import Decimal
from typing import Any

from em_kernels.one_shot.config import TrainConfig
from em_kernels.one_shot.errors import UsageError

Grid = Mapping[str, Sequence[Any]]

_SWITCHES = {"true": True, "false": False}
# Longer values are cut off in the name of a run.
_LONGEST_LABEL = 32


def read_grid(texts: Sequence[str]) -> Grid:
    """The settings and values of texts such as 'temperature=0.1,0.3' and 'seed=0:16'.

    Values are separated by commas, and one that contains a comma stands in double quotes, as in CSV. A number may be a
    range A:B or A:B:STEP, without B as in Python. A value of `prompts` is one prompt.

    Raises:
        UsageError: a setting is unknown or given twice, has no values or one twice, or a value is not of its type.
    """
    grid: dict[str, tuple[Any, ...]] = {}
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or name not in _HINTS:
            raise UsageError(f"--grid is {text!r}, expected SETTING=VALUES with a setting of {', '.join(_HINTS)}")
        if name in grid:
            raise UsageError(f"--grid {name} is given twice, expected all of its values in one list")
        grid[name] = tuple(_values(name, values))
    return grid


def combinations(grid: Grid) -> Iterator[dict[str, Any]]:
    """Every combination of the grid's values; the last setting changes fastest."""
    for values in itertools.product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def run_name(settings: Mapping[str, Any]) -> str:
    """The name of a run's folder, such as temperature=0.1,seed=3; different settings have different names."""
    return ",".join(f"{name}={label(value)}" for name, value in settings.items())


def label(value: Any) -> str:
    """A value as part of a file's name; a digest sets apart those that are cut off or have other characters."""
    text = _text(value)
    plain = re.sub(r"[^A-Za-z0-9._+-]+", "-", text)[:_LONGEST_LABEL]
    return plain if plain == text else f"{plain}-{hashlib.sha256(os.fsencode(text)).hexdigest()[:6]}"


def train_options(settings: Mapping[str, Any]) -> list[str]:
    """The options of `em-kernels train` that set the settings; a switch that is off, and None, are its defaults."""
    options = []
    for name, value in settings.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            options.append(option)
        elif isinstance(value, tuple):
            # An option that is given several times is named in the singular.
            options += [f"{option.removesuffix('s')}={text}" for text in value]
        elif value is not None and value is not False:
            options.append(f"{option}={_text(value)}")
    return options


def _values(name: str, text: str) -> list[Any]:
    try:
        [parts] = csv.reader([text], strict=True)
    except (csv.Error, ValueError) as error:
        raise UsageError(
            f"--grid {name}={text} cannot be read ({error}), expected values with commas between"
        ) from None
    if not parts:
        raise UsageError(f"--grid {name}= has no values, expected at least one")
    values = [value for part in parts for value in _read(name, part)]
    value, times = Counter(values).most_common(1)[0]
    if times > 1:
        raise UsageError(f"--grid {name} has the value {_text(value)} twice, expected each value once")
    return values


def _read(name: str, part: str) -> list[Any]:
    """The value, or the values of a range, that one part of the list stands for."""
    hint = _HINTS[name]
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if part == "none" and types.NoneType in kinds:
        return [None]
    kind = kinds[0]
    try:
        if not part:
            raise ValueError
        if kind in (int, float) and ":" in part:
            values = _range(kind, part)
        elif kind is bool:
            values = [_SWITCHES[part]]
        else:
            values = [(part,) if typing.get_origin(kind) is tuple else kind(part)]
    except (KeyError, ValueError, ArithmeticError):
        expected = {int: "an integer or a range", float: "a number or a range", bool: "true or false"}.get(kind, "text")
        raise UsageError(f"--grid {name} has the value {part!r}, expected {expected}") from None
    if not values:
        raise UsageError(f"--grid {name} has the range {part}, which is empty")
    return values


def _range(kind: type, part: str) -> list[Any]:
    """The numbers of A:B or A:B:STEP, half open; decimals are exact, so that 0.1:0.4:0.1 has three."""
    exact = int if kind is int else Decimal
    start, stop, *steps = [exact(number) for number in part.split(":")]
    [step] = steps or [exact(1)]
    return [kind(start + i * step) for i in range(math.ceil((stop - start) / step))]


def _text(value: Any) -> str:
    if isinstance(value, float):
        return repr(value).removesuffix(".0")
    if isinstance(value, tuple):
        return "\n".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


_HINTS = {field.name: typing.get_type_hints(TrainConfig)[field.name] for field in dataclasses.fields(TrainConfig)}
