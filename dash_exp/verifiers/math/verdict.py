"""Judges answers to maths problems, with math-verify inside. Imports sympy: worker side only."""

from __future__ import annotations

import re

from dash_exp.types import Score
from dash_exp.verifiers.math.compare import Match, compare
from dash_exp.verifiers.math.extraction import extract
from dash_exp.verifiers.math.forms import parse_form
from dash_exp.verifiers.math.normalise import normalise, plain_words, squash, trim
from dash_exp.verifiers.math.units import plain_units
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

    `extraction` names how the candidate is found (`extraction.EXTRACTIONS`). Outcomes: `correct`,
    `wrong`, `no_answer` (no candidate), `unparsed` (a candidate that is unreadable and not equal
    as a string). May run for ever or raise MemoryError on hostile input: call it in a worker.
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
    shown = f"found {candidate[:80]!r}, expected {answer[:80]!r}"
    if match is Match.SAME:
        return score("correct")
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
            return Match.SAME if chosen == expected.group(1) else Match.DIFFERENT
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
