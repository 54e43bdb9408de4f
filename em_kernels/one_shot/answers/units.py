"""Units of measurement, so that 5 km and 5,000 m are the same and 5 km and 5 m are not."""

import math
import re
from typing import NamedTuple

# For each dimension, names of its units with their sizes in the first one's.
_TABLE = {
    "length": "m meter metre=1 km kilometer kilometre=1e3 dm=0.1 cm centimeter centimetre=0.01 mm millimeter=1e-3 "
    "nm nanometer=1e-9 pm=1e-12 angstrom=1e-10 in inch inches=0.0254 ft foot feet=0.3048 yd yard=0.9144 "
    "mi mile=1609.344 parsec=3.0857e16",
    "mass": "kg kilogram=1 g gram=1e-3 mg milligram=1e-6 lb pound=0.45359237 oz ounce=0.028349523125 ton=1e3",
    "time": "s sec second=1 ms=1e-3 min minute=60 h hr hour=3600 day=86400 week=604800 yr year=31557600",
    "money": "dollar usd=1 cent=0.01",
    "angle": f"rad radian=1 degree deg={math.pi / 180!r} arcminute={math.pi / 10800!r} arcsecond={math.pi / 648000!r}",
    "volume": "l liter litre=1 ml milliliter=1e-3",
    "energy": "j joule=1 kj kilojoule=1e3 erg=1e-7 ev=1.602176634e-19 kcal=4184",
    "frequency": "hz hertz=1 khz=1e3 mhz=1e6",
    "voltage": "v volt=1 mv=1e-3",
}


class Unit(NamedTuple):
    """A unit: its size in the units of the table, and its dimensions with their exponents."""

    size: float
    dimensions: frozenset[tuple[str, int]]


def read_unit(text: str) -> Unit | None:
    """The unit that a text names, as in 'cm^2', 'square feet', 'km/h' or 'miles per hour'; None where it is unknown."""
    text = re.sub(r"\bper\b", "/", text.casefold().replace("°", " degree "))
    text = re.sub(r"\b(square|cubic)\s+(\w+)", lambda match: f"{match[2]}^{'2' if match[1] == 'square' else '3'}", text)
    text = re.sub(r"\b(\w+?)\s+squared\b", r"\1^2", text)
    size, exponents, sign = 1.0, dict[str, int](), 1
    tokens = re.findall(r"/|[a-z]+(?:\s*\^\s*\{?-?\d\}?)?|\S", text)
    for token in tokens:
        if token == "/":
            sign = -1
            continue
        if token in ("*", "·"):
            continue
        match = re.fullmatch(r"([a-z]+)(?:\s*\^\s*\{?(-?\d)\}?)?", token)
        known = _UNITS.get(match[1]) if match else None
        if match is None or known is None:
            return None
        exponent = sign * int(match[2] or 1)
        size *= known[1] ** exponent
        exponents[known[0]] = exponents.get(known[0], 0) + exponent
    return Unit(size, frozenset((name, power) for name, power in exponents.items() if power)) if exponents else None


def _units() -> dict[str, tuple[str, float]]:
    units = {}
    for dimension, names in _TABLE.items():
        for group in re.findall(r"[^=]+=\S+", names):
            spelled, _, size = group.partition("=")
            for name in spelled.split():
                units[name] = (dimension, float(size))
                if len(name) > 2 and not name.endswith("s"):
                    units.setdefault(f"{name}s", units[name])
    return units


_UNITS = _units()
