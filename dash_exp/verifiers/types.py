"""What a verifier is, and the task that travels to a worker process. Standard library only."""

from __future__ import annotations

import math
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Protocol

from dash_exp.types import Outcome, Score


@dataclass(frozen=True, slots=True)
class VerifyTask:
    """One verdict to reach. `verifier` names a judge (`math`, `integer`, `code`, `reasoning_gym`);
    `extraction` names how that judge finds the answer inside `text`; `answer` is gold. `timeout_s`:
    seconds for this task, where they are more than the pool's own limit."""

    task_id: str | int
    verifier: str
    extraction: str
    text: str
    answer: str
    timeout_s: float | None = None


class Verifier(Protocol):
    """Scores completions without ever blocking the caller."""

    @property
    def version(self) -> str:
        """Changes whenever the same text and gold answer could get another verdict."""
        ...

    def submit(self, text: str, answer: str) -> Future[Score]:
        """A verdict to come on completion `text` against the gold `answer`."""
        ...

    def close(self) -> None:
        """Stop all work; verdicts not reached yet are cancelled. Closing twice is harmless."""
        ...


def score(outcome: Outcome, detail: str = "") -> Score:
    """The score of an outcome: 1 for `correct`, NaN for `verifier_error` (nothing is known of the
    answer, so it must move no baseline), 0 for everything else."""
    values = {"correct": 1.0, "verifier_error": math.nan}
    return Score(values.get(outcome, 0.0), outcome, detail)
