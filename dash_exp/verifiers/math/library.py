"""math-verify by itself, with its default extraction, so that numbers compare with other projects'."""

from __future__ import annotations

import logging

from math_verify import parse, verify

from dash_exp.types import Score
from dash_exp.verifiers.types import score

logging.getLogger("math_verify").setLevel(logging.ERROR)  # it warns that its alarms are off


def judge_by_library(text: str, answer: str) -> Score:
    """The verdict of math-verify's own `parse` and `verify` on a completion. A gold answer that it cannot
    read is a `verifier_error`; it is read as LaTeX between dollar signs, unless it has some."""
    gold = parse(answer if "$" in answer.replace("\\$", "") else f"${answer}$", parsing_timeout=None)
    if not gold:
        return score("verifier_error", f"math-verify cannot read the gold answer {answer[:80]!r}")
    found = parse(text, parsing_timeout=None)
    if not found:
        return score("no_answer", "math-verify found no answer")
    if verify(gold, found, timeout_seconds=None):
        return score("correct")
    return score("wrong", f"found {str(found[0])[:80]!r}, expected {answer[:80]!r}")
