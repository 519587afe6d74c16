"""Named prompt templates: how a question is put to a model. Training and evaluation share them."""

from __future__ import annotations

from collections.abc import Callable

Template = Callable[[str], str]


def bare(problem: str) -> str:
    """The question alone: the paper's maths prompt."""
    return problem


def problem_solution(problem: str) -> str:
    """`Problem: ... Solution: ...`, the paper's form for supervised fine-tuning."""
    return f"Problem:\n{problem}\n\nSolution:\n"


TEMPLATES: dict[str, Template] = {"bare": bare, "problem_solution": problem_solution}
