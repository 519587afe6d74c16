"""Compares two leaves: numbers, units and ratios exactly, anything else by math-verify and sympy.

Only imported in a worker process: it can hang, and sympy is slow to import.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from enum import Enum
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

from dash_exp.verifiers.math.normalise import is_time_of_day, plain_words, squash, units_clash
from dash_exp.verifiers.math.parse import Leaf

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off

_ROUNDED_DIGITS = 3
"""A gold decimal with at least this many significant digits may be a rounded exact number."""
_PRIMES = re.compile(r"(?<=[A-Za-z)}])'+|\\prime(?![A-Za-z])")
_DATE = re.compile(r"\d{4}-(?:0\d|1[0-2])-(?:[0-2]\d|3[01])")
_COLON = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")


class Match(Enum):
    """How a candidate compares with gold."""

    SAME = "same"
    DIFFERENT = "different"
    UNREADABLE = "unreadable"

    @classmethod
    def of(cls, same: bool | None) -> Match:
        return cls.UNREADABLE if same is None else cls.SAME if same else cls.DIFFERENT


def all_of(matches: Sequence[Match]) -> Match:
    if Match.DIFFERENT in matches:
        return Match.DIFFERENT
    return Match.UNREADABLE if Match.UNREADABLE in matches else Match.SAME


def compare_leaves(gold: Leaf, candidate: Leaf) -> Match:
    """Whether two unstructured answers are the same. Of a gold chain (`2/3 = 0.667`) any member
    will do; of a candidate's chain every member has to be right."""
    if gold.name and candidate.name and _marks(gold.name) != _marks(candidate.name):
        return Match.DIFFERENT  # math-verify drops primes
    if _names_differ(gold, candidate):
        return Match.of(same_relation(*(((leaf.name, leaf.text), ("=",)) for leaf in (gold, candidate))))
    if units_clash(gold.unit, candidate.unit) or _percent_clash(gold, candidate):
        return Match.DIFFERENT
    if _tautology(gold) != _tautology(candidate) and (gold.name or candidate.name):
        return Match.DIFFERENT
    alternatives = (gold, *gold.chain)
    found = []
    for member in (candidate, *candidate.chain):
        tried = [_leaf(alternative, member) for alternative in alternatives]
        near = member.rounded and any(_rounds_near(other, member) for other in alternatives)
        found.append(Match.SAME if near or Match.SAME in tried else all_of(tried))
    return all_of(found)


def _percent_clash(gold: Leaf, candidate: Leaf) -> bool:
    """Whether one is a percentage and the other has a unit."""
    return bool((gold.percent and candidate.unit) or (candidate.percent and gold.unit))


def _tautology(leaf: Leaf) -> bool:
    """Whether the leaf was written as `1 = 1`, which gives no name a value."""
    return bool(leaf.chain) and not leaf.name and all(leaf.text == other.text for other in leaf.chain)


def _rounds_near(exact: Leaf, shown: Leaf) -> bool:
    """Whether `shown`, written after an approximation sign, is `exact` cut or rounded."""
    if shown.value is None or shown.percent != exact.percent:
        return False
    unit = Fraction(1, 10 ** (shown.decimals or 0))
    low, high = shown.value - unit, shown.value + unit
    if exact.value is not None:
        return low < exact.value < high
    return rounds_to(exact.text, low, high)


def _marks(name: str) -> list[str]:
    """Primes, and the sign of an inverse."""
    return re.findall(r"'|\^-1", name)


def _names_differ(gold: Leaf, candidate: Leaf) -> bool:
    names = gold.name, candidate.name
    return all(0 < len(name) <= 4 for name in names) and names[0] != names[1]


