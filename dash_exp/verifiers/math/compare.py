"""Judges answers to maths problems: compares the parsed gold answer with the parsed candidate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from enum import Enum
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
from dash_exp.verifiers.math.quantities import plain_units, units_clash
from dash_exp.verifiers.types import score

MAX_JUDGED_CHARS = 1_000
"""Longer candidates are only compared as strings: MATH's longest answer has 159 characters."""

_ROUNDED_DIGITS = 3
"""A gold decimal with at least this many significant digits may be a rounded exact number."""
_CHOICE = re.compile(
    r"^\s*(?:(?i:\\text\{\s*(?:option|choice)\s*\}:?\s*|(?:\\text\{\s*)?(?:option|choice)\s*:?\s*))?"
    r"(?:\\text\{\s*\(([A-Z])\)\s*\}|\(([A-Z])\)|(?:\\text\{\s*)?([A-J])\s*[.):])\s*\}?\s*([^\s}].*)$",
    re.DOTALL,
)
_OPTION = re.compile(r"^\s*(?:\\text\{\s*)?(?:option|choice)\s*\}?:?\s*(?=\(?[A-J]\b)", re.IGNORECASE)
_DOUBTS = (
    r"[,;/&]"
    r"|(?i:(?:or|and|not|are|isn'?t|cannot|but|nor|wrong|incorrect)\b)"
    r"|(?i:is\b(?!\s+(?:the\s+)?(?:correct|right|answer|true)\b))"
)
_MORE_CHOICES = re.compile(
    r"(?<![A-Za-z])\(\s*[A-J]\s*\)"  # another choice
    rf"|^[\s{{}}\\]*(?:text\s*\{{\s*)?(?:{_DOUBTS})"
    r"|^\W*(?:text\W+)?[A-J](?:\W+(?:text\W+)?[A-J])*\W*$"  # `B C`, `B, C`
)
_CHOICE_ONLY = re.compile(r"^\(?([A-Z])\)?$")
_AMOUNT = re.compile(r"\d+\D*")
"""One number and its unit, in which capitals count: `5 MW`."""
_LETTERS = re.compile(r"[A-H]{2,8}")
_GROUPED = re.compile(r"\d,\d{3}")
_OR = re.compile(r"\\text\s*\{\s*or\s*\}")
_PRIMES = re.compile(r"(?<=[A-Za-z)}])'+|\\prime(?![A-Za-z])")
_DATE = re.compile(r"\d{4}-(?:0\d|1[0-2])-(?:[0-2]\d|3[01])")
_COLON = re.compile(r"\d+(?:\.\d+)?(?:\s*:\s*\d+(?:\.\d+)?)+")
_TIME = re.compile(r"\d{1,2}(?:\s*:\s*\d\d){1,2}")


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
    match = _judge(candidate, answer)
    spellings = _OR.split(candidate)
    if match is not Match.SAME and 1 < len(spellings) <= 4:  # one answer, written in several ways
        match = all_of([_judge(spelling, answer) for spelling in spellings])
    if match is Match.SAME:
        return score("correct")
    shown = f"found {candidate[:80]!r}, expected {answer[:80]!r}"
    return score("wrong" if match is Match.DIFFERENT else "unparsed", shown)


def _judge(candidate: str, answer: str) -> Match:
    gold, found = normalise(answer), normalise(candidate)
    if squash(gold) == squash(found):
        return Match.SAME
    choice, expected = _CHOICE.match(found), _CHOICE_ONLY.match(gold)
    if expected and choice:
        *letters, rest = choice.groups()
        letter = "" if _MORE_CHOICES.search(rest) else next(letter for letter in letters if letter)
        return Match.of(letter == expected.group(1))
    if expected:
        found = _OPTION.sub("", found)
    elif choice and not choice.group(3):
        found = trim(choice.group(4))
    words = [plain_units(plain_words(text)) for text in (gold, found)]
    if words[0] and words[0] == words[1] and not _AMOUNT.fullmatch(words[0]):
        return Match.SAME
    if _same_letters(gold, found) or _same_letters(found, gold):
        return Match.SAME
    first = compare(parse_form(gold), parse_form(found))
    if first is Match.SAME or not (_GROUPED.search(gold) or _GROUPED.search(found)):
        return first
    # `1,234` is one number or a list of two: any reading of both that agrees will do. The form cannot tell:
    # of the golds written so in MATH, 8 are numbers and 1 is a list
    for join_gold, join_found in ((False, False), (True, False), (False, True)):
        if compare(parse_form(gold, join_gold), parse_form(found, join_found)) is Match.SAME:
            return Match.SAME
    return first


def _same_letters(joined: str, listed: str) -> bool:
    """Whether `ABD` are the choices that `A, B, D` lists."""
    letters = re.sub(r"\\text|[\s,{}()]", "", listed)
    return (
        bool(_LETTERS.fullmatch(joined) and "," in listed)
        and len(set(joined)) == len(joined)
        and sorted(joined) == sorted(letters)
    )


