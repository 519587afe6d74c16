"""Units of measurement at the end of an answer, and whether two of them differ."""

from __future__ import annotations

import re

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
    "kg": "kg kilogram kilograms",
    "gram": "g gm gram grams",
    "mg": "mg milligram milligrams",
    "pound": "lb lbs pound pounds",
    "ounce": "oz ounce ounces",
    "liter": "l liter liters litre litres",
    "ml": "ml milliliter milliliters",
    "gallon": "gallon gallons",
}
_CANONICAL = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_SPEEDS = {"mph": "miles per hour", "kph": "km per hour", "kmh": "km per hour", "mpg": "miles per gallon"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
_KNOWN = {*_CANONICAL, *_SPEEDS, *_POWERS, *_POWERS_AFTER, "per"}
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "mod", "gcd", "lcm")
)

_POWER = r"(?:\^\s*+(?:\{\s*+-?\d\s*+\}|-?\d))"
_TEXT = r"\\text\{[^{}]*\}\s*+" + _POWER + r"?+\s*+(?:(?:/|\\cdot(?![A-Za-z]))\s*+)?+"
_FRACTION = re.compile(r"\\frac\s*\{(" + _TEXT + r")\}\s*\{(" + _TEXT + r")\}")
_MARKED = re.compile(r"(?:" + _TEXT + r")++$")
_PLAIN = re.compile(r"(?<=[\d})\s])\s*+((?:[A-Za-z]++\.?+\s*+" + _POWER + r"?+\s*+(?:/\s*+)?+){1,5}+)$")
_TOKEN = re.compile(r"[a-z]+|/|\\cdot|\^\s*\{?\s*(-?\d)")

Unit = tuple[tuple[str, int], ...]
"""Known names with their powers, sorted; `` is the name of an unknown unit whose power is said."""

NO_UNIT: Unit = ()


def split_unit(text: str) -> tuple[str, Unit]:
    r"""The text before its unit, and the unit: `5 \text{ m/s}`, `5\frac{\text{m}}{\text{s}}`, `5 cm^2`."""
    text = _FRACTION.sub(r" \1/\2", text)
    marked = _MARKED.search(text)
    if marked and text[: marked.start()].strip():
        return text[: marked.start()].strip(), read_unit(re.sub(r"\\text|[{}]", " ", marked.group()))
    plain = _PLAIN.search(text)
    if plain and _is_unit(plain.group(1), text[: plain.start()], text[plain.start() : plain.start(1)]):
        return text[: plain.start()].strip(), read_unit(plain.group(1))
    return text, NO_UNIT


def read_unit(words: str) -> Unit:
    """The known units in some words: `sq. feet` is (("foot", 2),), `m/s` is (("m", 1), ("second", -1)).

    Words that are no unit say nothing. Of several units without a sign between them the first counts.
    """
    for short, long in _SPEEDS.items():
        words = re.sub(rf"\b{short}\b", long, words, flags=re.IGNORECASE)
    found: list[tuple[str, int]] = []
    sign, ahead, wanted = 1, 1, True
    for token in _TOKEN.finditer(words.lower()):
        word = token.group()
        if word in ("/", "per", "\\cdot"):
            sign, ahead, wanted = (sign if word == "\\cdot" else -1), 1, True
        elif word in _POWERS:
            ahead = _POWERS[word]
        elif word[0] == "^" or word in _POWERS_AFTER:
            power = _POWERS_AFTER.get(word) or int(token.group(1))
            if found and not wanted:
                found[-1] = (found[-1][0], sign * power)
            elif wanted:
                ahead = power
        elif wanted and word in _CANONICAL:
            found.append((_CANONICAL[word], sign * ahead))
            ahead, wanted = 1, False
    if not found and ahead != 1:
        found.append(("", ahead))
    return tuple(sorted(found))


def units_clash(first: Unit, second: Unit) -> bool:
    """Whether two units are both said and differ; of an unknown unit only the power counts."""
    if not first or not second:
        return False
    if any(name == "" for name, _ in (*first, *second)):
        return sorted(power for _, power in first) != sorted(power for _, power in second)
    return first != second


def is_time_of_day(unit: Unit) -> bool:
    """Whether the unit is a.m. or p.m."""
    return any(name in ("am", "pm") for name, _ in unit)


def _is_unit(words: str, before: str, space: str) -> bool:
    """Whether words without `\\text` are a unit: known ones of two letters or more, known ones
    with a stroke after a space (`5 m/s`), or any word of four letters after a plain number."""
    found = re.findall(r"[A-Za-z]+", words)
    if not re.search(r"\d", before) or any(word.lower() in _FUNCTIONS for word in found):
        return False
    if all(word.lower() in _KNOWN for word in found):
        return all(len(word) > 1 for word in found) or ("/" in words and bool(space or before[-1:] == " "))
    plain = re.fullmatch(r"[-+\d\s.,/]+|[-+]?\s*\d*\s*\\frac\s*\{?\d+\}?\s*\{?\d+\}?", before.strip())
    return plain is not None and "/" not in words and sum(map(len, found)) >= 4