def _leaf(gold: Leaf, candidate: Leaf) -> Match:
    dates = _date(gold.text), _date(candidate.text)
    if dates != (None, None):
        return Match.of(dates[0] == dates[1])
    if gold.base is not None or candidate.base is not None:
        return _bases(gold, candidate)
    if gold.value is not None and candidate.value is not None:
        return Match.of(_same_number(gold, candidate))
    if squash(gold.text) == squash(candidate.text):
        return Match.of(gold.percent == candidate.percent)
    if ":" in gold.text or ":" in candidate.text:
        return _ratios(gold, candidate)
    words = plain_words(gold.text), plain_words(candidate.text)
    if words[0] and words[0] == words[1]:
        return Match.SAME
    return _expressions(gold, candidate)


def _expressions(gold: Leaf, candidate: Leaf) -> Match:
    if _PRIMES.findall(gold.text) != _PRIMES.findall(candidate.text):
        return Match.DIFFERENT  # math-verify drops them: `f'` would be `f`
    parsed = expression(candidate.text)
    if parsed is None:
        return Match.UNREADABLE
    expected = expression(gold.text)
    if expected is None:
        return Match.DIFFERENT
    if same_expression(expected, parsed):
        return Match.SAME
    if gold.percent != candidate.percent:
        whole, percent = (parsed, expected) if gold.percent else (expected, parsed)
        if same_percentage(whole, percent):
            return Match.SAME
    return Match.of(_rounded(gold, candidate))


def _same_number(gold: Leaf, candidate: Leaf) -> bool:
    expected, found = gold.value, candidate.value
    assert expected is not None and found is not None
    if expected == found:
        return True
    if gold.percent != candidate.percent:
        return expected / 100 == found if gold.percent else expected == found / 100
    return _rounded(gold, candidate)


def _rounded(gold: Leaf, candidate: Leaf) -> bool:
    """Whether gold is a decimal that the exact candidate rounds to. A candidate that is itself a
    decimal is no exact number, and a gold of one or two digits leaves too much room."""
    if gold.value is None or gold.decimals is None or "." in candidate.text:
        return False
    if len(re.sub(r"\D", "", gold.text).lstrip("0")) < _ROUNDED_DIGITS:
        return False
    half = Fraction(1, 2 * 10**gold.decimals)
    low, high = gold.value - half, gold.value + half
    if candidate.value is not None:
        return candidate.value.denominator > 1 and low <= candidate.value <= high
    return rounds_to(candidate.text, low, high)


def _date(text: str) -> tuple[int, ...] | None:
    """Year, month and day of `2023-01-05`, which would else be a difference."""
    return tuple(map(int, text.split("-"))) if _DATE.fullmatch(text) else None


def _bases(gold: Leaf, candidate: Leaf) -> Match:
    """Digits have to agree, and the bases where both are written."""
    digits = [re.sub(r"\\text|[\s{}()]", "", leaf.text).upper() for leaf in (gold, candidate)]
    same_base = gold.base is None or candidate.base is None or gold.base == candidate.base
    return Match.of(digits[0] == digits[1] and same_base)


def _ratios(gold: Leaf, candidate: Leaf) -> Match:
    """`3:5` as a ratio or a time. A time (`9:24`) is compared part by part only."""
    first, second = colon_parts(gold.text), colon_parts(candidate.text)
    if first is None and second is None:
        return Match.UNREADABLE
    if is_time_of_day(gold.unit) or is_time_of_day(candidate.unit):  # 9 a.m. is 9:00
        first, second = _clock(gold), _clock(candidate)
    if first is not None and first == second:
        return Match.SAME
    if first and second and _afternoon(gold, first) == _afternoon(candidate, second):
        return Match.SAME
    looks_like_time = re.fullmatch(r"\d{1,2}(?:\s*:\s*\d\d){1,2}", gold.text) is not None
    if first and second and len(first) == len(second) > 2 and not looks_like_time:
        products = ((a * second[0], b * first[0]) for a, b in zip(first, second, strict=True))
        return Match.of(all(a == b for a, b in products))
    values = [_ratio_value(leaf, parts) for leaf, parts in ((gold, first), (candidate, second))]
    if looks_like_time or None in values:
        return Match.DIFFERENT
    return Match.of(values[0] == values[1])


