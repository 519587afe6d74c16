"""Compares two answer forms: gold against candidate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
from fractions import Fraction

import sympy

from dash_exp.verifiers.math import symbolic
from dash_exp.verifiers.math.forms import Form, Group, Relation, SetExpr, has_symbols
from dash_exp.verifiers.math.leaves import Leaf, colon_parts, parse_leaf
from dash_exp.verifiers.math.normalise import plain_words, squash
from dash_exp.verifiers.math.units import is_time_of_day, units_clash

_ROUNDED_DIGITS = 3
"""A gold decimal with at least this many significant digits may be a rounded exact number."""
_PRIMES = re.compile(r"(?<=[A-Za-z)}])'+|\\prime(?![A-Za-z])")
_DATE = re.compile(r"\d{4}-(?:0\d|1[0-2])-(?:[0-2]\d|3[01])")


class Match(Enum):
    """How a candidate compares with gold."""

    SAME = "same"
    DIFFERENT = "different"
    UNREADABLE = "unreadable"


def compare(gold: Form, candidate: Form) -> Match:
    """Whether two forms are the same answer."""
    if isinstance(gold, Leaf) and isinstance(candidate, Leaf):
        return compare_leaves(gold, candidate)
    if isinstance(gold, Relation) or isinstance(candidate, Relation):
        return _relations(gold, candidate)
    if isinstance(gold, SetExpr) or isinstance(candidate, SetExpr):
        return _sets(gold, candidate)
    if isinstance(gold, Group) and isinstance(candidate, Group):
        return _groups(gold, candidate)
    group, leaf = (gold, candidate) if isinstance(gold, Group) else (candidate, gold)
    if isinstance(leaf, Leaf) and isinstance(group, Group) and group.opening in ("(", "[", "matrix"):
        return _vectors(group, leaf)
    if isinstance(leaf, Leaf) and "\\emptyset" in leaf.text:
        return Match.DIFFERENT  # the empty set is no element of itself
    if isinstance(group, Group) and group.opening in ("", "{") and len(group.items) == 1:
        return compare(group.items[0], leaf)
    if isinstance(group, Group) and isinstance(leaf, Leaf) and not leaf.name and _assigned_alike(group):
        first = group.items[0]
        return compare(first, leaf) if group is gold else compare(leaf, first)
    return Match.DIFFERENT


def _vectors(group: Group, leaf: Leaf) -> Match:
    """A tuple or column beside `2i - j + 3k`."""
    items = _column(group, leaf).items
    half_open = (group.opening, group.closing) in (("(", "]"), ("[", ")"))
    if half_open or not re.search(r"[jk]", leaf.text):
        return Match.DIFFERENT
    parts = symbolic.components(leaf.text, len(items))
    found = [symbolic.expression(item.text) if isinstance(item, Leaf) else None for item in items]
    same = parts is not None and all(
        value is not None and symbolic.same_expression(value, part)
        for value, part in zip(found, parts, strict=True)
    )
    return Match.SAME if same else Match.DIFFERENT


def _assigned_alike(group: Group) -> bool:
    """Whether a list gives several names one value: `x = 2, y = 2`."""
    leaves = [item for item in group.items if isinstance(item, Leaf)]
    names, texts = {leaf.name for leaf in leaves}, {leaf.text for leaf in leaves}
    return len(names - {""}) == len(group.items) > 1 and len(texts) == 1 and not group.opening


def _all(matches: Sequence[Match]) -> Match:
    if Match.DIFFERENT in matches:
        return Match.DIFFERENT
    return Match.UNREADABLE if Match.UNREADABLE in matches else Match.SAME


# Leaves


def compare_leaves(gold: Leaf, candidate: Leaf) -> Match:
    """Whether two unstructured answers are the same. Of a gold chain (`2/3 = 0.667`) any member
    will do; of a candidate's chain every member has to be right."""
    if gold.name and candidate.name and _marks(gold.name) != _marks(candidate.name):
        return Match.DIFFERENT  # math-verify drops primes
    if _names_differ(gold, candidate):
        return _relations(gold, candidate)
    if units_clash(gold.unit, candidate.unit) or _percent_clash(gold, candidate):
        return Match.DIFFERENT
    if _tautology(gold) != _tautology(candidate) and (gold.name or candidate.name):
        return Match.DIFFERENT
    alternatives = (gold, *gold.chain)
    found = []
    for member in (candidate, *candidate.chain):
        tried = [_leaf(alternative, member) for alternative in alternatives]
        near = member.rounded and any(_rounds_near(other, member) for other in alternatives)
        found.append(Match.SAME if near or Match.SAME in tried else _all(tried))
    return _all(found)


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
    return symbolic.rounds_to(exact.text, *map(_rational, (low, high)))


