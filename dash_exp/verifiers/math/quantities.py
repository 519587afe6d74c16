"""Reads what stands beside a number: words that change it (`million`, `and a half`) and units."""

from __future__ import annotations

import re
from collections import Counter
from fractions import Fraction

Unit = tuple[tuple[str, int], ...]
"""Known names with their powers, sorted; `` is the name of an unknown unit whose power is said."""

NO_UNIT: Unit = ()
_MAX_DIGITS = 400

_UNITS_AND_TEENS = """
zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen
"""
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SMALL = {word: value for value, word in enumerate(_UNITS_AND_TEENS.split())}
_SMALL |= {word: 10 * ten for ten, word in enumerate(_TENS.split(), 2)}
BASES = {word: str(value) for word, value in _SMALL.items() if 1 < value < 17}
_SCALES = {
    "dozen": 12,
    "hundred": 100,
    "thousand": 10**3,
    "million": 10**6,
    "billion": 10**9,
    "trillion": 10**12,
}
_PARTS = {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7}
_PARTS |= {"eighth": 8, "ninth": 9, "tenth": 10, "twelfth": 12, "hundredth": 100, "thousandth": 1000}
_CHANGES = re.compile(
    rf"\s*(?:({'|'.join(_SCALES)}|k)s?|(squared|cubed)|plus ((?:[a-z]+[\s-])?[a-z]+)"
    rf"|((?:one[\s-])?(?:of a )?(?:{'|'.join(_PARTS)})s?)|((?:degrees? )?below zero))(?![a-z-])"
    r"(?: of an?(?= ))?"
)
"""Words that change the number in front of them."""
_SPOILERS = """
half twice double doubled triple tripled halved squared cubed below mod modulo plus minus over divided
multiplied than or and not except wrong incorrect factorial score raised power root
"""
_NEVER_UNITS = {*_SMALL, *_SCALES, *_PARTS, *_SPOILERS.split()}

_UNITS = """
cent cents | dollar dollars usd bucks | degree degrees deg | radian radians rad | mm millimeter millimeters
cm centimeter centimeters centimetres | m meter meters metre metres | km kilometer kilometers kilometres
inch in inches | foot ft feet | yard yards yd | mile miles mi | second s sec seconds | minute min mins minutes
hour h hr hrs hours | day days | week weeks | month months | year years | am | pm | kg kilogram kilograms
gram g gm grams | mg milligram milligrams | pound lb lbs pounds | ounce oz ounces
liter l L liters litre litres | ml mL milliliter milliliters | gallon gallons | ms millisecond milliseconds
euro euros eur | yuan rmb yen | rupee rupees | celsius centigrade | fahrenheit | K kelvin | mol mole moles
J joule joules | kJ kilojoule kilojoules | W watt watts | kW kilowatt kilowatts | MW megawatt megawatts
mW milliwatt milliwatts | N newton newtons | Pa pascal pascals | kPa kilopascal kilopascals | Hz hertz
kHz kilohertz | MHz megahertz | V volt volts | mV millivolt millivolts | A amp amps ampere amperes
eV electronvolt electronvolts | keV | micrometer micrometers | ohm ohms | cal calorie calories
"""
"""Units, each with its other spellings."""
_CANONICAL = {word: line.split()[0] for line in re.split(r"[|\n]", _UNITS.strip()) for word in line.split()}
_SPEEDS = {"mph": "miles per hour", "kph": "km per hour", "kmh": "km per hour", "mpg": "miles per gallon"}
_POWERS_AFTER = {"squared": 2, "cubed": 3}
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3, **_POWERS_AFTER}
_SCALES_OF_HEAT = {"c": "celsius", "celsius": "celsius", "f": "fahrenheit", "fahrenheit": "fahrenheit"}
_LOOSE = {*_SPEEDS, *_POWERS, "per", "Hz", "Pa", "eV", "kJ", "kW"}
_LOOSE |= {word for word in _CANONICAL if len(word) > 2 or (len(word) > 1 and word.islower())}
"""Words that are a unit without `\\text` too."""

