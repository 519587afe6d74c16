"""The judge protocol, and the task that is sent to a worker process."""

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


class Judge(Protocol):
    """Judges completions without blocking the caller."""

    @property
    def version(self) -> str:
        """Changes whenever the same text and gold answer could get another verdict."""
        ...

    def submit(self, text: str, answer: str) -> Future[Score]:
        """The future verdict on completion `text` against the gold `answer`."""
        ...

    def close(self) -> None:
        """Stop all work and cancel pending verdicts. May be called twice."""
        ...


def score(outcome: Outcome, detail: str = "") -> Score:
    """The score of an outcome: 1 for `correct`, NaN for `verifier_error` (nothing is known of the
    answer, so it must move no baseline), 0 for everything else."""
    values = {"correct": 1.0, "verifier_error": math.nan}
    return Score(values.get(outcome, 0.0), outcome, detail)