def _rational(value: Fraction) -> sympy.Rational:
    return sympy.Rational(value.numerator, value.denominator)


def _marks(name: str) -> list[str]:
    """Primes, and the sign of an inverse."""
    return re.findall(r"'|\^-1", name)


def _names_differ(gold: Leaf, candidate: Leaf) -> bool:
    names = gold.name, candidate.name
    return all(0 < len(name) <= 4 for name in names) and names[0] != names[1]


def _leaf(gold: Leaf, candidate: Leaf) -> Match:
    dates = _date(gold.text), _date(candidate.text)
    if dates != (None, None):
        return Match.SAME if dates[0] == dates[1] else Match.DIFFERENT
    if gold.base is not None or candidate.base is not None:
        return _bases(gold, candidate)
    if gold.value is not None and candidate.value is not None:
        return Match.SAME if _same_number(gold, candidate) else Match.DIFFERENT
    if squash(gold.text) == squash(candidate.text):
        return Match.SAME if gold.percent == candidate.percent else Match.DIFFERENT
    if ":" in gold.text or ":" in candidate.text:
        return _ratios(gold, candidate)
    words = plain_words(gold.text), plain_words(candidate.text)
    if words[0] and words[0] == words[1]:
        return Match.SAME
    return _expressions(gold, candidate)


def _expressions(gold: Leaf, candidate: Leaf) -> Match:
    if _PRIMES.findall(gold.text) != _PRIMES.findall(candidate.text):
        return Match.DIFFERENT  # math-verify drops them: `f'` would be `f`
    parsed = symbolic.expression(candidate.text)
    if parsed is None:
        return Match.UNREADABLE
    expected = symbolic.expression(gold.text)
    if expected is None:
        return Match.DIFFERENT
    if symbolic.same_expression(expected, parsed):
        return Match.SAME
    if gold.percent != candidate.percent:
        whole, percent = (parsed, expected) if gold.percent else (expected, parsed)
        if symbolic.same_percentage(whole, percent):
            return Match.SAME
    return Match.SAME if _rounded(gold, candidate) else Match.DIFFERENT


def _same_number(gold: Leaf, candidate: Leaf) -> bool:
    expected, found = gold.value, candidate.value
    if expected is None or found is None:
        return False
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
    return symbolic.rounds_to(candidate.text, *map(_rational, (low, high)))


def _date(text: str) -> tuple[int, ...] | None:
    """Year, month and day of `2023-01-05`, which would else be a difference."""
    return tuple(map(int, text.split("-"))) if _DATE.fullmatch(text) else None


def _bases(gold: Leaf, candidate: Leaf) -> Match:
    """Digits have to agree, and the bases where both are written."""
    digits = [re.sub(r"\\text|[\s{}()]", "", leaf.text).upper() for leaf in (gold, candidate)]
    same_base = gold.base is None or candidate.base is None or gold.base == candidate.base
    return Match.SAME if digits[0] == digits[1] and same_base else Match.DIFFERENT


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
        return Match.SAME if all(a == b for a, b in products) else Match.DIFFERENT
    values = [_ratio_value(leaf, parts) for leaf, parts in ((gold, first), (candidate, second))]
    if looks_like_time or None in values:
        return Match.DIFFERENT
    return Match.SAME if values[0] == values[1] else Match.DIFFERENT


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


# Relations


def _as_relation(form: Form) -> tuple[Sequence[str], Sequence[str]] | None:
    if isinstance(form, Relation):
        return form.sides, form.signs
    if isinstance(form, Leaf) and form.name:
        return (form.name, form.text), ("=",)
    return None


def _relations(gold: Form, candidate: Form) -> Match:
    first, second = _as_relation(gold), _as_relation(candidate)
    if first is not None and second is not None:
        same = symbolic.same_relation(first, second)
        return Match.UNREADABLE if same is None else Match.SAME if same else Match.DIFFERENT
    if isinstance(candidate, Relation) and set(candidate.signs) == {"="}:
        # `a^2 + b^2 = 13` for gold `13`: every side that is a number has to be right
        values = [side for side in candidate.sides if not has_symbols(side)]
        shown = values or [candidate.sides[-1]]
        ends_in_value = not values or candidate.sides[-1] == values[-1] != "0"
        if isinstance(gold, Leaf) and ends_in_value:
            return _all([compare_leaves(gold, parse_leaf(side)) for side in shown])
    return Match.DIFFERENT


# Groups and sets


