"""Judges answers to maths problems: compares the parsed gold answer with the parsed candidate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache

import sympy

from dash_exp.types import Score
from dash_exp.verifiers.math import algebra
from dash_exp.verifiers.math.extract import MATH_VERIFY, extract
from dash_exp.verifiers.math.library import judge_by_library
from dash_exp.verifiers.math.normalise import normalise, plain_words, squash, trim
from dash_exp.verifiers.math.parse import (
    Form,
    Group,
    Leaf,
    Relation,
    SetExpr,
    has_symbols,
    parse_form,
    parse_leaf,
)
from dash_exp.verifiers.math.quantities import units_clash
from dash_exp.verifiers.types import score

MAX_JUDGED_CHARS = 1_000
"""Longer candidates are only compared as strings: MATH's longest answer has 159 characters."""

_ROUNDED_DIGITS = 3
"""A gold decimal with at least this many significant digits may be a rounded exact number."""
_LETTER = re.compile(r"\(?([A-Z])\)?")
_CHOICE = re.compile(
    r"\s*(?:(?i:option|choice)\s*:?)?\s*(?:\(\s*([A-Z])\s*\)|([A-J])(?=\s*(?:[.):]|$)))[\s.):]*(.*)",
    re.DOTALL,
)
_DOUBTS = re.compile(
    r"(?<![A-Za-z])\(\s*[A-J]\s*\)|^\s*[,;/&]|^\W*[A-J](?:\W+[A-J])*\W*$"  # another choice
    r"|^\W*(?i:or|and|not|are|isn'?t|cannot|but|nor|wrong|incorrect"
    r"|is(?!\s+(?:the\s+)?(?:correct|right|answer|true)\b))\b"
)
_LEADING_CHOICE = re.compile(r"^(?:\\text\{\s*\([A-J]\)\s*\}|\([A-J]\))(?=\s*\S)")
_GROUPED = re.compile(r"\d,\d{3}")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}")
_PRIMES = re.compile(r"(?<=[A-Za-z)}])'+|\\prime(?![A-Za-z])")
_COLON = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_TIME = re.compile(r"\d{1,2}(?:\s*:\s*\d\d){1,2}")
_SYMBOLS = re.compile(r"[\\^_{}+*/=<>-]")
_AMOUNT = re.compile(r"\d+\D*")
"""One number and its unit, in which capitals count: `5 MW`."""


def judge_math(text: str, answer: str, extraction: str) -> Score:
    """The verdict on completion `text` for the gold `answer`; reward 1 for `correct` only.

    `extraction` names how the candidate is found (`EXTRACTORS`, or `math_verify`). Outcomes: `correct`,
    `wrong`, `no_answer` (no candidate), `unparsed` (a candidate that is unreadable and not equal
    as a string). May hang or raise MemoryError on hostile input: call it in a worker.
    """
    if extraction == MATH_VERIFY:
        return judge_by_library(text, answer)
    candidate = extract(text, extraction)
    if candidate is None:
        return score("no_answer", f"nothing found by {extraction}")
    return judge_candidate(candidate, answer)


@lru_cache(maxsize=1024)
def judge_candidate(candidate: str, answer: str) -> Score:
    """The verdict on an extracted answer."""
    if candidate.strip() == answer.strip():
        return score("correct")
    if len(candidate) > MAX_JUDGED_CHARS:
        return score("unparsed", f"{len(candidate)} characters are no answer")
    gold, found = normalise(answer), normalise(candidate)
    spellings = _OR.split(candidate)
    if _same(gold, found) or (
        1 < len(spellings) <= 4 and all(_same(gold, normalise(spelling)) for spelling in spellings)
    ):
        return score("correct")
    shown = f"found {candidate[:80]!r}, expected {answer[:80]!r}"
    return score("wrong" if _readable(parse_form(found)) else "unparsed", shown)


