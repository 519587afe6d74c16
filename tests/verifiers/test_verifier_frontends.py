"""What a run sees: the two verifiers, their cache, and their versions."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from code_fixtures import HandPool

from dash_exp.types import Score
from dash_exp.verifiers.judges import InlineJudge, judge_integer, math_judge
from dash_exp.verifiers.pool import VerifierPool
from dash_exp.verifiers.types import Judge, score

GENEROUS_S = 120.0


@pytest.fixture
def hand() -> HandPool:
    return HandPool()


@pytest.fixture(scope="module")
def maths() -> Iterator[Judge]:
    verifier = math_judge(VerifierPool(1, timeout_s=10.0), "boxed_or_last")
    yield verifier
    verifier.close()


def test_inline_verdicts_are_there_at_once() -> None:
    verifier: Judge = InlineJudge(judge_integer)
    future = verifier.submit("7 or 8", "7")
    assert future.done()
    assert future.result() == Score(1.0, "correct")
    assert verifier.version.startswith("integer-")
    verifier.close()


@pytest.mark.parametrize(
    ("text", "answer", "outcome"),
    [
        (r"Hence \boxed{\frac{2}{4}}.", "0.5", "correct"),
        ("the answer is 3", "4", "wrong"),
        ("I give up", "4", "no_answer"),
        (r"\boxed{\frac{1}{}}", "4", "unparsed"),
    ],
)
def test_pooled_verdicts(maths: Judge, text: str, answer: str, outcome: str) -> None:
    assert maths.submit(text, answer).result(GENEROUS_S).outcome == outcome


def test_the_version_names_what_can_change_a_verdict(maths: Judge) -> None:
    assert "boxed_or_last" in maths.version
    assert "math-verify-0." in maths.version


def test_equal_answers_are_judged_once_even_while_in_flight(hand: HandPool) -> None:
    verifier = math_judge(hand, "boxed")
    futures = [verifier.submit(r"\boxed{5}", "5") for _ in range(8)]
    assert len(hand.asked) == 1
    assert not any(future.done() for future in futures)
    hand.asked[0][1].set_result(score("correct"))
    assert {future.result(1).outcome for future in futures} == {"correct"}
    assert verifier.submit(r"\boxed{5}", "5").result(1).outcome == "correct"
    assert len(hand.asked) == 1


def test_the_gold_answer_is_part_of_the_key(hand: HandPool) -> None:
    verifier = math_judge(hand, "boxed")
    verifier.submit(r"\boxed{5}", "5")
    verifier.submit(r"\boxed{5}", "6")
    verifier.submit(r"\boxed{6}", "5")
    asked = [(t.text, t.answer, t.how) for t, _ in hand.asked]
    assert asked == [(rf"\boxed{{{text}}}", gold, "boxed") for text, gold in ("55", "56", "65")]


@pytest.mark.parametrize("outcome", ["timeout", "crashed", "verifier_error"])
def test_temporary_failures_are_not_remembered(hand: HandPool, outcome: str) -> None:
    verifier = math_judge(hand, "boxed")
    first = verifier.submit(r"\boxed{5}", "5")
    hand.asked[0][1].set_result(score(outcome))  # type: ignore[arg-type]
    assert first.result(1).outcome == outcome
    verifier.submit(r"\boxed{5}", "5")
    assert len(hand.asked) == 2


def test_the_cache_is_bounded(hand: HandPool) -> None:
    verifier = math_judge(hand, "boxed", cache_size=2)
    for number in (1, 2, 1, 3, 1, 2):
        verifier.submit(rf"\boxed{{{number}}}", "1")
    assert [task.text for task, _ in hand.asked] == [rf"\boxed{{{number}}}" for number in "1232"]


def test_cancelling_one_copy_leaves_the_others(hand: HandPool) -> None:
    verifier = math_judge(hand, "boxed")
    first, second = (verifier.submit(r"\boxed{5}", "5") for _ in range(2))
    assert first.cancel()
    hand.asked[0][1].set_result(score("correct"))
    assert second.result(1).outcome == "correct"
    assert first.cancelled()


def test_closing_cancels_what_waits(hand: HandPool) -> None:
    verifier = math_judge(hand, "boxed")
    future = verifier.submit(r"\boxed{5}", "5")
    verifier.close()
    assert future.cancelled()


def test_an_unknown_extraction_fails_early(hand: HandPool) -> None:
    with pytest.raises(ValueError, match="boxed"):
        math_judge(hand, "bxed")