_POWER = r"(?:\^\s*+(?:\{\s*+-?\d\s*+\}|-?\d))"
_TEXT = r"\\text\{[^{}]*\}\s*+" + _POWER + r"?+\s*+(?:(?:/|\\cdot(?![A-Za-z]))\s*+)?+"
_FRACTION = re.compile(r"\\frac\s*\{((?:" + _TEXT + r")++)\}\s*\{((?:" + _TEXT + r")++)\}")
_MARKED = re.compile(r"(?:" + _TEXT + r")++$")
_PLAIN = re.compile(
    r"(?<=[\d})\s])\s*+((?:[A-Za-z][A-Za-z-]*+\.?+\s*+" + _POWER + r"?+\s*+(?:/\s*+)?+){1,8}+)$"
)
_TERM = re.compile(
    r"(?:(/|per\b|\\cdot)\s*)?(?:\b(square|sq|cubic|cu)\b\.?\s*)?(?!per\b)([A-Za-z]+)"
    r"(?:\s*(?:\^\s*\{?\s*(-?\d)|(squared|cubed)\b))?",
    re.IGNORECASE,
)
_NUMERAL = re.compile(r"[-+\d\s.,/]+|[-+]?\s*\d*\s*\\frac\s*\{?\d+\}?\s*\{?\d+\}?")


def split_quantity(text: str) -> tuple[str, Unit]:
    r"""The number that a text stands for, and its unit: `5 \text{ m/s}`, `5\frac{\text{m}}{\text{s}}`,
    `5 cm^2`, `2.5 \text{ million people}`. What follows and is neither stays part of the text."""
    text = _FRACTION.sub(r" \1/\2", text)
    marked = _MARKED.search(text)
    before, words = text, ""
    if marked and text[: marked.start()].strip():
        before, words = text[: marked.start()].strip(), re.sub(r"\\text|[{}]", " ", marked.group())
    elif plain := _PLAIN.search(text):
        start = text[: plain.start()]
        if re.search(r"\d", start) and _is_unit(plain.group(1), start, text[plain.start() : plain.start(1)]):
            before, words = start.strip(), plain.group(1)
    words = " ".join(words.split())
    while words and (change := _CHANGES.match(words.lower())):
        changed = _changed(before, change)
        if changed is None:
            return text, NO_UNIT
        before, words = changed, words[change.end() :].strip()
    strange = _NEVER_UNITS & set(re.findall(r"(?<!-)\b[a-z]+\b(?!-)", words.lower()))
    if re.search(r"[A-Za-z] (?:squared|cubed)\b", words):
        strange -= set(_POWERS_AFTER)
    return (text, NO_UNIT) if strange or "," in words else (before, read_unit(words))


def _changed(number: str, change: re.Match[str]) -> str | None:
    scale, power, plus, part, below = change.groups()
    if scale:
        return rf"({number}) \cdot {1000 if scale == 'k' else _SCALES[scale]}"
    if power:
        return f"({number})^{{{_POWERS_AFTER[power]}}}"
    if below:
        return f"-({number})"
    value = spelled(plus or re.sub(r"of a ", "", part))
    if value is None:
        return None
    fraction = rf"\frac{{{value.numerator}}}{{{value.denominator}}}"
    return rf"({number}) + {fraction}" if plus else rf"({number}) \cdot {fraction}"


def _is_unit(words: str, before: str, space: str) -> bool:
    """Whether words without `\\text` are a unit: known ones of two letters or more, known ones
    with a stroke after a space (`5 m/s`), or any words, one of four letters or more, after a number."""
    found = re.findall(r"[A-Za-z]+", words)
    if all(
        word in _LOOSE or word.lower() in _LOOSE or (len(word) == 1 and word in _CANONICAL) for word in found
    ):
        return all(len(word) > 1 for word in found) or ("/" in words and bool(space or before[-1:] == " "))
    plain = _NUMERAL.fullmatch(before.strip())
    return plain is not None and "/" not in words and max(map(len, found)) >= 4


def read_unit(words: str) -> Unit:
    """The known units in some words: `sq. feet` is (("foot", 2),), `m/s` is (("m", 1), ("second", -1)).

    Words that are no unit say nothing. Of several units without a sign between them the first counts.
    """
    for short, long in _SPEEDS.items():
        words = re.sub(rf"\b{short}\b", long, words, flags=re.IGNORECASE)
    powers: Counter[str] = Counter()
    unknown = 0
    for sign, ahead, word, power, after in _TERM.findall(words):
        exponent = int(power) if power else _POWERS.get((ahead or after).lower(), 1)
        unit = _named(word)
        if powers["degree"] and (scale := _SCALES_OF_HEAT.get(word.lower())):
            powers = Counter({scale: 1})
        elif unit and (sign or not +powers or word in "kgmsAKN"):
            powers[unit] += -exponent if sign in ("/", "per") else exponent
        elif not unit and exponent != 1:
            unknown = exponent
    found = tuple(sorted((name, power) for name, power in powers.items() if power))
    return found or ((("", unknown),) if unknown else NO_UNIT)


