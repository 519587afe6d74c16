"""Units of measurement at the end of an answer, and whether two of them differ."""

from __future__ import annotations

import re
from collections import Counter

Unit = tuple[tuple[str, int], ...]
"""Known names with their powers, sorted; `` is the name of an unknown unit whose power is said."""

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
    "euro": "euro euros eur",
    "yuan": "yuan rmb yen",
    "rupee": "rupee rupees",
    "celsius": "celsius centigrade",
    "fahrenheit": "fahrenheit",
}
_CANONICAL = {word: unit for unit, words in _UNITS.items() for word in words.split()}
_PREFIXES = {"k": "kilo", "M": "mega", "G": "giga", "m": "milli", "micro": "micro", "n": "nano", "p": "pico"}
_SCIENTIFIC = {
    # symbol, which tells capitals apart: its words; what it is made of
    "J": ("joule joules", "kg 1 m 2 second -2"),
    "W": ("watt watts", "kg 1 m 2 second -3"),
    "N": ("newton newtons", "kg 1 m 1 second -2"),
    "Pa": ("pascal pascals", "kg 1 m -1 second -2"),
    "Hz": ("hertz", "second -1"),
    "V": ("volt volts", "kg 1 m 2 second -3 ampere -1"),
    "A": ("amp amps ampere amperes", "ampere 1"),
    "T": ("tesla teslas", "kg 1 second -2 ampere -1"),
    "K": ("kelvin kelvins", "kelvin 1"),
    "mol": ("mole moles", "mole 1"),
    "eV": ("electronvolt electronvolts", "electronvolt 1"),
    "erg": ("erg ergs", "erg 1"),
    "dyn": ("dyne dynes", "dyne 1"),
    "pc": ("parsec parsecs", "parsec 1"),
    "cal": ("calorie calories", "calorie 1"),
    "": ("ohm ohms", "kg 1 m 2 second -3 ampere -2"),
}
_SMALL = {"m": "meter", "g": "gram", "s": "second", "l": "liter", "L": "liter"}


def _scientific() -> tuple[dict[str, Unit], dict[str, Unit]]:
    """Units by their symbols and by their words, with and without prefixes."""
    symbols: dict[str, Unit] = {}
    words: dict[str, Unit] = {}
    for symbol, (names, parts) in _SCIENTIFIC.items():
        found = iter(parts.split())
        unit = tuple((name, int(power)) for name, power in zip(found, found, strict=True))
        for short, long in {"": "", **_PREFIXES}.items():
            scaled = ((long, 1), *unit) if long else unit
            if symbol:
                symbols[short + symbol] = scaled
            words |= {long + name: scaled for name in names.split()}
    for symbol, word in _SMALL.items():
        for short in ("m", "micro", "n"):
            prefixed = short + symbol
            if prefixed.lower() not in _CANONICAL:
                symbols[prefixed] = ((_PREFIXES[short], 1), (word, 1))
            words |= {_PREFIXES[short] + word + end: ((_PREFIXES[short], 1), (word, 1)) for end in ("", "s")}
    return symbols, {word: unit for word, unit in words.items() if word not in _CANONICAL}


_SPEEDS = {"mph": "miles per hour", "kph": "km per hour", "kmh": "km per hour", "mpg": "miles per gallon"}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
_KNOWN = {*_CANONICAL, *_SPEEDS, *_POWERS, *_POWERS_AFTER, "per"}
_FUNCTIONS = frozenset(
    ("sin", "cos", "tan", "cot", "sec", "csc", "log", "ln", "exp", "sqrt", "mod", "gcd", "lcm")
)

_POWER = r"(?:\^\s*+(?:\{\s*+-?\d\s*+\}|-?\d))"
_TEXT = r"\\text\{[^{}]*\}\s*+" + _POWER + r"?+\s*+(?:(?:/|\\cdot(?![A-Za-z]))\s*+)?+"
_FRACTION = re.compile(r"\\frac\s*\{((?:" + _TEXT + r")++)\}\s*\{((?:" + _TEXT + r")++)\}")
_MARKED = re.compile(r"(?:" + _TEXT + r")++$")
_PLAIN = re.compile(r"(?<=[\d})\s])\s*+((?:[A-Za-z]++\.?+\s*+" + _POWER + r"?+\s*+(?:/\s*+)?+){1,5}+)$")
_TOKEN = re.compile(r"[A-Za-z]+|/|\\cdot|\^\s*\{?\s*(-?\d)")

