"""Computer algebra: LaTeX as sympy objects, and whether two of them are equal, proved or not accepted.

Only imported in a worker process: it can hang, and sympy is slow to import.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import Any

import sympy
from latex2sympy2_extended import NormalizationConfig, latex2sympy
from sympy.core.function import AppliedUndef

Expression = Any
"""A sympy object; sympy carries no types."""

_PYTHON_ERRORS = (TypeError, ValueError, AttributeError, ArithmeticError, LookupError, AssertionError)
SYMPY_ERRORS = (
    *_PYTHON_ERRORS,
    NotImplementedError,
    RecursionError,
    sympy.SympifyError,
    sympy.PolynomialError,
)
"""What sympy raises on expressions it has no answer for."""
_SPELLING = NormalizationConfig(
    basic_latex=True, units=False, malformed_operators=True, nits=False, boxed="none"
)
_DIGITS, _MOST_DIGITS = 8, 100
"""Digits of a difference that have to be certain, and the working precision up to which that is tried."""


@lru_cache(maxsize=512)
def expression(text: str) -> Expression | None:
    """The sympy object that a LaTeX string stands for, decimals made exact, roots of odd order real, and the
    imaginary unit where a symbol is named i; None if unreadable."""
    if not text.strip():
        return None
    try:
        parsed = latex2sympy(text, is_real=True, normalization_config=_SPELLING)
        known = {number: sympy.Rational(str(number)) for number in parsed.atoms(sympy.Float)}
        known |= {symbol: sympy.I for symbol in parsed.free_symbols if symbol.name == "i"}
        evaluated = parsed.xreplace(known).doit()
        return evaluated.replace(_is_odd_root, lambda power: _real_root(*power.args))
    except Exception as error:  # its grammar raises plain exceptions
        if isinstance(error, MemoryError):
            raise
        return None


def _is_odd_root(power: Expression) -> bool:
    if not (power.is_Pow and power.exp.is_Rational and power.exp.q % 2 and power.exp.q > 1):
        return False
    return bool(power.base.is_number and power.base.is_negative)


def _real_root(base: Expression, exponent: Expression) -> Expression:
    return (-1) ** exponent.p * (-base) ** exponent


def same_expression(gold: Expression, found: Expression) -> bool:
    """Whether two expressions are proved to be equal, wherever both have real values."""
    if gold == found:
        return True
    try:
        if isinstance(gold, sympy.MatrixBase) and isinstance(found, sympy.MatrixBase):
            return gold.shape == found.shape and all(map(same_expression, gold, found))
        if not (isinstance(gold, sympy.Expr) and isinstance(found, sympy.Expr)):
            return False
        difference = gold - found
        return not difference.has(sympy.oo, sympy.zoo, sympy.nan) and _is_zero(gold, found)
    except SYMPY_ERRORS:
        return False


def _is_zero(gold: Expression, found: Expression) -> bool:
    calls = sorted(gold.atoms(AppliedUndef) | found.atoms(AppliedUndef), key=str)
    names = {call: sympy.Symbol(f"call {at}", real=True) for at, call in enumerate(calls)}
    gold, found = gold.xreplace(names), found.xreplace(names)
    symbols = sorted(gold.free_symbols | found.free_symbols, key=str)
    if not symbols:
        return not _apart(gold, found) and _proved(gold - found)
    for point, positive in _points(symbols):
        here = gold.xreplace(point), found.xreplace(point)
        # elsewhere roots and logarithms have several values
        if (positive or all(_is_real(side, point) for side in (gold, found))) and _apart(*here):
            return False
    positives = {symbol: sympy.Symbol(symbol.name, positive=True) for symbol in symbols}
    difference = gold - found
    return _proved(difference) or _proved(difference.xreplace(positives))


def _points(symbols: Sequence[Expression]) -> Iterator[tuple[dict[Expression, Expression], bool]]:
    """Values for the symbols, and whether all are positive."""
    for turn, signs in enumerate(((1, 1), (1, 1), (-1, -1), (-1, 1))):
        values = (sympy.Rational(signs[at % 2] * (7 + 6 * turn + 10 * at), 5) for at in range(len(symbols)))
        yield dict(zip(symbols, values, strict=True)), min(signs) > 0


def _is_real(side: Expression, point: dict[Expression, Expression]) -> bool:
    """Whether a value is real at a point, with all roots and logarithms in it."""
    inner = [power.base for power in side.atoms(sympy.Pow) if not power.exp.is_integer]
    inner += [logarithm.args[0] for logarithm in side.atoms(sympy.log)]
    return (
        all(part.xreplace(point).is_nonnegative for part in inner) and side.xreplace(point).evalf(8).is_real
    )


def _apart(gold: Expression, found: Expression) -> bool:
    """Whether two numbers are known to differ: sympy keeps track of the error of its digits."""
    value = (gold - found).evalf(_DIGITS, maxn=_MOST_DIGITS)
    parts = value.as_real_imag()
    return any(isinstance(part, sympy.Float) and part._prec > _DIGITS and part != 0 for part in parts)


def _proved(difference: Expression) -> bool:
    for simpler in (sympy.expand, _expanded, sympy.simplify):
        if simpler(difference) == 0:
            return True
    unknown = sympy.Dummy("x")
    return bool(difference.is_algebraic) and sympy.minimal_polynomial(difference, unknown) == unknown


def _expanded(difference: Expression) -> Expression:
    return sympy.simplify(sympy.expand_log(sympy.expand_func(difference), factor=True))


def is_real_number(value: Expression | None) -> bool:
    """Whether it is one, infinities included."""
    try:
        return isinstance(value, sympy.Expr) and bool(value.is_number and value.is_extended_real)
    except SYMPY_ERRORS:
        return False


def lies_within(text: str, low: Fraction, high: Fraction) -> bool:
    """Whether a text stands for a number in [low, high]."""
    value = expression(text)
    try:
        return (
            is_real_number(value)
            and bool(sympy.Rational(low) <= value)
            and bool(value <= sympy.Rational(high))
        )
    except SYMPY_ERRORS:
        return False


Sides = tuple[Sequence[str], Sequence[str]]


def same_relation(gold: Sides, found: Sides) -> bool:
    """Whether two relations, each (sides, signs), mean the same: equations up to a constant factor,
    inequalities up to a positive one."""
    left, right = _differences(*gold), _differences(*found)
    if left is None or right is None:
        return False
    rest = list(right)
    for kind, difference in left:
        twin = next((r for r in rest if r[0] == kind and _proportional(kind, difference, r[1])), None)
        if twin is None:
            return False
        rest.remove(twin)
    return not rest


def _differences(sides: Sequence[str], signs: Sequence[str]) -> list[tuple[str, Expression]] | None:
    """Each relation as a kind and what it compares with 0 (`<`: difference > 0)."""
    parsed = [side for side in map(expression, sides) if isinstance(side, sympy.Expr)]
    if len(parsed) < len(sides):
        return None
    found = []
    for left, sign, right in zip(parsed, signs, parsed[1:], strict=False):
        down = sign in ("<", "\\leq")
        found.append(({">": "<", "\\geq": "\\leq"}.get(sign, sign), right - left if down else left - right))
    return found


def _proportional(kind: str, first: Expression, second: Expression) -> bool:
    try:
        symbols = sorted(first.free_symbols | second.free_symbols, key=str)
        point, _ = next(_points(symbols))
        factor = first.xreplace(point) / second.xreplace(point)
        if not factor.is_number or factor.is_zero or not factor.is_finite:
            return same_expression(first, sympy.S.Zero) and same_expression(second, sympy.S.Zero)
        return (kind in ("=", "\\ne") or bool(factor.is_positive)) and same_expression(first, factor * second)
    except SYMPY_ERRORS:
        return False


def interval(low: str, high: str, left_open: bool, right_open: bool) -> sympy.Set | None:
    """A real interval, None when an end is no number."""
    ends = expression(low), expression(high)
    return sympy.Interval(*ends, left_open, right_open) if all(map(is_real_number, ends)) else None


def points(texts: Sequence[str]) -> sympy.Set | None:
    """A finite set of real numbers, None when a text is no number."""
    values = [expression(text) for text in texts]
    return sympy.FiniteSet(*values) if all(map(is_real_number, values)) else None


def same_set(gold: sympy.Set, found: sympy.Set) -> bool:
    """Whether two sets have the same members, as far as sympy knows."""
    try:
        return bool(gold == found or ((gold - found).is_empty and (found - gold).is_empty))
    except SYMPY_ERRORS:
        return False
