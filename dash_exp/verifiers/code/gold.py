"""Gold of tasks that need more than an answer's text, as one JSON document. Standard library only."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class CodeGold:
    """What judges a program: `tests` is Python source appended to it, raising on failure.

    `prefix` (HumanEval's function header) is put before a program that does not define `entry_point`
    itself. `timeout_s`: seconds for this task, where the verifier's own limit is too short.
    """

    tests: str
    entry_point: str = ""
    prefix: str = ""
    timeout_s: float | None = None

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @staticmethod
    def from_text(text: str) -> CodeGold:
        """Raises ValueError or TypeError for text that `to_text` did not make."""
        return CodeGold(**json.loads(text))


@dataclass(frozen=True, slots=True)
class GymGold:
    """An entry of reasoning-gym: the task's name, and the entry its scorer wants."""

    task: str
    entry: dict[str, Any]

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @staticmethod
    def from_text(text: str) -> GymGold:
        """Raises ValueError or TypeError for text that `to_text` did not make."""
        return GymGold(**json.loads(text))
