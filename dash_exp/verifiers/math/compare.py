"""Judges answers to maths problems: compares the parsed gold answer with the parsed candidate."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import sympy

from dash_exp.types import Score
from dash_exp.verifiers.math import leaves
from dash_exp.verifiers.math.extract import extract
from dash_exp.verifiers.math.leaves import Match, all_of, compare_leaves
from dash_exp.verifiers.math.normalise import normalise, plain_units, plain_words, squash, trim
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
from dash_exp.verifiers.types import score

MAX_JUDGED_CHARS = 1_000
"""Longer candidates are only compared as strings: MATH's longest answer has 159 characters."""

_CHOICE = re.compile(r"^\s*(?:\\text\{\s*\(([A-Z])\)\s*\}|\(([A-Z])\))\s*(\S.*)$", re.DOTALL)
_DOTTED_CHOICE = re.compile(r"^(?:\\text\{\s*)?([A-J])\s*[.):]\s*\}?\s*([^\s}].*)$", re.DOTALL)
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
_OPTION = re.compile(r"^\s*(?:\\text\{\s*)?(?:option|choice)\s*\}?:?\s*(?=\(?[A-J]\b)", re.IGNORECASE)
_AMOUNT = re.compile(r"\d+\D*")
"""One number and its unit, in which capitals count: `5 MW`."""
_LETTERS = re.compile(r"[A-H]{2,8}")
_QUALIFIED = re.compile(
    r"(?<![A-Za-z\\])(?:not|wrong|incorrect|or (?:more|less|fewer|greater|higher|lower|above|below)"
    r"|at (?:least|most)|(?:more|less|fewer|greater|other) than)(?![A-Za-z])",
    re.IGNORECASE,
)
_CHOICE_ONLY = re.compile(r"^\(?([A-Z])\)?$")
_GROUPED = re.compile(r"\d,\d{3}")


def judge_math(text: str, answer: str, extraction: str) -> Score:
    """The verdict on completion `text` for the gold `answer`; reward 1 for `correct` only.

    `extraction` names how the candidate is found (`EXTRACTORS`). Outcomes: `correct`,
    `wrong`, `no_answer` (no candidate), `unparsed` (a candidate that is unreadable and not equal
    as a string). May hang or raise MemoryError on hostile input: call it in a worker.
    """
    candidate = extract(text, extraction)
    if candidate is None:
        return score("no_answer", f"nothing found by {extraction}")
    return judge_candidate(candidate, answer)


def judge_candidate(candidate: str, answer: str) -> Score:
    """The verdict on an extracted answer."""
    if candidate.strip() == answer.strip():
        return score("correct")
    if len(candidate) > MAX_JUDGED_CHARS:
        return score("unparsed", f"{len(candidate)} characters are no answer")
    match = _judge(candidate, answer)
    if match is Match.SAME and _qualified_otherwise(candidate, answer):
        match = Match.DIFFERENT
    if match is Match.SAME:
        return score("correct")
    shown = f"found {candidate[:80]!r}, expected {answer[:80]!r}"
    return score("wrong" if match is Match.DIFFERENT else "unparsed", shown)


def _judge(candidate: str, answer: str) -> Match:
    gold, found = normalise(answer), normalise(candidate)
    if squash(gold) == squash(found):
        return Match.SAME
    choice, expected = _CHOICE.match(found), _CHOICE_ONLY.match(gold)
    if expected:
        found = _OPTION.sub("", found)
        chosen = _chosen(found)
        if chosen is not None:
            return Match.of(chosen == expected.group(1))
    if choice:
        found = trim(choice.group(3))
    words = [plain_units(plain_words(text)) for text in (gold, found)]
    if words[0] and words[0] == words[1] and not _AMOUNT.fullmatch(words[0]):
        return Match.SAME
    if _same_letters(gold, found) or _same_letters(found, gold):
        return Match.SAME
    return _readings(gold, found)


def _chosen(found: str) -> str | None:
    """The letter of `(B) 12` or `B. 12`; empty when more letters or doubts follow it, as in a list
    of guesses; None when there is no letter in front of something."""
    choice = _CHOICE.match(found) or _DOTTED_CHOICE.match(found)
    if choice is None:
        return None
    *letters, rest = choice.groups()
    return "" if _MORE_CHOICES.search(rest) else next(letter for letter in letters if letter)