def _named(word: str) -> str:
    lower = word.lower() if len(word) > 2 or word.isupper() else word
    return _CANONICAL.get(word) or _CANONICAL.get(lower, "")


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


# Numbers

_DECIMAL = re.compile(r"([-+]?)\s*(\d+(?:\.\d*)?)")
_FRAC = re.compile(r"([-+]?)\s*(\d+)?\s*\\frac\s*(?:\{\s*(-?\s*\d+)\s*\}|(\d))\s*(?:\{\s*(-?\d+)\s*\}|(\d))")
_SLASH = re.compile(r"([-+]?)\s*(?:(\d+)\s+)?(\d+)\s*/\s*(\d+)")
_REPEATING = re.compile(r"([-+]?)\s*(\d*)\.(\d*)\\overline\{(\d+)\}")
_SPACED = re.compile(r"\d{1,3}(?: \d{3})+")


def plain_value(text: str) -> tuple[Fraction | None, int | None]:
    """Exact value of a plain number, fraction, mixed number, repeating decimal or number in words, and how
    many digits follow its decimal point."""
    text = text.strip()
    if len(text) > _MAX_DIGITS:
        return None, None
    while len(text) > 1 and text[0] == "{" and text[-1] == "}" and "}" not in text[:-1]:
        text = text[1:-1].strip()
    if _SPACED.fullmatch(text):
        text = text.replace(" ", "")
    if plain := _DECIMAL.fullmatch(text):
        sign, digits = plain.groups()
        value, point = Fraction(digits.rstrip(".")), digits.find(".")
        return -value if sign == "-" else value, None if point < 0 else len(digits) - point - 1
    if frac := _FRAC.fullmatch(text):
        sign, integer, top, top_digit, bottom, bottom_digit = frac.groups()
        return _mixed(sign, integer, top or top_digit, bottom or bottom_digit), None
    if slash := _SLASH.fullmatch(text):
        return _mixed(*slash.groups()), None
    if repeating := _REPEATING.fullmatch(text):
        sign, integer, fixed, cycle = repeating.groups()
        shift = 10 ** len(fixed)
        tail = Fraction(int(cycle), shift * (10 ** len(cycle) - 1))
        value = Fraction(int((integer or "0") + fixed), shift) + tail
        return -value if sign == "-" else value, None
    return spelled(text) if text[-1:].isalpha() else None, None


def _mixed(sign: str, integer: str | None, top: str, bottom: str) -> Fraction | None:
    if int(bottom) == 0:
        return None
    value = Fraction(int(integer or 0)) + Fraction(int(top.replace(" ", "")), int(bottom))
    return -value if sign == "-" else value


def spelled(text: str) -> Fraction | None:
    """The value of a number in words: `forty-two`, `two and a half`, `three quarters`, `half a million`."""
    words = [word for word in text.lower().replace("-", " ").split() if word not in ("a", "an")]
    if not words or len(words) > 12:
        return None
    last = words[-1]
    if last in _SCALES and any(word.rstrip("s") in _PARTS for word in words):
        value = spelled(" ".join(words[:-1]))
        return None if value is None else value * _SCALES[last]
    if "and" in words or "plus" in words:
        at = max(place for place, word in enumerate(words) if word in ("and", "plus"))
        before, after = spelled(" ".join(words[:at])), spelled(" ".join(words[at + 1 :]))
        return None if before is None or after is None else before + after
    if part := _PARTS.get(last) or _PARTS.get(last.removesuffix("s")):
        count = spelled(" ".join(words[:-1])) if words[1:] else Fraction(1)
        return None if count is None else count / part
    done = current = 0
    for word in words:
        tens = current % 100
        if word in _SCALES:
            current = max(current, 1) * _SCALES[word]
            done, current = (done + current, 0) if _SCALES[word] > 100 else (done, current)
        elif word in _SMALL and (not tens or (tens >= 20 and tens % 10 == 0 and _SMALL[word] < 10)):
            current += _SMALL[word]
        else:
            return None
    return Fraction(done + current)
