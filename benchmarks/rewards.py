"""Rewards that are set, not earned, so that a known share of the groups is kept: the same on both sides.

A prompt's gold answer becomes a mark. In a `varied` group every second completion is right; in a `constant`
one none is, so all its advantages are 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import replace
from typing import Any

from dash_exp.tasks.prompts import PromptSet, prompts_at
from dash_exp.types import Score

VARIED, CONSTANT = "varied", "constant"


def is_varied(place: int, share: float) -> bool:
    """Whether the group at this place of a batch is one of the `share` whose rewards differ: evenly spread,
    and the integer part of n x share among the first n."""
    return math.floor((place + 1) * share + 1e-9) > math.floor(place * share + 1e-9)


def marked(prompts: PromptSet, seed: int, steps: int, per_step: int, share: float) -> PromptSet:
    """The same prompts with a mark for an answer: in each of these steps `share` of them are varied."""
    marks = {
        prompt.id: VARIED if is_varied(place, share) else CONSTANT
        for step in range(1, steps + 1)
        for place, prompt in enumerate(prompts_at(prompts, seed, (step - 1) * per_step, per_step))
    }
    rows = tuple(replace(p, answer=marks.get(p.id, CONSTANT)) for p in prompts.prompts)
    return replace(prompts, prompts=rows)


def set_reward(mark: str, index: int) -> float:
    """Of the completion with this number in a group of that mark."""
    return float(mark == VARIED and index % 2 == 1)


class SetRewards:
    """As a trainer's reward function: completions of a group lie side by side."""

    def __init__(self, group_size: int):
        self.group_size = group_size

    def __call__(self, completions: Sequence[str], answer: Sequence[str], **unused: Any) -> list[float]:
        return [set_reward(mark, number % self.group_size) for number, mark in enumerate(answer)]


class SetJudge:
    """As a judge of ours, which is asked for all completions of a group in turn."""

    version = "set"

    def __init__(self, group_size: int):
        self.group_size = group_size
        self._asked = 0

    def submit(self, text: str, answer: str, facts: object = None) -> Future[Score]:
        value = set_reward(answer, self._asked % self.group_size)
        self._asked += 1
        future: Future[Score] = Future()
        future.set_result(Score(value, "correct" if value else "wrong"))
        return future

    def close(self) -> None:
        """Nothing to stop."""
