"""One answer without structure: its value if it is a plain number, its unit, base and name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

_MAX_DIGITS = 400

NAME = re.compile(
    r"\s*(?:"
    r"[A-Za-z](?:_\{?\w{1,4}\}?)?'?(?:\([a-z]\))?|[A-Z]{2,3}"
    r"|\\(?:theta|alpha|beta|gamma|phi|lambda|omega|mu|sigma|rho)(?![A-Za-z])"
    r"|\\text\{[^{}]*\}|\\angle\s*[A-Z]{1,3}|(?:area|volume|perimeter|total|answer|sum|[A-Za-z]{4,20})"
    r")\s*"
)
"""Left sides that only name a value: `x`, `a_1`, `f(x)`, `AB`, `area`."""

_UNITS = {
    "cent": "cent cents",
    "dollar": "dollar dollars usd bucks",
    "degree": "degree degrees deg",
    "radian": "radian radians rad",
    "mm": "mm millimeter millimeters",
    "cm": "cm centimeter centimeters centimetres",
    "m": "m meter meters metre metres",
    "km": "km kilometer kilometers kilometres",
    "inch": "in inch inches",
    "foot": "ft foot feet",
    "yard": "yard yards yd",
    "mile": "mile miles mi",
    "second": "s sec second seconds",
    "minute": "min mins minute minutes",
    "hour": "h hr hrs hour hours",
    "day": "day days",
    "week": "week weeks",
    "month": "month months",
    "year": "year years",
    "am": "am",
    "pm": "pm",
    "mph": "mph",
    "kg": "kg kilogram kilograms",
    "gram": "gm gram grams",
    "pound": "lb lbs pound pounds",
    "liter": "liter liters litre litres",
    "gallon": "gallon gallons",
    "square": "sq square",
    "cubic": "cubic cu",
}
_CANONICAL = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "mod", "gcd", "lcm")
)
_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_NUMBER_WORDS = {word: Fraction(value) for value, word in enumerate(_WORDS.split())}

_POWER = r"\s*(?:\^\s*\{?\s*([23])\s*\}?)?"
_TEXT_UNIT = re.compile(r"\\text\{([^{}]*)\}" + _POWER + r"\s*$")
_PLAIN_UNIT = re.compile(r"(?<=[\d})\s])\s*((?:[A-Za-z]+\.?\s*){1,4})" + _POWER + r"$")
_TIME_SUFFIX = re.compile(r"\s*\b([ap])\s?\.?\s?m\b\.?\s*$", re.IGNORECASE)
_PERCENT = re.compile(r"\s*\\?%\s*$|\s*(?:\\text\{\s*percent\s*\}|\bpercent)\s*$")
_BASE = re.compile(
    r"(?:\\text\{)?(-?(?:[0-9A-Z]+|\d[0-9a-z]+)(?:\.[0-9A-Z]+)?)\}?"
    r"_\s*(?:\{?\s*(?:\\text\{)?(\d{1,2})\}?\}?)"
)
_PLAIN = re.compile(r"([-+]?)\s*(\d+(?:\.\d*)?)")
_FRAC = re.compile(r"([-+]?)\s*(\d+)?\s*\\frac\s*(?:\{\s*(-?\s*\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\overline\{(\d+)\}")
_COLON = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+")


NO_UNIT = ("", 0)


@dataclass(frozen=True, slots=True)
class Leaf:
    """`text` is what is left of the answer without its unit. `value` is set for plain numbers;
    `decimals` counts digits after the point, None when there is none. `chain` holds earlier
    members of `x = 6/2 = 3` or of `2/3 \\approx 0.67`."""

    text: str
    value: Fraction | None = None
    decimals: int | None = None
    percent: bool = False
    unit: tuple[str, int] = NO_UNIT
    base: int | None = None
    name: str = ""
    chain: tuple[Leaf, ...] = ()


def parse_leaf(text: str) -> Leaf:
    """Read one unstructured, normalised answer."""
    sides = [side for side in text.split("\\approx") if side.strip()]
    if len(sides) > 1:
        leaves = [parse_leaf(side) for side in sides[:4]]
        named = NAME.fullmatch(sides[0]) is not None
        kept = leaves[1:] if named else leaves
        last = kept[-1]
        return replace(last, chain=tuple(kept[:-1]))
    text = sides[0].strip() if sides else text.strip()
    base = _BASE.fullmatch(text)
    if base:
        return Leaf(base.group(1), base=int(base.group(2)))
    text, percent, unit = strip_unit(text)
    value, decimals = plain_value(text)
    return Leaf(text, value, decimals, percent, unit)


def strip_unit(text: str) -> tuple[str, bool, tuple[str, int]]:
    """The text without percent sign and unit; whether there was a percent sign; the unit, known
    units in one spelling."""
    time = _TIME_SUFFIX.search(re.sub(r"\\text\{([^{}]*)\}\s*$", r" \1", text))
    if time and re.match(r"\s*\d", text):
        bare = re.sub(r"\\text\{([^{}]*)\}\s*$", r" \1", text)
        return _TIME_SUFFIX.sub("", bare).strip(), False, (time.group(1).lower() + "m", 0)
    percent = _PERCENT.search(text)
    if percent and percent.start() > 0:
        return text[: percent.start()].strip(), True, NO_UNIT
    marked = _TEXT_UNIT.search(text)
    if marked and text[: marked.start()].strip():
        return text[: marked.start()].strip(), False, canonical_unit(*marked.groups())
    plain = _PLAIN_UNIT.search(text)
    if plain and _is_unit(plain.group(1), text[: plain.start()]):
        return text[: plain.start()].strip(), False, canonical_unit(*plain.groups())
    return text, False, NO_UNIT


def canonical_unit(words: str, power: str | None = None) -> tuple[str, int]:
    """A unit as (known name or empty, power or 0 when none is said): `sq. feet` is ("foot", 2)."""
    found = [_CANONICAL[w] for w in re.findall(r"[a-z]+", words.lower()) if w in _CANONICAL]
    said = int(power) if power else 2 if "square" in found else 3 if "cubic" in found else 0
    return next((unit for unit in found if unit not in ("square", "cubic")), ""), said


def units_clash(first: tuple[str, int], second: tuple[str, int]) -> bool:
    """Whether two units are both known and differ, or both powers are said and differ."""
    return any(a and b and a != b for a, b in zip(first, second, strict=True))


def _is_unit(words: str, before: str) -> bool:
    found = re.findall(r"[A-Za-z]+", words)
    if not re.search(r"\d", before) or any(word.lower() in _FUNCTIONS for word in found):
        return False
    if all(word.lower() in _CANONICAL and len(word) > 1 for word in found):
        return True
    return plain_value(before.strip())[0] is not None and sum(map(len, found)) >= 4


def plain_value(text: str) -> tuple[Fraction | None, int | None]:
    """Exact value of a plain number, fraction, mixed number or repeating decimal, and how many
    digits follow its decimal point."""
    text = text.strip()
    if len(text) > _MAX_DIGITS:
        return None, None
    while len(text) > 1 and text[0] == "{" and text[-1] == "}" and "}" not in text[:-1]:
        text = text[1:-1].strip()
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    plain = _PLAIN.fullmatch(text)
    if plain:
        value = _decimal(plain.group(2))
        point = plain.group(2).find(".")
        decimals = None if point < 0 else len(plain.group(2)) - point - 1
        return (-value if plain.group(1) == "-" and value is not None else value), decimals
    word = _NUMBER_WORDS.get(text.lower())
    return (word if word is not None else _fraction(text)), None


def _fraction(text: str) -> Fraction | None:
    frac = _FRAC.fullmatch(text)
    if frac:
        sign, whole, top, top_digit, bottom, bottom_digit = frac.groups()
        return _mixed(sign, whole, top or top_digit, bottom or bottom_digit)
    slash = _SLASH.fullmatch(text)
    if slash:
        return _mixed(*slash.groups())
    repeating = _REPEATING.fullmatch(text)
    if repeating:
        sign, whole, fixed, cycle = repeating.groups()
        shift = 10 ** len(fixed)
        tail = Fraction(int(cycle), shift * (10 ** len(cycle) - 1))
        value = Fraction(int((whole or "0") + fixed), shift) + tail
        return -value if sign == "-" else value
    return None


def _mixed(sign: str, whole: str | None, top: str, bottom: str) -> Fraction | None:
    denominator = int(bottom)
    if denominator == 0:
        return None
    value = Fraction(int(whole or 0)) + Fraction(int(top.replace(" ", "")), denominator)
    return -value if sign == "-" else value


def _decimal(digits: str) -> Fraction | None:
    try:
        return Fraction(digits.rstrip("."))
    except ValueError:
        return None


def colon_parts(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of a ratio or a time such as `3:5` or `4:51:06`."""
    if not _COLON.fullmatch(text):
        return None
    return tuple(Fraction(part.strip()) for part in text.split(":"))
