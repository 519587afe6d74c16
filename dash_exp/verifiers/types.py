"""What judges exchange: their protocol, tasks, and the gold answers of programs and of reasoning-gym."""

from __future__ import annotations

import json
import math
from concurrent.futures import Future
from dataclasses import asdict, dataclass
from typing import Any, Protocol, Self

from dash_exp.types import Completion, FinishReason, Outcome, Prompt, Score


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a completion beside its text. `fields`: of the data row, as JSON; `tokens`: 0 where
    nobody counted them."""

    fields: str = "{}"
    finish_reason: FinishReason = "stop"
    tokens: int = 0

    @classmethod
    def of(cls, prompt: Prompt, completion: Completion) -> Self:
        return cls(prompt.fields, completion.finish_reason, len(completion.token_ids))


NO_FACTS = Facts()


class Judge(Protocol):
    """Judges completions without blocking the caller."""

    @property
    def version(self) -> str:
        """Changes whenever the same text and gold answer could get another verdict."""
        ...

    def submit(self, text: str, answer: str, facts: Facts = NO_FACTS) -> Future[Score]:
        """The future verdict on completion `text` against the gold `answer`."""
        ...

    def close(self) -> None:
        """Stop all work and cancel pending verdicts. May be called twice."""
        ...


@dataclass(frozen=True, slots=True)
class VerifyTask:
    """What a worker process judges: a completion and its gold. For programs the text is JSON: a program that
    runs as it is, or a list of candidates for one (`code/program.py`). `timeout_s`: the limit of this task in
    seconds, where it is longer than the pool's own. `how` an answer is found in the text: the name of an
    extraction, or `math_verify`."""

    text: str
    answer: str
    timeout_s: float | None = None
    how: str = "whole"


@dataclass(frozen=True, slots=True)
class _Gold:
    """A gold answer that needs more than a text: `Prompt.answer` holds it as a JSON document."""

    def to_text(self) -> str:
        return json.dumps(asdict(self), sort_keys=True, ensure_ascii=False)

    @classmethod
    def from_text(cls, text: str) -> Self:
        """Raises ValueError or TypeError for text that `to_text` did not make."""
        return cls(**json.loads(text))


@dataclass(frozen=True, slots=True)
class CodeGold(_Gold):
    """What judges a program: `tests` is Python source that raises on failure.

    `prefix` (HumanEval's function header) is put before a program that does not define `entry_point`
    itself. `timeout_s`: as in `VerifyTask`.
    """

    tests: str
    entry_point: str = ""
    prefix: str = ""
    timeout_s: float | None = None


@dataclass(frozen=True, slots=True)
class GymGold(_Gold):
    """An entry of reasoning-gym: the task's name, and the entry its scorer wants."""

    task: str
    entry: dict[str, Any]


def wall_limit(cpu_s: float) -> float:
    """Seconds after which a verdict that may take `cpu_s` of processor time is given up: the machine leaves
    it less than a tenth of a processor."""
    return 10 * cpu_s


def score(outcome: Outcome, detail: str = "") -> Score:
    """The score of an outcome: 1 for `correct`, NaN for `verifier_error` (nothing is known of the
    answer, so it must move no baseline), 0 for everything else."""
    values = {"correct": 1.0, "verifier_error": math.nan}
    return Score(values.get(outcome, 0.0), outcome, detail)