def _same(gold: str, found: str) -> bool:
    """Whether two normalised answers are the same."""
    if squash(gold) == squash(found):
        return True
    if letter := _LETTER.fullmatch(gold):
        choice = _CHOICE.fullmatch(re.sub(r"\\text\b|[{}]", " ", found))
        if choice:
            return letter[1] in (choice[1], choice[2]) and not _DOUBTS.search(choice[3])
    else:
        found = trim(_LEADING_CHOICE.sub("", found))
    words = plain_words(gold)
    if words and words == plain_words(found) and not _AMOUNT.fullmatch(words):
        return True
    if compare(parse_form(gold), parse_form(found)):
        return True
    # `1,234` is one number or a list of two: any reading of both that agrees will do. The form cannot tell:
    # of the golds written so in MATH, 8 are numbers and 1 is a list
    readings = ((False, False), (True, False), (False, True)) if _GROUPED.search(gold + " " + found) else ()
    return any(compare(parse_form(gold, joined[0]), parse_form(found, joined[1])) for joined in readings)


def _readable(form: Form) -> bool:
    """Whether every part is a number, a formula that can be parsed, or words."""
    if isinstance(form, Leaf):
        known = form.value is not None or form.base is not None or plain_words(form.text)
        return bool(known) or not _SYMBOLS.search(form.text) or algebra.expression(form.text) is not None
    if isinstance(form, Relation):
        return True
    return all(map(_readable, form.items if isinstance(form, Group) else (*form.parts, *form.minus)))


# Forms


def compare(gold: Form, candidate: Form) -> bool:
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
    if not isinstance(leaf, Leaf) or not isinstance(group, Group) or "\\emptyset" in leaf.text:
        return False  # the empty set is no element of itself
    if group.unordered:
        return len(group.items) == 1 and compare(group.items[0], leaf)
    items = [item.text for item in _column(group, leaf).items if isinstance(item, Leaf)]
    half_open = (group.opening, group.closing) in (("(", "]"), ("[", ")"))
    if half_open or not 2 <= len(items) <= 3 or not re.search(r"(?<![A-Za-z\\])[jk](?![A-Za-z])", leaf.text):
        return False
    terms = (f"({item}) \\cdot {unit}" for item, unit in zip(items, "ijk", strict=False))
    return compare_leaves(Leaf(" + ".join(terms)), leaf)  # a tuple or column beside `2i - j + 3k`


def _relations(gold: Form, candidate: Form) -> bool:
    sides = [
        (form.sides, form.signs) if isinstance(form, Relation) else ((form.name, form.text), ("=",))
        for form in (gold, candidate)
        if isinstance(form, Relation) or (isinstance(form, Leaf) and form.name)
    ]
    if len(sides) == 2:
        return algebra.same_relation(*sides)
    if isinstance(candidate, Relation) and set(candidate.signs) == {"="} and isinstance(gold, Leaf):
        # `a^2 + b^2 = 13` for gold `13`: every side that is a number has to be right
        values = [side for side in candidate.sides if not has_symbols(side)]
        if not values or candidate.sides[-1] == values[-1] != "0":
            return all(compare_leaves(gold, parse_leaf(side)) for side in values or candidate.sides[-1:])
    return False


def _groups(gold: Group, candidate: Group) -> bool:
    if gold.name and candidate.name and gold.name != candidate.name:
        return False
    gold, candidate = _in_order(gold, candidate), _in_order(candidate, gold)
    gold, candidate = _column(gold, candidate), _column(candidate, gold)
    if not _compatible(gold, candidate) or len(gold.items) != len(candidate.items):
        return False
    if gold.unordered and candidate.unordered and not _is_ranking(gold):
        return _matched(gold.items, candidate.items)
    return all(map(compare, gold.items, candidate.items))


def _in_order(group: Group, other: Group) -> Group:
    """`y = 4, x = 3` in the order of the letters, which are neighbours, beside a tuple."""
    names = [item.name if isinstance(item, Leaf) else "" for item in group.items]
    start = min(names, default="")
    run = "".join(chr(ord(start) + step) for step in range(len(names))) if len(start) == 1 else ""
    if group.opening or not other.opening or sorted(names) != list(run):
        return group
    return replace(group, items=tuple(group.items[names.index(name)] for name in run))


