"""One answer without structure: its value if it is a plain number, its unit, base and name."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from fractions import Fraction

from dash_exp.verifiers.math.units import NO_UNIT, Unit, split_unit

_MAX_DIGITS = 400

NAME = re.compile(
    r"\s*(?:"
    r"[A-Za-z](?:_\{?\w{1,4}\}?)?'{0,3}(?:\([a-z]\))?|[A-Z]{2,3}|[A-Za-z]\^\{?-1\}?\([a-z]\)|[A-Z]\^\{?-1\}?"
    r"|\\(?:theta|alpha|beta|gamma|phi|lambda|omega|mu|sigma|rho)(?![A-Za-z])"
    r"|\\text\{[^{}]*\}|\\angle\s*[A-Z]{1,3}|(?:area|volume|perimeter|total|answer|sum|[A-Za-z]{4,20})"
    r")\s*"
)
"""Left sides that only name a value: `x`, `a_1`, `f(x)`, `AB`, `area`."""

_WORDS = "zero one two three four five six seven eight nine ten eleven twelve"
_TEENS = "thirteen fourteen fifteen sixteen seventeen eighteen nineteen"
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_NUMBER_WORDS = {word: Fraction(value) for value, word in enumerate(f"{_WORDS} {_TEENS}".split())}
_NUMBER_WORDS |= {
    f"{tens}-{one}" if value else tens: Fraction(10 * ten + value)
    for ten, tens in enumerate(_TENS.split(), 2)
    for value, one in enumerate(_WORDS.split()[:10])
} | {"hundred": Fraction(100), "one hundred": Fraction(100), "thousand": Fraction(1000)}
_BASE_WORDS = {word: str(value) for value, word in enumerate(f"{_WORDS} {_TEENS}".split()) if 1 < value < 17}

_TIME_SUFFIX = re.compile(r"\s*\b([ap])\s?\.?\s?m\b\.?\s*$", re.IGNORECASE)
_PERCENT = re.compile(r"\s*\\?%\s*$|\s*(?:\\text\{\s*percent\s*\}|\bpercent)\s*$")
_BASE = re.compile(
    r"(?:\\text\{|\()?(-?(?:[0-9A-Z]+|\d[0-9a-z]+)(?:\.[0-9A-Z]+)?)[})]?"
    r"_\s*(?:\{?\s*(?:\\text\{)?(\d{1,2})\}?\}?)"
)
_BASE_WORD = re.compile(r"_\s*\{?\s*(?:\\text\{)?\s*(" + "|".join(_BASE_WORDS) + r")\s*\}{0,2}$")
_MODULUS = re.compile(
    r"\s*(?:\\pmod\s*\{?\s*(\w+)\s*\}?|\(?\s*(?:\\text\{\s*\(?)?(?<![A-Za-z\\])mod\s*\}?\s*\{?(\d+)\}?\s*\)?\}?)\s*$"
)
_PLAIN = re.compile(r"([-+]?)\s*(\d+(?:\.\d*)?)")
_FRAC = re.compile(r"([-+]?)\s*(\d+)?\s*\\frac\s*(?:\{\s*(-?\s*\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\overline\{(\d+)\}")
_COLON = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+")


@dataclass(frozen=True, slots=True)
class Leaf:
    """`text` is what is left of the answer without its unit. `value` is set for plain numbers;
    `decimals` counts digits after the point, None when there is none. `chain` holds earlier
    members of `x = 6/2 = 3` or of `2/3 \\approx 0.67`, whose last is `rounded`."""

    text: str
    value: Fraction | None = None
    decimals: int | None = None
    percent: bool = False
    unit: Unit = NO_UNIT
    base: int | None = None
    name: str = ""
    chain: tuple[Leaf, ...] = ()
    rounded: bool = False


def parse_leaf(text: str) -> Leaf:
    """Read one unstructured, normalised answer."""
    sides = [side for side in text.split("\\approx") if side.strip()]
    if len(sides) > 1:
        leaves = [parse_leaf(side) for side in sides[:4]]
        named = NAME.fullmatch(sides[0]) is not None
        kept = leaves[1:] if named else leaves
        kept = [kept[0], *(replace(leaf, rounded=True) for leaf in kept[1:])]
        return replace(kept[-1], chain=tuple(kept[:-1]))
    text = sides[0].strip() if sides else text.strip()
    base = _BASE.fullmatch(_BASE_WORD.sub(lambda word: "_" + _BASE_WORDS[word.group(1)], text))
    if base:
        return Leaf(base.group(1), base=int(base.group(2)))
    text, percent, unit = strip_unit(text)
    value, decimals = plain_value(text)
    return Leaf(text, value, decimals, percent, unit)


def strip_unit(text: str) -> tuple[str, bool, Unit]:
    """The text without percent sign and unit; whether there was a percent sign; the unit, known
    units in one spelling."""
    time = _TIME_SUFFIX.search(re.sub(r"\\text\{([^{}]*)\}\s*$", r" \1", text))
    if time and re.match(r"\s*\d", text):
        bare = re.sub(r"\\text\{([^{}]*)\}\s*$", r" \1", text)
        return _TIME_SUFFIX.sub("", bare).strip(), False, ((time.group(1).lower() + "m", 1),)
    percent = _PERCENT.search(text)
    if percent and percent.start() > 0:
        return text[: percent.start()].strip(), True, NO_UNIT
    modulus = _MODULUS.search(text)
    if modulus and modulus.start() > 0:
        return text[: modulus.start()].strip(), False, ((f"mod {modulus.group(1) or modulus.group(2)}", 1),)
    before, unit = split_unit(text)
    return before, False, unit


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
    word = _NUMBER_WORDS.get(re.sub(r"(?<=ty)\s+", "-", text.lower()))
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
