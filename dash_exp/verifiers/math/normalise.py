"""Brings an answer to one LaTeX spelling without changing its meaning, and reads its unit."""

from __future__ import annotations

import re
from collections import Counter

_SIGNS = r"""
− - – - — - × \times · \cdot ÷ / ∞ \infty π \pi θ \theta ≤ \leq ≥ \geq ≠ \ne ∪ \cup ∈ \in ± \pm ° ^\circ
√ \sqrt ′ ' ² ^2 ³ ^3 ½ \frac{1}{2} ¼ \frac{1}{4} ¾ \frac{3}{4} ℝ \mathbb{R} ∅ \emptyset “ " ” " ’ '
∖ \setminus ⟨ \langle ⟩ \rangle 、 , 。 . µ \mu μ \mu
"""
"""Characters, each with its LaTeX."""
_UNICODE = str.maketrans(
    {sign: latex + " " * latex[-1].isalpha() for sign, latex in re.findall(r"(\S+) (\S+)", _SIGNS)}
    | {chr(full): chr(full - 0xFEE0) for full in range(0xFF01, 0xFF5E)}  # `，` is `,`, `５` is `5`
    | dict.fromkeys("\u00a0\n\t\u3000", " ")
)

_CURRENCIES = {"€": "euros", "£": "pounds", "¥": "yuan", "₹": "rupees"}
_ORDINAL = r"(?:\\text\{\s*(?:st|nd|rd|th)\s*\}|\{\s*(?:st|nd|rd|th)\s*\})"
_LEAD = (
    r"(?i)^\\text\{(?![^{}]*\b(?:no|not|wrong|incorrect)\b)\s*(?:the\s+)?(?:[a-z]+\s+){1,4}?"
    r"(?:is|are|equals)\s*:?\s*\}\s*(?=\S)"
)
"""`\\text{The answer is }` in front."""


def _commands(table: str) -> list[tuple[str, str]]:
    """Patterns of commands; `table` has each replacement before the commands that it stands for."""
    rows = [row.split() for row in table.split(", ")]
    return [(rf"\\(?:{'|'.join(commands)})(?![A-Za-z])", meaning) for meaning, *commands in rows]