def _same_letters(joined: str, listed: str) -> bool:
    """Whether `ABD` are the choices that `A, B, D` lists."""
    letters = re.sub(r"\\text|[\s,{}()]", "", listed)
    return (
        bool(_LETTERS.fullmatch(joined) and "," in listed)
        and len(set(joined)) == len(joined)
        and sorted(joined) == sorted(letters)
    )


def _qualified_otherwise(candidate: str, answer: str) -> bool:
    """Whether words that make another answer of a number, such as `or more`, stand in one only. The
    text after the letter of a choice may hold any."""
    gold, found = normalise(answer), normalise(candidate)
    if _CHOICE_ONLY.match(gold) or squash(gold) == squash(found):
        return False
    words = [{word.lower() for word in _QUALIFIED.findall(text)} for text in (answer, candidate)]
    return words[0] != words[1]


def _readings(gold: str, found: str) -> Match:
    """`1,234` is one number or a list of two: any reading of both that agrees will do.

    The form cannot tell. Of the golds written so in MATH, 8 are numbers and 1 is a list, and 39 of
    its golds have six digits where none is a list of numbers of three.
    """
    first = compare(parse_form(gold), parse_form(found))
    if first is Match.SAME or not (_GROUPED.search(gold) or _GROUPED.search(found)):
        return first
    for join_gold, join_found in ((False, False), (True, False), (False, True)):
        match = compare(parse_form(gold, join_gold), parse_form(found, join_found))
        if match is Match.SAME:
            return match
    return first


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
    parts = leaves.components(leaf.text, len(items))
    found = [leaves.expression(item.text) if isinstance(item, Leaf) else None for item in items]
    same = parts is not None and all(
        value is not None and leaves.same_expression(value, part)
        for value, part in zip(found, parts, strict=True)
    )
    return Match.of(same)


def _assigned_alike(group: Group) -> bool:
    """Whether a list gives several names one value: `x = 2, y = 2`."""
    items = [item for item in group.items if isinstance(item, Leaf)]
    names, texts = {leaf.name for leaf in items}, {leaf.text for leaf in items}
    return len(names - {""}) == len(group.items) > 1 and len(texts) == 1 and not group.opening


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
        return Match.of(leaves.same_relation(first, second))
    if isinstance(candidate, Relation) and set(candidate.signs) == {"="}:
        # `a^2 + b^2 = 13` for gold `13`: every side that is a number has to be right
        values = [side for side in candidate.sides if not has_symbols(side)]
        shown = values or [candidate.sides[-1]]
        ends_in_value = not values or candidate.sides[-1] == values[-1] != "0"
        if isinstance(gold, Leaf) and ends_in_value:
            return all_of([compare_leaves(gold, parse_leaf(side)) for side in shown])
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
        for index, item in enumerate(rest):
            match = compare(expected, item)
            unreadable = unreadable or match is Match.UNREADABLE
            if match is Match.SAME:
                del rest[index]
                break
        else:
            return Match.UNREADABLE if unreadable else Match.DIFFERENT
    return Match.SAME


def _sets(gold: Form, candidate: Form) -> Match:
    parts = [form.parts if isinstance(form, SetExpr) else (form,) for form in (gold, candidate)]
    minus = [form.minus if isinstance(form, SetExpr) else () for form in (gold, candidate)]
    same_shape = len(parts[0]) == len(parts[1]) and len(minus[0]) == len(minus[1])
    pieces = all_of([_matched(parts[0], parts[1]), _matched(minus[0], minus[1])])
    if same_shape and pieces is Match.SAME:
        return Match.SAME
    sides = []
    for union, without in zip(parts, minus, strict=True):
        sets = [_as_set(form) for form in (*union, *without)]
        if any(item is None for item in sets):
            return Match.DIFFERENT
        sides.append((sets[: len(union)], sets[len(union) :]))
    return Match.of(leaves.same_set(sides[0], sides[1]))


def _as_set(form: Form) -> sympy.Set | None:
    if isinstance(form, Leaf):
        return sympy.S.EmptySet if "\\emptyset" in form.text else leaves.points([form.text])
    if isinstance(form, SetExpr):
        sets = [_as_set(part) for part in form.parts]
        return None if form.minus or None in sets else sympy.Union(*sets)
    if not isinstance(form, Group) or not all(isinstance(item, Leaf) for item in form.items):
        return None
    texts = [item.text for item in form.items if isinstance(item, Leaf)]
    if form.unordered:
        return leaves.points(texts)
    if len(texts) != 2 or form.opening not in ("(", "["):
        return None
    return leaves.interval(texts[0], texts[1], form.opening == "(", form.closing == ")")
