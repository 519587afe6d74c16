"""Which prompts a step asks: the next ones of the run's endless order, or of these only the ones that are
likely to teach something."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dash_exp.config.schema import SelectionConfig
from dash_exp.seeding import seed_for, uniforms
from dash_exp.tasks.prompts import PromptSet, prompts_at
from dash_exp.types import Prompt, Score

EASY, HARD = "easy", "hard"


@dataclass(frozen=True, slots=True)
class Streak:
    """How many of a prompt's last groups in a row were all right (`easy`) or all wrong (`hard`)."""

    kind: str
    length: int


class Chooser:
    """Draws the prompts of a run from its endless order. What it remembers is saved with every checkpoint.

    With `greso` (Zheng et al. 2025, arXiv 2506.02177) a prompt whose last n groups were all right or all
    wrong is asked with probability explore ** n. After each step `explore` of easy and of hard prompts falls
    by `adjust` if at least the wanted share of groups was of that kind, else it rises.
    """

    def __init__(self, prompts: PromptSet, seed: int, selection: SelectionConfig):
        self.prompts, self.seed, self.selection = prompts, seed, selection
        self.place, self.skipped = 0, 0
        self.explore = {EASY: selection.explore, HARD: selection.explore}
        self.streaks: dict[str, Streak] = {}

    def draw(self, count: int) -> list[Prompt]:
        """The next `count` prompts; `skipped` counts those passed over. After as many as there are prompts
        none is skipped any more, so a set with nothing left to learn is asked in its order."""
        chosen: list[Prompt] = []
        seen = 0
        while len(chosen) < count:
            for prompt in prompts_at(self.prompts, self.seed, self.place, count - len(chosen)):
                if seen >= len(self.prompts.prompts) or self._asks(prompt):
                    chosen.append(prompt)
                else:
                    self.skipped += 1
                self.place += 1
                seen += 1
        return chosen

    def _asks(self, prompt: Prompt) -> bool:
        streak = self.streaks.get(_key(prompt))
        if streak is None:
            return True
        drawn = uniforms(seed_for(self.seed, "selection", self.place), 1)[0]
        return bool(drawn < self.explore[streak.kind] ** streak.length)

    def observe(self, judged: Sequence[tuple[Prompt, Sequence[Score]]]) -> None:
        """Learn from the verdicts of a step's groups, in prompt order."""
        if self.selection.name == "none" or not judged:
            return
        kinds = [kind_of(scores) for _, scores in judged]
        for (prompt, _), kind in zip(judged, kinds, strict=True):
            before = self.streaks.pop(_key(prompt), None)
            if kind is not None:
                longer = before is not None and before.kind == kind
                self.streaks[_key(prompt)] = Streak(kind, before.length + 1 if before and longer else 1)
        for kind, wanted in ((EASY, self.selection.easy_share), (HARD, self.selection.hard_share)):
            above = kinds.count(kind) / len(kinds) >= wanted
            moved = self.explore[kind] + (-self.selection.adjust if above else self.selection.adjust)
            self.explore[kind] = min(1.0, max(0.0, round(moved, 9)))

    def state(self) -> dict[str, Any]:
        """What `restore` needs, as JSON has it."""
        streaks = {key: [one.kind, one.length] for key, one in self.streaks.items()}
        return {"place": self.place, "explore": dict(self.explore), "streaks": streaks}

    def restore(self, state: Mapping[str, Any]) -> None:
        self.place, self.explore = int(state["place"]), dict(state["explore"])
        self.streaks = {key: Streak(kind, length) for key, (kind, length) in state["streaks"].items()}

    def take_numbers(self) -> dict[str, float]:
        """For the record of a step: prompts skipped since the last call, and both probabilities."""
        if self.selection.name == "none":
            return {}
        skipped, self.skipped = self.skipped, 0
        shown = {f"selection/explore_{kind}": value for kind, value in self.explore.items()}
        return {"selection/skipped": skipped, **shown}


def kind_of(scores: Iterable[Score]) -> str | None:
    """Whether a group was all right or all wrong; None for one that teaches, or that could not be judged."""
    right = [one.outcome == "correct" for one in scores if one.outcome != "verifier_error"]
    if not right or any(right) != all(right):
        return None
    return EASY if right[0] else HARD


def _key(prompt: Prompt) -> str:
    return f"{prompt.task}/{prompt.id}"
