"""Judges the generated arithmetic tasks: the first integer in the text against the gold one."""

from __future__ import annotations

import re

from dash_exp.types import Score
from dash_exp.verifiers.types import score

_INTEGER = re.compile(r"-?[0-9]+")
_MAX_DIGITS = 1_000


def judge_integer(text: str, answer: str) -> Score:
    """Correct when the first match of `-?[0-9]+` in `text` is the integer `answer`.

    Leading zeros do not matter. A number longer than 1,000 digits is wrong without being read. An
    `answer` that is no integer is a fault of the data: `verifier_error`.
    """
    if not _INTEGER.fullmatch(answer.strip()):
        return score("verifier_error", f"the gold answer {answer[:40]!r} is not an integer")
    match = _INTEGER.search(text)
    if match is None:
        return score("no_answer", "no integer in the text")
    found = match.group()
    if len(found) <= _MAX_DIGITS and int(found) == int(answer):
        return score("correct")
    return score("wrong", f"found {found[:40]}, expected {answer[:40]}")
