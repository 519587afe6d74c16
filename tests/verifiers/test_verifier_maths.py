"""The maths judge against hand-worked tables, properties, and outcomes."""

from __future__ import annotations

import random
from fractions import Fraction

import judge_tables as tables
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dash_exp.verifiers.math.compare import MAX_JUDGED_CHARS, judge_candidate, judge_math
from dash_exp.verifiers.math.normalise import normalise
from dash_exp.verifiers.math.parse import parse_form

SMALL = st.integers(-99, 99)


def both_ways(table: tables.Table) -> list[tuple[str, str]]:
    return [pair for gold, other in table for pair in ((gold, other), (other, gold))]


@pytest.mark.parametrize(("gold", "candidate"), [*both_ways(tables.EQUAL), *tables.EQUAL_TO_GOLD])
def test_equal(gold: str, candidate: str) -> None:
    verdict = judge_candidate(candidate, gold)
    assert (verdict.outcome, verdict.value) == ("correct", 1.0)


@pytest.mark.parametrize(("gold", "candidate"), [*both_ways(tables.UNEQUAL), *tables.UNEQUAL_TO_GOLD])
def test_unequal(gold: str, candidate: str) -> None:
    verdict = judge_candidate(candidate, gold)
    assert (verdict.outcome, verdict.value) == ("wrong", 0.0)


@pytest.mark.parametrize(
    ("text", "outcome"),
    [
        (r"\boxed{\frac{6}{4}}", "correct"),
        (r"\boxed{1.5}", "correct"),
        (r"\boxed{1.6}", "wrong"),
        ("I give up", "no_answer"),
        (r"\boxed{\frac{1}{}}", "unparsed"),
        (r"\boxed{x +}", "unparsed"),
        (r"\boxed{" + "1" * (MAX_JUDGED_CHARS + 1) + "}", "unparsed"),
    ],
)
def test_outcomes(text: str, outcome: str) -> None:
    verdict = judge_math(text, r"\frac{3}{2}", "boxed")
    assert verdict.outcome == outcome
    assert verdict.value == (1.0 if outcome == "correct" else 0.0)


@pytest.mark.parametrize(
    ("text", "gold", "outcome"),
    [
        (r"Hence \boxed{\frac{2}{4}}.", "0.5", "correct"),
        ("the answer is 3", "4", "wrong"),
        (r"\boxed{2 \text{ million}}", "2", "correct"),  # the library's own rules, not ours
        ("I give up", "4", "no_answer"),
        ("the answer is 3", "", "verifier_error"),
    ],
)
def test_the_library_by_itself(text: str, gold: str, outcome: str) -> None:
    assert judge_math(text, gold, "math_verify").outcome == outcome


def test_an_unreadable_gold_is_matched_as_a_string() -> None:
    assert judge_candidate(r"\frac{1}{", r"\frac{1}{").outcome == "correct"
    assert judge_candidate(r"\frac{1}", r"\frac{1}{").outcome != "correct"


def test_a_power_of_ten_as_the_last_number() -> None:
    assert judge_math("so it is 5e1", "50", "last_number").outcome == "correct"
    assert judge_math("so it is 5e1", "1", "last_number").outcome == "wrong"


@given(SMALL, SMALL)
def test_integers(gold: int, found: int) -> None:
    expected = "correct" if gold == found else "wrong"
    for text in (f"{found}", f"${found}$", f"x = {found}", f"{found}.0", rf"{found}^\circ"):
        assert judge_candidate(text, str(gold)).outcome == expected


@given(st.integers(1_000, 10**12), st.sampled_from([",", r",\!", "{,}", r"\,"]))
def test_thousands_separators(number: int, separator: str) -> None:
    grouped = f"{number:,}".replace(",", separator)
    assert judge_candidate(grouped, str(number)).outcome == "correct"
    assert judge_candidate(grouped, str(number + 1)).outcome == "wrong"


@given(SMALL, st.integers(2, 60), st.integers(2, 9), SMALL)
def test_fractions(top: int, bottom: int, factor: int, other: int) -> None:
    gold = rf"\frac{{{top}}}{{{bottom}}}"
    scaled = rf"\dfrac{{{top * factor}}}{{{bottom * factor}}}"
    assert judge_candidate(scaled, gold).outcome == "correct"
    assert judge_candidate(f"{top * factor}/{bottom * factor}", gold).outcome == "correct"
    same = Fraction(other, bottom) == Fraction(top, bottom)
    assert judge_candidate(f"{other}/{bottom}", gold).outcome == ("correct" if same else "wrong")


@given(st.fractions(max_denominator=10**6))
def test_a_decimal_is_only_the_number_that_it_writes(value: Fraction) -> None:
    decimal = f"{float(value):.4f}"
    gold = f"{value.numerator}/{value.denominator}"
    expected = "correct" if Fraction(decimal) == value else "wrong"
    assert judge_candidate(decimal, gold).outcome == expected


@given(st.lists(SMALL, min_size=2, max_size=6, unique=True), st.randoms(use_true_random=False))
def test_lists_have_no_order_and_tuples_have(items: list[int], rng: random.Random) -> None:
    shuffled = rng.sample(items, len(items))
    texts = [", ".join(map(str, order)) for order in (items, shuffled)]
    assert judge_candidate(texts[1], texts[0]).outcome == "correct"
    assert judge_candidate(rf"\{{{texts[1]}\}}", texts[0]).outcome == "correct"
    same = "correct" if shuffled == items else "wrong"
    assert judge_candidate(f"({texts[1]})", f"({texts[0]})").outcome == same
    shorter = ", ".join(map(str, shuffled[1:]))
    assert judge_candidate(shorter, texts[0]).outcome == "wrong"


@given(st.sampled_from("(["), SMALL, SMALL, st.sampled_from(")]"), st.sampled_from("(["))
def test_interval_ends_matter(first: str, low: int, high: int, last: str, other: str) -> None:
    assume(low < high)
    signs = "<" if first == "(" else r"\le", "<" if last == ")" else r"\leq"
    gold = f"{first}{low}, {high}{last}"
    assert judge_candidate(f"{low} {signs[0]} x {signs[1]} {high}", gold).outcome == "correct"
    expected = "correct" if other == first else "wrong"
    assert judge_candidate(f"{other}{low},{high}{last}", gold).outcome == expected


@given(st.text("0123456789xyi+-=<>,;:.()[]{}\\%$^_ abU", max_size=60))
def test_parsing_never_fails(text: str) -> None:
    for join_thousands in (True, False):
        parse_form(normalise(text), join_thousands)


@pytest.mark.parametrize(
    "piece",
    [
        "(",
        "[",
        "{",
        r"\{",
        "((",
        r"\sqrt{",
        ",",
        "=",
        r"\cup ",
        "5 a",
        "m/",
        r"\text{m}",
        r"\frac{\text{",
        " ",
    ],
)
def test_parsing_deep_nesting_never_fails(piece: str) -> None:
    parse_form(normalise(piece * (MAX_JUDGED_CHARS // len(piece))))