def _groups(gold: Group, candidate: Group) -> Match:
    if gold.name and candidate.name and gold.name != candidate.name:
        return Match.DIFFERENT
    gold, candidate = _in_order(gold, candidate), _in_order(candidate, gold)
    gold, candidate = _column(gold, candidate), _column(candidate, gold)
    if not _compatible(gold, candidate) or len(gold.items) != len(candidate.items):
        return Match.DIFFERENT
    if gold.unordered and candidate.unordered and not _is_ranking(gold):
        return _matched(gold.items, candidate.items)
    pairs = zip(gold.items, candidate.items, strict=True)
    found = []
    for expected, item in pairs:
        found.append(compare(expected, item))
        if found[-1] is Match.DIFFERENT:
            break
    return _all(found)


def _in_order(group: Group, other: Group) -> Group:
    """`y = 4, x = 3` in the order of the letters, which are neighbours, beside a tuple."""
    names = [item.name if isinstance(item, Leaf) else "" for item in group.items]
    start = min(names, default="")
    run = "".join(chr(ord(start) + step) for step in range(len(names))) if len(start) == 1 else ""
    if group.opening or not other.opening or sorted(names) != list(run):
        return group
    return replace(group, items=tuple(group.items[names.index(name)] for name in run))


def _column(group: Group, other: Form) -> Group:
    """A matrix of one row or column as a tuple, when it is compared with no matrix; `[[1],[2]]` as
    a matrix, when it is compared with one."""
    beside_matrix = isinstance(other, Group) and other.opening == "matrix"
    if beside_matrix and group.opening == "[":
        lists = [row for row in group.items if isinstance(row, Group) and row.opening == "["]
        if len(lists) == len(group.items):
            return Group("matrix", "matrix", tuple(Group("(", ")", row.items) for row in lists))
    if group.opening != "matrix" or beside_matrix:
        return group
    rows = [row for row in group.items if isinstance(row, Group)]
    if len(rows) == 1:
        return rows[0]
    if all(len(row.items) == 1 for row in rows):
        return Group("(", ")", tuple(row.items[0] for row in rows))
    return group


def _compatible(gold: Group, candidate: Group) -> bool:
    kinds = {(gold.opening, gold.closing), (candidate.opening, candidate.closing)}
    if len(kinds) == 1 or (gold.unordered and candidate.unordered):
        return True
    if kinds == {("", ""), ("(", ")")}:
        return True
    return len(gold.items) > 2 and kinds <= {("", ""), ("[", "]"), ("(", ")")}  # no interval


def _is_ranking(gold: Group) -> bool:
    """A bare list of words (not of single letters) is taken to be in order."""
    words = [plain_words(item.text) for item in gold.items if isinstance(item, Leaf)]
    return not gold.opening and len(words) == len(gold.items) and all(len(w) > 3 for w in words)


def _matched(gold: Sequence[Form], candidate: Sequence[Form]) -> Match:
    """Every gold item has its own twin among the candidate's."""
    rest = list(candidate)
    unreadable = False
    for expected in gold:
        found = None
        for index, item in enumerate(rest):
            match = compare(expected, item)
            unreadable = unreadable or match is Match.UNREADABLE
            if match is Match.SAME:
                found = index
                break
        if found is None:
            return Match.UNREADABLE if unreadable else Match.DIFFERENT
        rest.pop(found)
    return Match.SAME


def _sets(gold: Form, candidate: Form) -> Match:
    parts = [form.parts if isinstance(form, SetExpr) else (form,) for form in (gold, candidate)]
    minus = [form.minus if isinstance(form, SetExpr) else () for form in (gold, candidate)]
    same_shape = len(parts[0]) == len(parts[1]) and len(minus[0]) == len(minus[1])
    pieces = _all([_matched(parts[0], parts[1]), _matched(minus[0], minus[1])])
    if same_shape and pieces is Match.SAME:
        return Match.SAME
    sides = []
    for union, without in zip(parts, minus, strict=True):
        sets = [_as_set(form) for form in (*union, *without)]
        if any(item is None for item in sets):
            return Match.DIFFERENT
        sides.append((sets[: len(union)], sets[len(union) :]))
    same = symbolic.same_set(sides[0], sides[1])
    return Match.UNREADABLE if same is None else Match.SAME if same else Match.DIFFERENT


def _as_set(form: Form) -> sympy.Set | None:
    if isinstance(form, Leaf):
        return sympy.S.EmptySet if "\\emptyset" in form.text else symbolic.points([form.text])
    if isinstance(form, SetExpr):
        sets = [_as_set(part) for part in form.parts]
        return None if form.minus or None in sets else sympy.Union(*sets)
    if not isinstance(form, Group) or not all(isinstance(item, Leaf) for item in form.items):
        return None
    texts = [item.text for item in form.items if isinstance(item, Leaf)]
    if form.unordered:
        return symbolic.points(texts)
    if len(texts) != 2 or form.opening not in ("(", "["):
        return None
    return symbolic.interval(texts[0], texts[1], form.opening == "(", form.closing == ")")