# Forms


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
    if not isinstance(leaf, Leaf) or not isinstance(group, Group) or "\\emptyset" in leaf.text:
        return Match.DIFFERENT  # the empty set is no element of itself
    if group.unordered:
        return compare(group.items[0], leaf) if len(group.items) == 1 else Match.DIFFERENT
    items = [item.text for item in _column(group, leaf).items if isinstance(item, Leaf)]
    half_open = (group.opening, group.closing) in (("(", "]"), ("[", ")"))
    if half_open or not 2 <= len(items) <= 3 or not re.search(r"(?<![A-Za-z\\])[jk](?![A-Za-z])", leaf.text):
        return Match.DIFFERENT
    terms = (f"({item}) \\cdot {unit}" for item, unit in zip(items, "ijk", strict=False))
    return compare_leaves(Leaf(" + ".join(terms)), leaf)  # a tuple or column beside `2i - j + 3k`


def _as_relation(form: Form) -> algebra.Sides | None:
    if isinstance(form, Relation):
        return form.sides, form.signs
    if isinstance(form, Leaf) and form.name:
        return (form.name, form.text), ("=",)
    return None


def _relations(gold: Form, candidate: Form) -> Match:
    first, second = _as_relation(gold), _as_relation(candidate)
    if first is not None and second is not None:
        return Match.of(algebra.same_relation(first, second))
    if isinstance(candidate, Relation) and set(candidate.signs) == {"="} and isinstance(gold, Leaf):
        # `a^2 + b^2 = 13` for gold `13`: every side that is a number has to be right
        values = [side for side in candidate.sides if not has_symbols(side)]
        if not values or candidate.sides[-1] == values[-1] != "0":
            shown = values or [candidate.sides[-1]]
            return all_of([compare_leaves(gold, parse_leaf(side)) for side in shown])
    return Match.DIFFERENT


def _groups(gold: Group, candidate: Group) -> Match:
    if gold.name and candidate.name and gold.name != candidate.name:
        return Match.DIFFERENT
    gold, candidate = _in_order(gold, candidate), _in_order(candidate, gold)
    gold, candidate = _column(gold, candidate), _column(candidate, gold)
    if not _compatible(gold, candidate) or len(gold.items) != len(candidate.items):
        return Match.DIFFERENT
    if gold.unordered and candidate.unordered and not _is_ranking(gold):
        return _matched(gold.items, candidate.items)
    found = []
    for expected, item in zip(gold.items, candidate.items, strict=True):
        found.append(compare(expected, item))
        if found[-1] is Match.DIFFERENT:
            break
    return all_of(found)


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
    rows = [row for row in group.items if isinstance(row, Group)]
    if isinstance(other, Group) and other.opening == "matrix":
        nested = group.opening == "[" and [row.opening for row in rows] == ["["] * len(group.items)
        return (
            Group("matrix", "matrix", tuple(Group("(", ")", row.items) for row in rows)) if nested else group
        )
    if group.opening != "matrix":
        return group
    if len(rows) == 1:
        return rows[0]
    single = all(len(row.items) == 1 for row in rows)
    return Group("(", ")", tuple(row.items[0] for row in rows)) if single else group


def _compatible(gold: Group, candidate: Group) -> bool:
    kinds = {(gold.opening, gold.closing), (candidate.opening, candidate.closing)}
    if len(kinds) == 1 or (gold.unordered and candidate.unordered) or kinds == {("", ""), ("(", ")")}:
        return True
    return len(gold.items) > 2 and kinds <= {("", ""), ("[", "]"), ("(", ")")}  # no interval


def _is_ranking(gold: Group) -> bool:
    """A bare list of words (not of single letters) is taken to be in order."""
    words = [plain_words(item.text) for item in gold.items if isinstance(item, Leaf)]
    return not gold.opening and len(words) == len(gold.items) and all(len(w) > 3 for w in words)


def _matched(gold: Sequence[Form], candidate: Sequence[Form]) -> Match:
    """Every gold item has its own twin among the candidate's."""
    rest = list(candidate)
    unreadable = len(gold) != len(rest)
    for expected in gold:
        matches = [compare(expected, item) for item in rest]
        unreadable = unreadable or Match.UNREADABLE in matches
        if Match.SAME not in matches:
            return Match.UNREADABLE if unreadable else Match.DIFFERENT
        del rest[matches.index(Match.SAME)]
    return Match.DIFFERENT if rest else Match.SAME


def _sets(gold: Form, candidate: Form) -> Match:
    if isinstance(gold, SetExpr) and isinstance(candidate, SetExpr):
        pieces = [_matched(gold.parts, candidate.parts), _matched(gold.minus, candidate.minus)]
        if all_of(pieces) is Match.SAME:
            return Match.SAME
    sets = _as_set(gold), _as_set(candidate)
    return Match.DIFFERENT if sets[0] is None or sets[1] is None else Match.of(algebra.same_set(*sets))


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