NO_UNIT: Unit = ()

_SYMBOLS, _LONG = _scientific()
_DISTINCT = {symbol for symbol in _SYMBOLS if re.search(r"(?:Hz|Pa|eV|mol)$", symbol)} | {"kJ", "kW"}
"""Symbols that are no product of variables, as `mV` could be."""
_SHORT = {*_SYMBOLS, "m", "cm", "mm", "km", "s", "kg", "g", "mg", "h", "rad"}
"""Symbols that are multiplied where they stand beside each other: `kg m`, `J/(mol K)`."""
_SCALES = {"C": "celsius", "F": "fahrenheit"}


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
    found: list[tuple[Unit, int]] = []
    sign, ahead, wanted, beside = 1, 1, True, False
    for token in _TOKEN.finditer(words):
        word = token.group()
        unit = _named(word)
        if word.lower() in ("/", "per", "\\cdot"):
            sign, ahead, wanted = (sign if word == "\\cdot" else -1), 1, True
        elif word.lower() in _POWERS:
            ahead = _POWERS[word.lower()]
        elif word[0] == "^" or word.lower() in _POWERS_AFTER:
            power = _POWERS_AFTER.get(word.lower()) or int(token.group(1))
            if found and not wanted:
                found[-1] = (found[-1][0], sign * power)
            elif wanted:
                ahead = power
        elif found and found[-1][0] == (("degree", 1),) and (scale := _scale(word)):
            found[-1] = (((scale, 1),), found[-1][1])
        elif unit and (wanted or (beside and word in _SHORT)):
            found.append((unit, sign * ahead))
            ahead, wanted, beside = 1, False, word in _SHORT
        elif not wanted:
            beside = False
    if not found and ahead != 1:
        return (("", ahead),)
    return _product(found)


def _named(word: str) -> Unit:
    if word in _SYMBOLS:
        return _SYMBOLS[word]
    name = _CANONICAL.get(word.lower())
    return ((name, 1),) if name else _LONG.get(word.lower(), NO_UNIT)


def _scale(word: str) -> str | None:
    """The scale of temperature that follows `degrees`."""
    return _SCALES.get(word) or (word.lower() if word.lower() in _SCALES.values() else None)


def _product(units: list[tuple[Unit, int]]) -> Unit:
    powers: Counter[str] = Counter()
    for unit, outer in units:
        for name, power in unit:
            powers[name] += power * outer
    return tuple(sorted((name, power) for name, power in powers.items() if power))


def plain_units(words: str) -> str:
    """Words with known units in one spelling, where numbers stand before them: `5 ft 3 in`."""
    tokens = words.split()
    after_number = [False, *(token.isdigit() for token in tokens)]
    pairs = zip(tokens, after_number, strict=False)
    return " ".join(_CANONICAL.get(token, token) if after else token for token, after in pairs)


def units_clash(first: Unit, second: Unit) -> bool:
    """Whether two units are both said and differ; of an unknown unit only the power counts."""
    if not first or not second:
        return False
    names = {name for name, _ in first} | {name for name, _ in second}
    if len(first) == len(second) == 1 and "degree" in names and names & {"celsius", "fahrenheit"}:
        return False
    if "" in names:
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
    if space and any(word in _DISTINCT for word in found):
        return all(word in _DISTINCT or word.lower() in _KNOWN for word in found)
    plain = re.fullmatch(r"[-+\d\s.,/]+|[-+]?\s*\d*\s*\\frac\s*\{?\d+\}?\s*\{?\d+\}?", before.strip())
    return plain is not None and "/" not in words and sum(map(len, found)) >= 4
