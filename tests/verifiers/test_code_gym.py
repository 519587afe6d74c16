"""reasoning-gym's scorers in the sandbox: their scores, and answers that are programs."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from code_fixtures import BEST_AND_LIMITS, HandPool

from dash_exp.verifiers.code import candidate
from dash_exp.verifiers.code.candidate import is_formula, read_literal
from dash_exp.verifiers.judges import PooledJudge, gym_judge
from dash_exp.verifiers.math.extract import GYM_EXTRACTORS, answer_tag
from dash_exp.verifiers.types import GymGold

reasoning_gym = pytest.importorskip("reasoning_gym")
GENEROUS_S = 60.0


@pytest.fixture(scope="module", params=BEST_AND_LIMITS)
def whole(request: pytest.FixtureRequest) -> Iterator[PooledJudge]:
    shared = gym_judge(1, 10.0, 2048, "whole", request.param)
    yield shared
    shared.close()


def entry_of(task: str) -> dict[str, Any]:
    return dict(reasoning_gym.create_dataset(task, size=1, seed=7)[0])


def gold_of(task: str) -> str:
    return GymGold(task, entry_of(task)).to_text()


@pytest.mark.parametrize(
    "task",
    [
        "chain_sum",
        "number_sorting",
        "string_insertion",
        "spiral_matrix",
        "binary_matrix",
        "n_queens",
        "leg_counting",
        "basic_arithmetic",
        "polynomial_multiplication",
        "simple_integration",
        "bitwise_arithmetic",
    ],
)
def test_the_librarys_own_answer_is_correct(whole: PooledJudge, task: str) -> None:
    entry = entry_of(task)
    verdict = whole.submit(str(entry["answer"]), GymGold(task, entry).to_text()).result(GENEROUS_S)
    assert (verdict.value, verdict.outcome) == (1.0, "correct")
    off = whole.submit("nothing of the kind", GymGold(task, entry).to_text()).result(GENEROUS_S)
    assert off.outcome == "wrong"
    assert 0.0 <= off.value < 0.2


def test_partial_scores_are_kept(whole: PooledJudge) -> None:
    entry = entry_of("spiral_matrix")
    listed = str(entry["answer"].split())
    verdict = whole.submit(listed, GymGold("spiral_matrix", entry).to_text()).result(GENEROUS_S)
    assert (verdict.value, verdict.outcome) == (0.1, "wrong")


def test_a_countdown_expression(whole: PooledJudge) -> None:
    entry = entry_of("countdown")
    expression = entry["metadata"]["expression"]
    verdict = whole.submit(expression, GymGold("countdown", entry).to_text()).result(GENEROUS_S)
    assert verdict.outcome == "correct"


ATTACKS = (
    "__import__('os')._exit(0)",
    "__import__('os').system('sleep 100')",
    "__import__('time').sleep(1000)",
    "[c for c in __import__('sys')._getframe(1).f_locals['entry']['answer']]",
    "__import__('sys')._getframe(1).f_locals['oracle_answer']",
    "__import__('inspect').stack()[1].frame.f_locals['entry']['answer']",
    "re.enum.sys._getframe(1).f_locals['entry']['answer']",
    "oracle_answer",
    "entry['answer']",
    "type('A', (), {'__eq__': lambda s, o: True})()",
    "(lambda: 1)()",
    "9**9**9",
    "[" * 5000 + "]" * 5000,
    "1" * 100_000,
)


EVALUATING, PARSING = "string_insertion", "countdown"
OTHERS = ("spiral_matrix", "number_sorting", "n_queens", "polynomial_multiplication")


@pytest.mark.parametrize(
    "task", [EVALUATING, PARSING, *(pytest.param(task, marks=pytest.mark.long) for task in OTHERS)]
)
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda text: text[:30])
def test_answers_that_are_programs(task: str, attack: str, attacked: PooledJudge) -> None:
    verdict = attacked.submit(attack, gold_of(task)).result(GENEROUS_S)
    assert verdict.value < 0.1
    assert verdict.outcome in ("wrong", "timeout", "crashed")


@pytest.fixture(scope="module")
def attacked() -> Iterator[PooledJudge]:
    shared = gym_judge(1, 2.0, 2048, "whole")
    yield shared
    shared.close()


@pytest.mark.parametrize(
    ("text", "literal"), [("[1, 2]", [1, 2]), (" ['a']", ["a"]), ("[[0, -1]]", [[0, -1]]), ("(1.5,)", (1.5,))]
)
def test_literals_are_read_as_eval_does(text: str, literal: object) -> None:
    assert read_literal(text) == literal == eval(text.strip())  # noqa: S307


@pytest.mark.parametrize(
    ("text", "formula"),
    [
        ("3*x**2 + 2*x - 1", True),
        ("x**2/2 + C", True),
        ("sin(x)*exp(-x) + log(2.5)", True),
        ("(51 - 13) * 4", True),
        ("x = 3", True),
        ("a.b", False),
        ("x.__class__", False),
        ("open(1)", False),
        ("'a'", False),
        ("[1]", False),
        ("getattr(x, y)", False),
        ("1 if x else 2", False),
        ("(1).real", False),
        ("x" * 3000, False),
        ("é", False),
    ],
)
def test_formulas_and_programs(text: str, formula: bool) -> None:
    assert is_formula(text) is formula


def test_the_library_evaluates_nowhere_else() -> None:
    """A new release may: then `EVALUATE_ANSWERS` or `PARSE_ANSWERS` has to grow."""
    root = Path(reasoning_gym.__file__).parent
    known = {
        *candidate.EVALUATE_ANSWERS,
        "arithmetic.bitwise_arithmetic",
        "arithmetic.basic_arithmetic",  # its own
        "arithmetic.gsm_symbolic.generators_00_49",
        "arithmetic.gsm_symbolic.generators_50_99",
    }
    evaluating = set()
    for path in root.rglob("*.py"):
        source = path.read_text()
        name = ".".join(path.relative_to(root).with_suffix("").parts)
        if " eval(" in source or "(eval(" in source:
            evaluating.add(name)
        if "import parse_expr" in source or "import sympify" in source:
            assert name in candidate.PARSE_ANSWERS
    assert evaluating <= known


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>5</answer>", "5"),
        ("<answer> 5\n</answer> or <answer>6</answer>!", "6"),
        ("<answer></answer>", ""),
        ("<answer>5", None),
        ("5</answer>", None),
        ("", None),
        ("<answer>1</answer> <answer>2", "1"),
    ],
)
def test_the_answer_between_tags(text: str, answer: str | None) -> None:
    assert answer_tag(text) == answer


@pytest.mark.parametrize(
    ("extraction", "text"),
    [("answer_tag", "so <answer>{}</answer>"), ("boxed_or_last", r"\boxed{{{}}}"), ("whole", "{} \n")],
)
def test_extractions(extraction: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = HandPool()
    monkeypatch.setattr("dash_exp.verifiers.judges._sandboxed_pool", lambda *settings: pool)
    verifier = gym_judge(1, 10.0, 2048, extraction)
    verifier.submit(text.format(5), "gold")
    assert [(task.text, task.answer, task.how) for task, _ in pool.asked] == [
        (text.format(5), "gold", extraction)
    ]
    assert [GYM_EXTRACTORS[extraction](some) for some in (text.format(5), "")] == ["5", None]
    assert "reasoning-gym-" in verifier.version and extraction in verifier.version


def test_an_unknown_extraction_fails_early() -> None:
    with pytest.raises(ValueError, match="answer_tag"):
        gym_judge(1, 1.0, 512, "tag")


@pytest.mark.parametrize("gold", ["no JSON", '{"task": "chain_sum"}', GymGold("no such task", {}).to_text()])
def test_a_broken_gold_is_our_fault(attacked: PooledJudge, gold: str) -> None:
    verdict = attacked.submit("1", gold).result(GENEROUS_S)
    assert verdict.outcome == "verifier_error"
    assert math.isnan(verdict.value)