_SIMPLE: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        # thousands separators that cannot be anything else: {,} and ,\! and \, before 3 digits
        (r"(?<=\d)\s*(?:\{,\}|,\s*\\!|\\,)\s*(?=\d{3}(?!\d))", ""),
        (r"\\(?:text)?color\s*\{[^{}]*\}|\\underline(?![A-Za-z])|\s*\\checkmark\s*$", ""),
        (r"\\!|\\displaystyle|\\textstyle|\\limits(?![A-Za-z])|\\null(?![A-Za-z])", ""),
        (r"\\(?:left|right)\s*\.", ""),
        (r"\\(?:left|right|[bB]ig{1,2}[lrm]?)(?![A-Za-z])\s*", ""),
        *_commands(r"\{ lbrace, \} rbrace, ( langle lparen, ) rangle rparen, [ lbrack, ] rbrack"),
        (r"(?<!\\)\\[,;: ]|\\q?quad(?![A-Za-z])|~|\\thinspace(?![A-Za-z])", " "),
        (r"\\phantom\s*(?:\{[^{}]*\}|.)", ""),
        (r"\\(?:[dtcs]|nice)frac(?![A-Za-z])", r"\\frac"),
        (r"\\frac\s*(\\pi|[A-Za-z0-9])\s*(\\pi|[A-Za-z0-9])(?![A-Za-z])", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\\pi|[A-Za-z0-9])\s*(?=\{)", r"\\frac{\1}"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\\pi|[A-Za-z0-9])(?![A-Za-z])", r"\\frac\1{\2}"),
        (r"\\(?:text(?:normal|bf|it|rm|sf|tt)|mbox|hbox|mathrm|operatorname)\s*\{", r"\\text{"),
        (r"\\text\s+\{", r"\\text{"),
        (r"(?<![\w.^/}])(\d+)/(\d+)\s+(?=\\?[A-Za-z])", r"\\frac{\1}{\2} "),  # not `1/(2 x)`
        (r"\\(?:wide)?hat\s*\{\s*\\?([ijk])(?:math)?\s*\}", r" \1 "),
        (r"(?<=\^)\s*\{\s*(-?\d)\s*\}(?=(?!\d)[^{}]*\})", r"\1"),  # `\text{m s^{-1}}`
        (r"\\mu\s*\\text\{\s*", r"\\text{ micro"),
        (r"(\\text\{[^{}]*?)\\mu\s*", r"\1micro"),
        *((rf"\s*{sign}(?!\s*\d)", rf"\\text{{ {name}}}") for sign, name in _CURRENCIES.items()),
        (rf"[{''.join(_CURRENCIES)}]", ""),
        (rf"(?<=\d)\s*(?:\^\s*\{{\s*{_ORDINAL}\s*\}}|\^?\s*{_ORDINAL})|(?<=\d)(?:st|nd|rd|th)$", ""),
        (r"^([-\d.,/]+)\s+\(([A-Za-z]{2,}(?:\s[A-Za-z]+)*)\)$", r"\1\\text{ \2}"),  # `9 (apples)`
        (r"(?<=[\d})])\s*([\u4e00-\u9fff]+)$", r"\\text{ \1}"),  # a unit in Chinese
        (_LEAD, ""),
        (r"^(\d+)\s*(?:\\text\{\s*to\s*\}|\bto\b)\s*(\d+)$", r"\1:\2"),  # `3 to 4`
        (r"\\(?:mathbf|boldsymbol|mathit|bm|mathsf|emph|bf|rm)(?![A-Za-z])\s*", ""),
        *_commands(r"\\leq le leqslant leqq, \\geq ge geqslant geqq, \\ne neq, < lt, > gt"),
        (r"<=", r"\\leq "),
        (r">=", r"\\geq "),
        (r"\\(?:thickapprox|approxeq|doteq|simeq)(?![A-Za-z])", r"\\approx"),
        (r"\\varnothing|\\\{\s*\\\}", r"\\emptyset"),
        (r"\\backslash(?![A-Za-z])", r"\\setminus"),
        (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R)\s*(?:\^|_)\s*\{?\s*(?:\+|>\s*0)\s*\}?", r"(0,\\infty)"),
        (r"\\(?:mathbb|Bbb)\s*(?:\{R\}|R(?![A-Za-z]))", r"(-\\infty,\\infty)"),
        (r"\^\s*\{?\s*(?:\\circ|\\degree)\s*\}?|\\degree(?![A-Za-z])", r"\\text{ degrees}"),
        (r"(\\text\{[^{}]*)\\text\{([^{}]*)\}", r"\1\2"),  # `\text{ °C}`
        (r"\+\s*\\infty", r"\\infty"),
        (r"(?<![A-Za-z\\])(?:infinity|infty|inf)(?![A-Za-z])", r"\\infty"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi"),
        (r"(?<![A-Za-z\\])(theta|alpha|beta)(?![A-Za-z])", r"\\\1"),
        (r"(?<=\d)\s*[xX]\s*(?=10\s*\^)", r"\\cdot "),
        (r"\*\*", "^"),
        (r"\*", r"\\cdot "),
        # `1.4e3`; an E without a point could be a digit of base 16
        (r"(?<![\w.\\])(\d+(?:\.\d+)?)e([-+]?)\+?(\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2\3}"),
        (r"(?<![\w.\\])(\d+\.\d+)E([-+]?)\+?(\d{1,3})(?![\w.])", r"\1\\cdot 10^{\2\3}"),
        # `2i` would be read as a product with a symbol named i, `2 i` as a complex number
        (r"(?<=\d)i(?![A-Za-z])", " i"),
        (r"(?<=[\s,;(\[])\.(?=\d)|^\.(?=\d)|(?<=[-+$])\.(?=\d)", "0."),
        (r"\s+", " "),
    )
)
_TRIG = re.compile(r"\\(?:sin|cos|tan|cot|sec|csc)")
_TRIG_DEGREES = re.compile(r"(?<![\d.])(\d+(?:\.\d+)?)\s*\\text\{ degrees\}")
_PRICE = re.compile(rf"(-?)\s*(?:\\?\$|([{''.join(_CURRENCIES)}]))\s*(\d(?:[\d,.{{}}\s]|\\[!,])*)")
_DOUBLED = re.compile(r"\\\\(?=[A-Za-z]{2})")
_CURRENCY = re.compile(r"\\?\$")
_AND = (
    r"(?:,\s*)?\\text\s*\{[\s,]*(?:and|or)[\s,]*\}|(?<![A-Za-z\\{])(?:,\s*)?(?:and|or)(?![A-Za-z}])"
    r"|(?<=[\d)}\]])\s*[或和]"
)
_CONNECTOR = re.compile(_AND)
_FOR_ALL = re.compile(
    r"(?<=\S)\s*,?\s*(?:(?:\\text\{\s*)?for (?:all|any|every|each)(?:\s+real)?\s*\}?|\\forall)\s*[a-z]"
    r"(?:\s*\\in\s*\(-\\infty,\\infty\))?\s*\}?$"
)
_SYNONYMS = r"""
\emptyset = no solution | no solutions | there is no solution | there are no solutions | has no solution
\emptyset = has no solutions | empty set | null set
(-\infty,\infty) = all real numbers | all reals | all real values | any real number | every real number
(-\infty,\infty) = set of all real numbers | set of real numbers | real numbers | all real x
(-\infty,\infty) = x is any real number | all real values of x
does not exist = dne | does not exist | doesn t exist | limit does not exist | no limit exists
"""
_PHRASES = {
    phrase: meaning
    for meaning, phrases in (line.split(" = ") for line in _SYNONYMS.strip().split("\n"))
    for phrase in phrases.split(" | ")
}
_WHOLE_TEXT = re.compile(r"\\text\{([^{}]*)\}")


