"""Every reference solution is judged correct, and a changed answer is not."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator

import pytest

from dash_exp.verifiers.math.compare import compare, judge_candidate, judge_math
from dash_exp.verifiers.math.normalise import normalise
from dash_exp.verifiers.math.parse import parse_form

Rows = Callable[[str], list[dict[str, str]]]


def failures(
    rows: list[dict[str, str]], text: Callable[[dict[str, str]], str], how: str
) -> list[tuple[str, str, str]]:
    found: list[tuple[str, str, str]] = []
    for row in rows:
        verdict = judge_math(text(row), row["answer"], how)
        if verdict.outcome != "correct":
            found.append((row["id"], row["answer"], verdict.outcome))
    return found


@pytest.mark.parametrize("extraction", ["boxed", "boxed_or_last"])
def test_math500_solutions(rows: Rows, extraction: str) -> None:
    data = rows("math500_test.jsonl")
    assert len(data) == 500
    assert failures(data, lambda row: row["solution"], extraction) == []


@pytest.mark.parametrize("extraction", ["hash", "boxed_or_last", "last_number"])
def test_gsm8k_solutions(rows: Rows, extraction: str) -> None:
    data = rows("gsm8k_test.jsonl")
    assert len(data) == 1319
    assert failures(data, lambda row: row["solution"], extraction) == []


@pytest.mark.parametrize("name", ["gsm8k_test.jsonl", "aime24_test.jsonl"])
@pytest.mark.parametrize("shape", [r"so \boxed{%s}.", r"The answer is $%s$.", "The answer is %s."])
def test_integer_answers(rows: Rows, name: str, shape: str) -> None:
    assert failures(rows(name), lambda row: shape % row["answer"], "boxed_or_last") == []


def respellings(answer: str) -> Iterator[str]:
    """The same answer as another person would type it."""
    yield f"${answer}$."
    yield re.sub(r"\\frac(?=\{)", r"\\dfrac", answer)
    yield re.sub(r"(?<![\d!]), ", ",", answer)
    yield f" {answer} "
    if "\\left" not in answer and answer.count("(") == answer.count(")"):
        yield answer.replace("(", r"\left( ").replace(")", r" \right)")
    if "_" not in answer and "\\text" not in answer and "\\mbox" not in answer:
        yield re.sub(r"([-+=])", r" \1 ", answer)


SAMPLED_AND_ALL = pytest.mark.parametrize("step", [6, pytest.param(1, marks=pytest.mark.long)])
"""Every sixth answer for `make test`."""


@SAMPLED_AND_ALL
def test_math500_answers_respelled(rows: Rows, step: int) -> None:
    wrong = [
        (row["answer"], spelled)
        for row in rows("math500_test.jsonl")[::step]
        for spelled in respellings(row["answer"])
        if judge_candidate(spelled, row["answer"]).outcome != "correct"
    ]
    assert wrong == []


@SAMPLED_AND_ALL
@pytest.mark.parametrize("name", ["math500_test.jsonl", "math_train.jsonl"])
def test_every_answer_equals_itself_as_a_form(rows: Rows, name: str, step: int) -> None:
    """The structural comparison alone, without the shortcut for equal strings."""
    answers = sorted({normalise(row["answer"]) for row in rows(name)})[::step]
    wrong = [a for a in answers if not compare(parse_form(a), parse_form(a))]
    assert wrong == []


def perturbed(answer: str) -> Iterator[str]:
    """Answers that are near and different: a number, a sign, an item or a bracket changed."""
    for match in re.finditer(r"\d+", answer):
        changed = str(int(match.group()) + 1).zfill(len(match.group()))
        yield answer[: match.start()] + changed + answer[match.end() :]
    if re.match(r"[1-9]|\\frac|\\sqrt|\\pi", answer):
        yield f"-{answer}"
    if answer.startswith("-"):
        yield answer[1:]
    for match in re.finditer(r" \+ | - ", answer):
        sign = " - " if match.group() == " + " else " + "
        yield answer[: match.start()] + sign + answer[match.end() :]
    inside = re.fullmatch(r"(\\left)?\(.*,[^,]*?(\s*(\\right)?\))", answer)
    if inside and "\\cup" not in answer:
        yield answer[: answer.rindex(",")] + inside.group(2)
    if re.fullmatch(r"\(-?\d+, ?-?\d+\)", answer):
        yield f"[{answer[1:]}"
        yield f"[{answer[1:-1]}]"


@SAMPLED_AND_ALL
def test_perturbed_answers_are_wrong(rows: Rows, step: int) -> None:
    data = rows("math500_test.jsonl")
    pairs = sorted({(row["answer"], other) for row in data for other in perturbed(row["answer"])})
    assert len(pairs) > 700
    verdicts = {pair: judge_candidate(pair[1], pair[0]).outcome for pair in pairs[::step]}
    assert [pair for pair, outcome in verdicts.items() if outcome != "wrong"] == []