def _column(group: Group, other: Form) -> Group:
    """A matrix of one row or column as a tuple, when it is compared with no matrix."""
    rows = [row for row in group.items if isinstance(row, Group)]
    if group.opening != "matrix" or (isinstance(other, Group) and other.opening == "matrix"):
        return group
    single = all(len(row.items) == 1 for row in rows)
    return (
        rows[0] if len(rows) == 1 else Group("(", ")", tuple(r.items[0] for r in rows)) if single else group
    )


def _compatible(gold: Group, candidate: Group) -> bool:
    kinds = {(gold.opening, gold.closing), (candidate.opening, candidate.closing)}
    if len(kinds) == 1 or (gold.unordered and candidate.unordered) or kinds == {("", ""), ("(", ")")}:
        return True
    return len(gold.items) > 2 and kinds <= {("", ""), ("[", "]"), ("(", ")")}  # no interval


def _is_ranking(gold: Group) -> bool:
    """A bare list of words (not of single letters) is taken to be in order."""
    return not gold.opening and all(isinstance(i, Leaf) and len(plain_words(i.text)) > 3 for i in gold.items)


def _matched(gold: Sequence[Form], candidate: Sequence[Form]) -> bool:
    """Every gold item has its own twin among the candidate's, and none is left."""
    rest = list(candidate)
    for expected in gold:
        twin = next((at for at, item in enumerate(rest) if compare(expected, item)), None)
        if twin is None:
            return False
        del rest[twin]
    return not rest


def _sets(gold: Form, candidate: Form) -> bool:
    if (
        isinstance(gold, SetExpr)
        and isinstance(candidate, SetExpr)
        and _matched(gold.parts, candidate.parts)
        and _matched(gold.minus, candidate.minus)
    ):
        return True
    first, second = _as_set(gold), _as_set(candidate)
    return first is not None and second is not None and algebra.same_set(first, second)


def _as_set(form: Form) -> sympy.Set | None:
    if isinstance(form, Leaf):
        return sympy.S.EmptySet if "\\emptyset" in form.text else algebra.points([form.text])
    if isinstance(form, SetExpr):
        parts, minus = ([_as_set(part) for part in some] for some in (form.parts, form.minus))
        if None in parts or None in minus:
            return None
        return sympy.Complement(sympy.Union(*parts), sympy.Union(*minus)) if minus else sympy.Union(*parts)
    if not isinstance(form, Group) or not all(isinstance(item, Leaf) for item in form.items):
        return None
    texts = [item.text for item in form.items if isinstance(item, Leaf)]
    if form.unordered:
        return algebra.points(texts)
    if len(texts) != 2 or form.opening not in ("(", "["):
        return None
    return algebra.interval(texts[0], texts[1], form.opening == "(", form.closing == ")")


# Leaves


def compare_leaves(gold: Leaf, candidate: Leaf) -> bool:
    """Whether two unstructured answers are the same. Of a gold chain (`2/3 = 0.667`) any member
    will do; of a candidate's chain every member has to be right."""
    names = gold.name, candidate.name
    if all(names) and re.findall(r"'|\^-1", names[0]) != re.findall(r"'|\^-1", names[1]):
        return False  # the parser drops primes
    if all(0 < len(name) <= 4 for name in names) and names[0] != names[1]:
        return algebra.same_relation(*(((leaf.name, leaf.text), ("=",)) for leaf in (gold, candidate)))
    percent_clash = (gold.percent and candidate.unit) or (candidate.percent and gold.unit)
    if units_clash(gold.unit, candidate.unit) or percent_clash:
        return False
    return all(
        any(
            _leaf(expected, member) or (member.rounded and _shows(expected, member))
            for expected in (gold, *gold.chain)
        )
        for member in (candidate, *candidate.chain)
    )