def _clock(leaf: Leaf) -> tuple[Fraction, ...] | None:
    parts = colon_parts(leaf.text)
    return (leaf.value, Fraction(0)) if parts is None and leaf.value is not None else parts


def _afternoon(leaf: Leaf, parts: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """`5:05 p.m.` as 17:05."""
    later = is_time_of_day(leaf.unit) and leaf.unit[0][0] == "pm" and parts[0] < 12
    return (parts[0] + 12, *parts[1:]) if later else parts


def _ratio_value(leaf: Leaf, parts: tuple[Fraction, ...] | None) -> Fraction | None:
    if parts is None:
        return leaf.value
    return parts[0] / parts[1] if len(parts) == 2 and parts[1] else None


def colon_parts(text: str) -> tuple[Fraction, ...] | None:
    """The numbers of a ratio or a time such as `3:5` or `4:51:06`."""
    if not _COLON.fullmatch(text):
        return None
    return tuple(Fraction(part.strip()) for part in text.split(":"))


# Computer algebra

Expression = Any
"""A sympy object; sympy carries no types."""

_PYTHON_ERRORS = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError)
_LIMITS = (NotImplementedError, RecursionError)
SYMPY_ERRORS = (*_PYTHON_ERRORS, *_LIMITS, sympy.SympifyError, sympy.PolynomialError)
"""What sympy raises on expressions it has no answer for."""

# Units, percent signs, boxes and decimals are settled before: math-verify would drop a trailing
# `t` or `h` as a unit, and compare decimals at 6 places.
_SPELLING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
)
_CONFIG = (LatexExtractionConfig(boxed_match_priority=-1, normalization_config=_SPELLING),)


@lru_cache(maxsize=512)
def expression(text: str) -> Expression | None:
    """The sympy object that a LaTeX string stands for, decimals made exact; None if unreadable."""
    if not text or "$" in text:
        return None
    modes = {"fallback_mode": "no_fallback", "extraction_mode": "first_match"}
    found = parse(f"${text}$", _CONFIG, **modes, parsing_timeout=None)
    if not found or isinstance(found[0], str):
        return None
    return _exact(found[0])


def _exact(parsed: Expression) -> Expression | None:
    """Without floats, and with the imaginary unit where math-verify reads a symbol named i."""
    try:
        floats = parsed.atoms(sympy.Float)
        exact = parsed.xreplace({number: sympy.Rational(str(number)) for number in floats})
        return exact.xreplace({symbol: sympy.I for symbol in exact.free_symbols if symbol.name == "i"})
    except SYMPY_ERRORS:
        return None


def same_expression(gold: Expression, candidate: Expression) -> bool:
    """Whether two expressions are equal, by math-verify. It is not asked about numbers that are plainly
    apart: simplifying the difference of `10^{-19}` and a logarithm never ends."""
    return not _apart(gold, candidate) and bool(verify(gold, candidate, timeout_seconds=None))


def _apart(gold: Expression, candidate: Expression) -> bool:
    if not all(isinstance(side, sympy.Expr) and side.is_number for side in (gold, candidate)):
        return False
    try:
        first, second = (sympy.N(side, 30) for side in (gold, candidate))
        size = max(abs(first), abs(second))
        return bool(size.is_finite and abs(first - second) > size * sympy.Rational(1, 10**12))
    except SYMPY_ERRORS:
        return False


def same_percentage(whole: Expression, percent: Expression) -> bool:
    """Whether `percent` hundredths are `whole`."""
    return isinstance(percent, sympy.Expr) and same_expression(whole, percent / 100)


def components(text: str, count: int) -> list[Expression] | None:
    """The coefficients of i, j and k in a vector such as `2i - j`; None when it is none."""
    parsed = expression(text)
    if not isinstance(parsed, sympy.Expr) or not 2 <= count <= 3:
        return None
    known = {symbol.name: symbol for symbol in parsed.free_symbols if symbol.name in ("j", "k")}
    units = [sympy.Dummy("i"), *(known.get(name, sympy.Dummy(name)) for name in "jk"[: count - 1])]
    try:
        vector = sympy.expand(parsed.xreplace({sympy.I: units[0]}))
        parts = [vector.coeff(unit) for unit in units]
        rest = vector - sum(part * unit for part, unit in zip(parts, units, strict=True))
        linear = sympy.expand(rest) == 0 and not any(part.has(*units) for part in parts)
        return parts if linear else None
    except SYMPY_ERRORS:
        return None


