"""reasoning-gym's own scorers, in a process of the sandbox. Some evaluate the answer as Python.

Where a scorer would evaluate an answer, it gets a function that reads literals, or formulas without
attributes, strings or unknown names, so an answer cannot look for the solution in the scorer's memory.
Verdicts on honest answers are the library's.
"""

from __future__ import annotations

import ast
import importlib
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

from dash_exp.types import Score
from dash_exp.verifiers.types import GymGold, score

EVALUATE_ANSWERS = (
    "algorithmic.string_insertion",
    "algorithmic.spiral_matrix",
    "algorithmic.number_sorting",
    "algorithmic.binary_matrix",
    "games.n_queens",
)
"""Modules of reasoning_gym 0.1.25 whose scorers call `eval` on the answer, which is a list at best."""
PARSE_ANSWERS = ("games.puzzle24", "games.countdown")
"""Modules that hold sympy's `parse_expr`, which evaluates, under this name."""

_MAX_FORMULA = 2_000
_NAME = re.compile(r"[A-Za-z_]\w*")
_ATTRIBUTE = re.compile(r"[\w)\]]\s*\.\s*[A-Za-z_]")
_FUNCTIONS = "sin cos tan cot sec csc asin acos atan sinh cosh tanh exp log ln sqrt Abs pi Rational"
_NAMES = frozenset(_FUNCTIONS.split())


def prepare() -> None:
    """Import the library, and replace `eval` in those of its scorers that evaluate answers."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ["MPLCONFIGDIR"] = folder  # else matplotlib leaves one behind
        importlib.import_module("reasoning_gym")
    for name in EVALUATE_ANSWERS:
        module: Any = importlib.import_module(f"reasoning_gym.{name}")
        module.eval = read_literal
    sympy: Any = importlib.import_module("sympy")
    guarded = guard(sympy.parse_expr)
    sympy.parse_expr = guarded
    for name in PARSE_ANSWERS:
        module = importlib.import_module(f"reasoning_gym.{name}")
        module.parse_expr = guarded


def read_literal(text: str) -> Any:
    """What `eval` gives for a literal. Raises ValueError or SyntaxError for anything else."""
    return ast.literal_eval(text.strip())


def guard(parse: Callable[..., Any]) -> Callable[..., Any]:
    """`parse` for formulas only; ValueError for what could be a program."""

    def parse_formula(text: Any, *arguments: Any, **named: Any) -> Any:
        if not is_formula(str(text)):
            raise ValueError("not a formula")
        return parse(text, *arguments, **named)

    return parse_formula


def is_formula(text: str) -> bool:
    """Numbers, operators, one- and two-letter variables and named functions, and nothing else."""
    if len(text) > _MAX_FORMULA or not text.isascii() or _ATTRIBUTE.search(text):
        return False
    if re.search(r"[^\w\s+\-*/^().,=]|__", text):
        return False
    return all(len(name) <= 2 or name in _NAMES for name in _NAME.findall(text))


def judge(answer: str, gold: str) -> Score:
    """The library's score of an extracted answer; `correct` at 1."""
    try:
        known = GymGold.from_text(gold)
        scorer = importlib.import_module("reasoning_gym").get_score_answer_fn(known.task)
    except (ValueError, TypeError, KeyError) as error:
        return score("verifier_error", f"the gold is broken: {error}")
    try:
        value = float(scorer(answer, known.entry))
    except MemoryError:
        return score("crashed", "out of memory")
    except Exception as error:  # noqa: BLE001 (a scorer's fault on an odd answer scores nothing)
        return score("wrong", f"the scorer failed: {type(error).__name__}: {error}"[:300])
    if not 0.0 <= value <= 1.0:
        return score("verifier_error", f"the scorer gave {value}")
    return Score(value, "correct" if value >= 1.0 else "wrong", f"{known.task}: {value:g}")
