"""The computer algebra behind a verdict: math-verify's parser and comparison, and relations and
sets on top of it. Only ever imported in a worker process: it can hang, and it is slow to import."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify import LatexExtractionConfig, parse, verify

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off

Expression = Any
"""A sympy object; sympy carries no types."""

SYMPY_ERRORS = (
    TypeError,
    ValueError,
    AttributeError,
    NotImplementedError,
    ArithmeticError,
    LookupError,
    RecursionError,
    sympy.SympifyError,
    sympy.PolynomialError,
)
"""What sympy raises on expressions it has no answer for."""

# Units, percent signs, boxes and decimals are settled before: math-verify would drop a trailing
# `t` or `h` as a unit, and compare decimals at 6 places.
_CONFIG = (
    LatexExtractionConfig(
        boxed_match_priority=-1,
        normalization_config=NormalizationConfig(
            basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
        ),
    ),
)


@lru_cache(maxsize=512)
def expression(text: str) -> Expression | None:
    """The sympy object that a LaTeX string stands for, decimals made exact; None if unreadable."""
    if not text or "$" in text:
        return None
    found = parse(
        f"${text}$",
        _CONFIG,
        fallback_mode="no_fallback",
        extraction_mode="first_match",
        parsing_timeout=None,
    )
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
    """Whether two expressions are equal, by math-verify; numbers that are plainly apart are not, for
    simplifying the difference of `10^{-19}` and a logarithm takes for ever."""
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


def rounds_to(text: str, low: sympy.Rational, high: sympy.Rational) -> bool:
    """Whether an exact number lies in [low, high]."""
    value = number_value(text)
    if value is None or not value.is_finite:
        return False
    try:
        return bool(low <= value) and bool(value <= high)
    except SYMPY_ERRORS:
        return False


def same_relation(
    gold: tuple[Sequence[str], Sequence[str]], candidate: tuple[Sequence[str], Sequence[str]]
) -> bool | None:
    """Whether two relations, each (sides, signs), say the same: equations up to a constant factor,
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
