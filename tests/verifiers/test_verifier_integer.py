"""The integer judge: first integer in the text, and nothing else."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dash_exp.verifiers.judges import judge_integer


@pytest.mark.parametrize(
    ("text", "answer", "outcome"),
    [
        ("42", "42", "correct"),
        (" 42 and then 7", "42", "correct"),
        ("it is 7, not 42", "42", "wrong"),
        ("-5", "-5", "correct"),
        ("5", "-5", "wrong"),
        ("007", "7", "correct"),
        ("3-5", "3", "correct"),
        ("42.9", "42", "correct"),
        ("four", "4", "no_answer"),
        ("", "4", "no_answer"),
        ("-", "4", "no_answer"),
        ("٤", "4", "no_answer"),
        ("9" * 100_000, "9", "wrong"),
        ("4", "four", "verifier_error"),
    ],
)
def test_first_integer_decides(text: str, answer: str, outcome: str) -> None:
    verdict = judge_integer(text, answer)
    assert verdict.outcome == outcome
    if outcome == "verifier_error":
        assert math.isnan(verdict.value)  # nothing is known of the answer: never a silent 0
    else:
        assert verdict.value == (1.0 if outcome == "correct" else 0.0)
    assert len(verdict.detail) < 200


@given(st.integers(), st.integers())
def test_equal_integers_only(gold: int, found: int) -> None:
    verdict = judge_integer(f" = {found}\n", str(gold))
    assert verdict.outcome == ("correct" if gold == found else "wrong")