def compare_leaves(gold: Leaf, candidate: Leaf) -> Match:
    """Whether two unstructured answers are the same. Of a gold chain (`2/3 = 0.667`) any member
    will do; of a candidate's chain every member has to be right."""
    names = gold.name, candidate.name
    if all(names) and re.findall(r"'|\^-1", names[0]) != re.findall(r"'|\^-1", names[1]):
        return Match.DIFFERENT  # the parser drops primes
    if all(0 < len(name) <= 4 for name in names) and names[0] != names[1]:
        return Match.of(
            algebra.same_relation(*(((leaf.name, leaf.text), ("=",)) for leaf in (gold, candidate)))
        )
    percent_clash = (gold.percent and candidate.unit) or (candidate.percent and gold.unit)
    if units_clash(gold.unit, candidate.unit) or percent_clash:
        return Match.DIFFERENT
    if any(names) and _tautology(gold) != _tautology(candidate):
        return Match.DIFFERENT
    alternatives = (gold, *gold.chain)
    found = []
    for member in (candidate, *candidate.chain):
        tried = [_leaf(alternative, member) for alternative in alternatives]
        near = member.rounded and any(_shows(other, member) for other in alternatives)
        found.append(Match.SAME if near or Match.SAME in tried else all_of(tried))
    return all_of(found)


def _tautology(leaf: Leaf) -> bool:
    """Whether the leaf was written as `1 = 1`, which gives no name a value."""
    return bool(leaf.chain) and not leaf.name and all(leaf.text == other.text for other in leaf.chain)


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


def _leaf(gold: Leaf, candidate: Leaf) -> Match:
    dates = [_DATE.fullmatch(leaf.text) and leaf.text for leaf in (gold, candidate)]
    if any(dates):  # else they would be differences
        return Match.of(dates[0] == dates[1])
    if gold.base is not None or candidate.base is not None:
        digits = [re.sub(r"\\text|[\s{}()]", "", leaf.text).upper() for leaf in (gold, candidate)]
        same_base = gold.base is None or candidate.base is None or gold.base == candidate.base
        return Match.of(digits[0] == digits[1] and same_base)
    if gold.value is not None and candidate.value is not None:
        return Match.of(_same_number(gold, candidate))
    if squash(gold.text) == squash(candidate.text):
        return Match.of(gold.percent == candidate.percent)
    if ":" in gold.text or ":" in candidate.text:
        return _ratios(gold, candidate)
    words = plain_words(gold.text), plain_words(candidate.text)
    return Match.SAME if words[0] and words[0] == words[1] else _expressions(gold, candidate)


def _same_number(gold: Leaf, candidate: Leaf) -> bool:
    expected, found = gold.value, candidate.value
    assert expected is not None and found is not None
    if expected == found:
        return True
    if gold.percent != candidate.percent:
        return expected / 100 == found if gold.percent else expected == found / 100
    return _rounded(gold, candidate)


def _expressions(gold: Leaf, candidate: Leaf) -> Match:
    if _PRIMES.findall(gold.text) != _PRIMES.findall(candidate.text):
        return Match.DIFFERENT  # the parser drops them: `f'` would be `f`
    found, expected = algebra.expression(candidate.text), algebra.expression(gold.text)
    if found is None or expected is None:
        return Match.UNREADABLE if found is None else Match.DIFFERENT
    if algebra.same_expression(expected, found):
        return Match.SAME
    if gold.percent != candidate.percent:
        total, percent = (found, expected) if gold.percent else (expected, found)
        if isinstance(percent, sympy.Expr) and algebra.same_expression(total, percent / 100):
            return Match.SAME
    return Match.of(_rounded(gold, candidate))


def _ratios(gold: Leaf, candidate: Leaf) -> Match:
    """`3:5` as a ratio or a time. A time (`9:24`) is compared part by part only."""
    first, second = _parts(gold), _parts(candidate)
    if first is None or second is None:
        return Match.UNREADABLE if first is second is None else Match.DIFFERENT
    if len(first) == 1 or len(second) == 1:
        if any(name in ("am", "pm") for name, _ in (*gold.unit, *candidate.unit)):  # 9 a.m. is 9:00
            first, second = (*first, Fraction(0))[:2], (*second, Fraction(0))[:2]
        else:
            first, second = (*first, Fraction(1))[:2], (*second, Fraction(1))[:2]
    if first == second or _clock(gold, first) == _clock(candidate, second):
        return Match.SAME
    if _TIME.fullmatch(gold.text) or len(first) != len(second):
        return Match.DIFFERENT
    return Match.of(all(a * second[0] == b * first[0] for a, b in zip(first, second, strict=True)))


def _parts(leaf: Leaf) -> tuple[Fraction, ...] | None:
    """The numbers of a ratio or a time such as `3:5` or `4:51:06`, or one plain number."""
    if _COLON.fullmatch(leaf.text):
        return tuple(Fraction(part.strip()) for part in leaf.text.split(":"))
    return None if leaf.value is None else (leaf.value,)


def _clock(leaf: Leaf, parts: tuple[Fraction, ...]) -> tuple[Fraction, ...]:
    """`5:05 p.m.` as 17:05."""
    return (parts[0] + 12, *parts[1:]) if leaf.unit == (("pm", 1),) and parts[0] < 12 else parts