def normalise(answer: str) -> str:
    """One spelling for brackets, fractions, spaces, signs, relations, text and degrees.

    An answer that is a price becomes a number of dollars; other dollar signs go (they mark currency or maths
    mode), `and` and `or` become commas, a degree sign becomes the unit `degrees` or, inside a
    trigonometric expression, a factor of pi/180. Phrases such as `no solution` become symbols.
    """
    text = answer.strip().strip("*").strip()
    if "\\begin" not in text:
        text = _DOUBLED.sub(r"\\", text)
    price = _PRICE.fullmatch(text.removeprefix("$").removesuffix("$") if text.startswith("$\\$") else text)
    if price:
        sign, currency, amount = price.groups()
        text = rf"{sign}{amount.rstrip('., ')}\text{{ {_CURRENCIES.get(currency, 'dollars')}}}"
    text = _CURRENCY.sub("", text.translate(_UNICODE))
    for pattern, replacement in _SIMPLE:
        text = pattern.sub(replacement, text)
    if _TRIG.search(text):
        text = _TRIG_DEGREES.sub(r"(\\frac{\1 \\pi}{180})", text)
    whole = _WHOLE_TEXT.fullmatch(text.strip(" .,"))
    if whole:
        text = whole.group(1)
    text = _FOR_ALL.sub("", _CONNECTOR.sub(",", text))
    text = square_roots(trim(text))
    return _PHRASES.get(plain_words(text), text)


def trim(text: str) -> str:
    """Without surrounding space, quotes and closing punctuation."""
    text = text.strip().strip('"`')
    if len(text) > 1 and text[0] == text[-1] == "'":  # a single one is a prime: `f'`
        text = text.strip("'")
    return text.rstrip(" .,;:?").lstrip(" =:,;")


def square_roots(text: str) -> str:
    r"""`sqrt(...)` typed as on a keyboard becomes `\sqrt{...}`."""
    parts: list[str] = []
    at = 0
    for match in re.finditer(r"(?<![A-Za-z\\])sqrt\s*\(", text):
        end = closing(text, match.end() - 1)
        if match.start() < at or end is None:
            continue
        parts += [text[at : match.start()], "\\sqrt{", text[match.end() : end], "}"]
        at = end + 1
    return "".join(parts) + text[at:]


def closing(text: str, opening: int) -> int | None:
    """Index of the bracket that closes the one at `opening`; `(` and `[` close each other."""
    depth = 0
    for index in range(opening, len(text)):
        if text[index] in "([{":
            depth += 1
        elif text[index] in ")]}":
            depth -= 1
            if depth == 0:
                return index
    return None


def squash(text: str) -> str:
    """Without spaces that separate nothing."""
    return re.sub(r"(?<![A-Za-z0-9])\s+|\s+(?![A-Za-z0-9])", "", text.strip())


def plain_words(text: str) -> str:
    """An answer in words, as lower-case words; empty when it is a formula. `(B)` becomes `b`."""
    bare = re.sub(r"\\(?:text|overline)\s*\{([^{}]*)\}", r" \1 ", text)
    bare = re.sub(r"(?<=[A-Za-z]{2})-(?=[A-Za-z]{2})", " ", bare)
    bare = re.sub(r"(?:(?<=[A-Za-z]{3})|(?<=\b[Nn]o))!", "", bare)  # `n!` is a factorial
    if not re.fullmatch(r"[\sA-Za-z0-9().,:'\"?]+", bare):
        return ""
    words = re.findall(r"[a-z0-9]+", bare.lower())
    if not any(re.fullmatch(r"[a-z]{2,}", word) for word in words):
        return words[0] if len(words) == 1 and words[0].isalpha() and "'" not in bare else ""
    return " ".join(words[1:] if len(words) > 1 and words[0] in ("the", "a", "an", "on") else words)


# Units

Unit = tuple[tuple[str, int], ...]
"""Known names with their powers, sorted; `` is the name of an unknown unit whose power is said."""

_UNITS = """
cent cents | dollar dollars usd bucks | degree degrees deg | radian radians rad | mm millimeter millimeters
cm centimeter centimeters centimetres | m meter meters metre metres | km kilometer kilometers kilometres
inch in inches | foot ft feet | yard yards yd | mile miles mi | second s sec seconds | minute min mins minutes
hour h hr hrs hours | day days | week weeks | month months | year years | am | pm | kg kilogram kilograms
gram g gm grams | mg milligram milligrams | pound lb lbs pounds | ounce oz ounces
liter l liters litre litres | ml milliliter milliliters | gallon gallons
euro euros eur | yuan rmb yen | rupee rupees | celsius centigrade | fahrenheit
"""
"""Units, each with its other spellings."""
_CANONICAL = {word: line.split()[0] for line in re.split(r"[|\n]", _UNITS.strip()) for word in line.split()}
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
_FUNCTION_NAMES = "sin cos tan cot sec csc log ln exp sqrt mod gcd lcm"
_FUNCTIONS = frozenset(_FUNCTION_NAMES.split())

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