def number_value(text: str) -> Expression | None:
    """The real number that a text stands for, infinities included; None when it is none."""
    parsed = expression(text)
    try:
        value = None if parsed is None else sympy.simplify(parsed)
        return value if value is not None and value.is_number and value.is_extended_real else None
    except SYMPY_ERRORS:
        return None


def rounds_to(text: str, low: Fraction, high: Fraction) -> bool:
    """Whether an exact number lies in [low, high]."""
    value = number_value(text)
    if value is None or not value.is_finite:
        return False
    try:
        return bool(sympy.Rational(low) <= value) and bool(value <= sympy.Rational(high))
    except SYMPY_ERRORS:
        return False


def same_relation(
    gold: tuple[Sequence[str], Sequence[str]], candidate: tuple[Sequence[str], Sequence[str]]
) -> bool | None:
    """Whether two relations, each (sides, signs), mean the same: equations up to a constant factor,
    inequalities up to a positive one. None when one cannot be read."""
    left, right = _differences(*gold), _differences(*candidate)
    if left is None or right is None:
        return None
    if len(left) != len(right):
        return False
    rest = list(right)
    for kind, difference in left:
        twin = next((r for r in rest if r[0] == kind and _proportional(kind, difference, r[1])), None)
        if twin is None:
            return False
        rest.remove(twin)
    return True


def _differences(sides: Sequence[str], signs: Sequence[str]) -> list[tuple[str, Expression]] | None:
    """Each relation as a kind and what it compares with 0 (`<`: difference > 0)."""
    parsed = [side for side in map(expression, sides) if side is not None]
    if len(parsed) < len(sides):
        return None
    found = []
    for left, sign, right in zip(parsed, signs, parsed[1:], strict=False):
        try:
            difference = left - right if sign in ("=", "\\ne", ">", "\\geq") else right - left
        except SYMPY_ERRORS:
            return None
        kind = {">": "<", "\\geq": "\\leq"}.get(sign, sign)
        found.append((kind, difference))
    return found


def _proportional(kind: str, first: Expression, second: Expression) -> bool:
    try:
        ratio = sympy.simplify(first / second)
        if not ratio.is_number or ratio.is_zero or not ratio.is_finite:
            return bool(sympy.simplify(first) == 0 and sympy.simplify(second) == 0)
        return kind in ("=", "\\ne") or bool(ratio.is_positive)
    except SYMPY_ERRORS:
        return False


def interval(low: str, high: str, left_open: bool, right_open: bool) -> sympy.Set | None:
    """A real interval, None when an end is no number."""
    ends = number_value(low), number_value(high)
    if ends[0] is None or ends[1] is None:
        return None
    try:
        return sympy.Interval(ends[0], ends[1], left_open, right_open)
    except SYMPY_ERRORS:
        return None


def points(texts: Sequence[str]) -> sympy.Set | None:
    """A finite set of real numbers, None when a text is no number."""
    values = [number_value(text) for text in texts]
    return None if any(value is None for value in values) else sympy.FiniteSet(*values)


def same_set(
    gold: tuple[Sequence[sympy.Set], Sequence[sympy.Set]],
    candidate: tuple[Sequence[sympy.Set], Sequence[sympy.Set]],
) -> bool | None:
    """Whether two sets, each (union of these, without those), have the same members."""
    try:
        first, second = (
            sympy.Complement(sympy.Union(*parts), sympy.Union(*minus)) if minus else sympy.Union(*parts)
            for parts, minus in (gold, candidate)
        )
        return bool(first == second or ((first - second).is_empty and (second - first).is_empty))
    except SYMPY_ERRORS:
        return None