def _shows(exact: Leaf, shown: Leaf) -> bool:
    """Whether `shown`, written after an approximation sign, is `exact` cut or rounded."""
    if shown.value is None or shown.percent != exact.percent:
        return False
    return _lies_near(exact, shown.value, Fraction(999, 1000 * 10 ** (shown.decimals or 0)))


def _lies_near(leaf: Leaf, value: Fraction, distance: Fraction) -> bool:
    if leaf.value is not None:
        return abs(leaf.value - value) <= distance
    return algebra.lies_within(leaf.text, value - distance, value + distance)


def _rounded(gold: Leaf, candidate: Leaf) -> bool:
    """Whether gold is a decimal that the exact candidate rounds to. A candidate that is itself a
    decimal is no exact number, and a gold of one or two digits leaves too much room."""
    if gold.value is None or gold.decimals is None or "." in candidate.text:
        return False
    if len(re.sub(r"\D", "", gold.text).lstrip("0")) < _ROUNDED_DIGITS:
        return False
    if candidate.value is not None and candidate.value.denominator == 1:
        return False
    return _lies_near(candidate, gold.value, Fraction(1, 2 * 10**gold.decimals))


def _leaf(gold: Leaf, candidate: Leaf) -> bool:
    if gold.base is not None or candidate.base is not None:
        digits = [re.sub(r"\\text|[\s{}()]", "", leaf.text).upper() for leaf in (gold, candidate)]
        return digits[0] == digits[1] and (None in (gold.base, candidate.base) or gold.base == candidate.base)
    if gold.value is not None and candidate.value is not None:
        expected, found = gold.value, candidate.value
        if expected == found or gold.percent == candidate.percent:
            return expected == found or _rounded(gold, candidate)
        return expected / 100 == found if gold.percent else expected == found / 100
    if squash(gold.text) == squash(candidate.text):
        return gold.percent == candidate.percent
    if ":" in gold.text or ":" in candidate.text:
        return _ratios(gold, candidate)
    words = plain_words(gold.text)
    return bool(words and words == plain_words(candidate.text)) or _expressions(gold, candidate)


def _expressions(gold: Leaf, candidate: Leaf) -> bool:
    if _PRIMES.findall(gold.text) != _PRIMES.findall(candidate.text):
        return False  # the parser drops them: `f'` would be `f`
    found, expected = algebra.expression(candidate.text), algebra.expression(gold.text)
    if found is None or expected is None:
        return False
    if algebra.same_expression(expected, found) or _rounded(gold, candidate):
        return True
    total, percent = (found, expected) if gold.percent else (expected, found)
    different = gold.percent != candidate.percent and isinstance(percent, sympy.Expr)
    return different and algebra.same_expression(total, percent / 100)


def _ratios(gold: Leaf, candidate: Leaf) -> bool:
    """`3:5` as a ratio or a time. A time (`9:24`) is compared part by part only."""
    first, second = _parts(gold), _parts(candidate)
    if first is None or second is None:
        return False
    if len(first) == 1 or len(second) == 1:  # 9 a.m. is 9:00, and 3/5 is 3:5
        missing = Fraction(not any(name in ("am", "pm") for name, _ in (*gold.unit, *candidate.unit)))
        first, second = (*first, missing)[:2], (*second, missing)[:2]
    if first == second or _clock(gold, first) == _clock(candidate, second):
        return True
    if _TIME.fullmatch(gold.text) or len(first) != len(second):
        return False
    return all(a * second[0] == b * first[0] for a, b in zip(first, second, strict=True))


def _parts(leaf: Leaf) -> tuple[Fraction, ...] | None:
    """The numbers of a ratio or a time such as `3:5` or `4:51:06`, or one plain number."""
    if _COLON.fullmatch(leaf.text):
        return tuple(Fraction(part.strip()) for part in leaf.text.split(":"))
    return None if leaf.value is None else (leaf.value,)


def _clock(leaf: Leaf, parts: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """`5:05 p.m.` as 17:05."""
    return (parts[0] + 12, *parts[1:]) if leaf.unit == (("pm", 1),) and parts[0] < 12 else parts
